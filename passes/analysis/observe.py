"""Running a program node by node, with somebody watching: for goldens, ranges and the statistics of quantisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind

from depthwire._mapped import release

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


class _Streaming(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, visit: Visit | None) -> None:
        super().__init__(module)
        self._visit = visit

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if self._visit is not None and n.op != "output":
            self._visit(n, result)
        for used in self.user_to_last_uses.get(n, []):
            if used.op == "placeholder" and isinstance(self.env.get(used), torch.Tensor):
                release(self.env[used])
        return result
