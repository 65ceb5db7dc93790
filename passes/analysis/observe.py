"""Running a program node by node, with somebody watching: for goldens, ranges and the statistics of quantisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_map

from depthwire._mapped import release
from depthwire.passes._match import aten

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from depthwire.program import Program

    Visit = Callable[[torch.fx.Node, Any], None]


def observe(program: Program, feed: Mapping[str, Tensor], visit: Visit | None = None) -> Sequence[Any]:
    """Run a program once and show every value that a node computes.

    Each value is let go of after its last use, and so are the pages of weights that are mapped from a file: one layer
    is resident at a time.

    Args:
        program: The program.
        feed: One tensor for every user input.
        visit: Called with each node (inputs and weights too) and its value, in the order of the graph.

    Returns:
        The outputs, in the order of ``program.output_names``.
    """
    exported = program.exported
    weights = {**exported.constants, **exported.state_dict}
    specs = exported.graph_signature.input_specs
    values = [feed[s.arg.name] if s.kind is InputKind.USER_INPUT else weights[str(s.target)] for s in specs]
    with torch.no_grad():
        results = _Streaming(exported.graph_module, visit).run(*values)
    found = results if isinstance(results, (tuple, list)) else (results,)
    return [value for value in found if value is not None]


# Products of float16 on a CPU: torch has no fast kernels for them. Operands widened, summed in fp32 and rounded once is
# what tensor cores do, and what torch's slow kernels compute up to the order of summation.
_PRODUCTS = (
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.scaled_dot_product_attention.default,
)


class _Streaming(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, visit: Visit | None) -> None:
        super().__init__(module)
        self._visit = visit

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _PRODUCTS and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float16:
            wide = super().call_function(target, tree_map(_widened, args), tree_map(_widened, kwargs))
            return wide.to(torch.float16)
        return super().call_function(target, args, kwargs)

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if self._visit is not None and n.op != "output":
            self._visit(n, result)
        for used in self.user_to_last_uses.get(n, []):
            if used.op == "placeholder" and isinstance(self.env.get(used), torch.Tensor):
                release(self.env[used])
        return result


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float16 else value
