"""``SelectTokens_L`` and ``SelectTokensBudget_L`` for ONNX.

    SelectTokens_L(score [B, T], valid [B, T], slots [K]) {window}                  -> index [B, K], taken [B, K]
    SelectTokensBudget_L(score, valid, threshold, budget [3], state [B, 2], slots)  -> index, taken, state_out

L = max(1, ceil(log2 T)) is in the name because the body unrolls prefix sums in L steps; see ``docs/routing_ops.md``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthwire.export.ops._base import (
    BOOL,
    DOMAIN,
    INT64,
    VERSION,
    WIDE_FLOATS,
    OnnxOperator,
    Type,
    parse,
    register_schema,
)
from depthwire.export.ops._token_body import budget_body, steps, top_k_body

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

_SCORE = Type("T", WIDE_FLOATS, "The dtype of the scores.")


@dataclass(frozen=True)
class SelectOnnx(OnnxOperator):
    """One of the two selections.

    Attributes:
        budget: The rule is the running budget.
    """

    budget: bool

    @property
    def torch_op(self) -> str:
        """The torch name."""
        return "depthwire::select_tokens_budget" if self.budget else "depthwire::select_tokens"

    @property
    def stem(self) -> str:
        """The ONNX name without L."""
        return "SelectTokensBudget" if self.budget else "SelectTokens"

    def translation(self) -> Callable[..., Any]:
        """Return the callable that emits the operator with its L."""

        def select_tokens(score: Any, valid: Any, slots: Any, window: int = 0) -> Any:
            return self._operator(score)(score, valid, slots, window=int(window))

        def select_tokens_budget(  # noqa: PLR0917 - the operator's signature
            score: Any, valid: Any, threshold: Any, budget: Any, state: Any, slots: Any
        ) -> Any:
            return self._operator(score)(score, valid, threshold, budget, state, slots)

        return select_tokens_budget if self.budget else select_tokens

    def _operator(self, score: Any) -> Any:
        from onnxscript.values import Opset

        name = f"{self.stem}_{steps(int(score.shape[1]))}"
        more = [("threshold", _SCORE), ("budget", INT64), ("state", INT64)] if self.budget else []
        register_schema(
            name,
            "Which tokens a routed block computes, in ascending order, by "
            + ("a causal running budget." if self.budget else "the highest scores."),
            inputs=[("score", _SCORE), ("valid", BOOL), *more, ("slots", INT64)],
            outputs=[("index", INT64), ("taken", BOOL), *([("state_out", INT64)] if self.budget else [])],
            ints=() if self.budget else ("window",),
        )
        return getattr(Opset(DOMAIN, VERSION), name)

    def handles(self, op_type: str) -> bool:
        """Tell whether an operator name is this selection, for any number of tokens."""
        return self._count(op_type) is not None

    def _count(self, op_type: str) -> int | None:
        match = re.fullmatch(rf"{self.stem}_(\d+)", op_type)
        return int(match[1]) if match else None

    def body(self, node: ir.Node, *, opset: int) -> ir.Function:
        """Return the body for the node's L."""
        import onnx_ir as ir

        count = self._count(node.op_type)
        if count is None:
            raise ValueError(node.op_type)
        score = node.inputs[0]
        double = score is not None and score.dtype == ir.DataType.DOUBLE
        make = budget_body if self.budget else top_k_body
        return parse(make(count, opset=opset, double=double))
