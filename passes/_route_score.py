"""The nodes that score tokens, gate their updates and stand in for the updates that are not computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from depthwire.errors import PassError
from depthwire.passes._base import where
from depthwire.passes._match import aten, value
from depthwire.passes.analysis.routing_ops import SURPRISE
from depthwire.route_parts import PRIOR_EPS

if TYPE_CHECKING:
    from depthwire.passes._edit import GraphEditor
    from depthwire.passes.analysis.routed_units import Unit
    from depthwire.route_parts import RouteParts


@dataclass
class RouteScore:
    """Score, gate and fallback of one unit, in front of one node.

    Attributes:
        edit: The graph.
        parts: The learned parts.
        unit: The unit, in nodes of the original graph.
        valid: Which tokens are no padding, ``[B, T]`` bool.
        place: Before which node new ones are inserted.
    """

    edit: GraphEditor
    parts: RouteParts
    unit: Unit
    valid: torch.fx.Node
    place: torch.fx.Node
    _parameters: dict[str, torch.fx.Node] = field(default_factory=dict)

    def score(self) -> torch.fx.Node:
        """Return what ranks the tokens, ``[B, T]`` fp32 (fp64 in an fp64 model)."""
        spec, state = self.parts.spec, self.edit.copy_of(self.unit.state)
        if spec.score == "surprise":
            return self._surprise()
        if spec.score == "linear":
            logits = self._linear(self._wide(self._normed()), "router.weight", "router.bias")
            return self._call(aten.squeeze.dim, (logits, -1))
        logits = self._linear(self._wide(state), "router.weight")
        if spec.score == "mod":
            return self._call(aten.squeeze.dim, (logits, -1))
        return self._timescale(logits)

    def gate(self, score: torch.fx.Node) -> torch.fx.Node | None:
        """Return the factor on the selected tokens' updates, ``[B, K, 1]``, of their gathered scores ``[B, K]``."""
        kind = self.parts.spec.gate
        if kind == "one":
            return None
        if kind == "sigmoid":
            score = self._call(aten.sigmoid.default, (score,))
        elif kind == "surprise":  # the rank is -log(1 - g)
            score = self._call(aten.rsub.Scalar, (self._call(aten.exp.default, (self._negated(score),)), 1))
        return self._call(aten.unsqueeze.default, (self._narrow(score), -1))

    def fallback(self) -> torch.fx.Node | None:
        """Return the updates of the tokens that are not selected, ``[B, T, d]``; ``None`` if they get none."""
        kind = self.parts.spec.fallback
        if kind == "identity":
            return None
        normed = self._normed()
        if kind == "linear":
            return self._linear(normed, "fallback.weight", "fallback.bias", dtype=self._dtype)
        return self._swiglu(normed, "fallback", self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = value(self.unit.state).dtype
        return dtype

    @property
    def _compute(self) -> torch.dtype:
        """Scores are fp32 (fp64) whatever the model's dtype: a rank is decided by its last digits."""
        return torch.promote_types(self._dtype, torch.float32)

    def _normed(self) -> torch.fx.Node:
        if self.unit.normed is None:
            raise PassError(
                "route.structure",
                "The model's structure cannot be routed",
                at=where(self.unit.state),
                want="a routed unit that reads the stream through a norm, whose output the router and the prior see",
                got="no norm",
                todo="Use --route-score mod, which scores the stream itself, and --route-fallback identity.",
            )
        return self.edit.copy_of(self.unit.normed)

    def _surprise(self) -> torch.fx.Node:
        if self.unit.updated is None or not self.unit.residual:
            raise PassError(
                "route.surprise",
                "The surprise of a layer cannot be measured",
                at=self.unit.module,
                want="a layer before the routed one, in a model with a plain residual stream",
                got="the first layer" if self.unit.residual else "AttnRes sources",
                todo="Route later layers, or use another --route-score.",
            )
        before, after = map(self.edit.copy_of, self.unit.updated)
        delta = self._call(aten.sub.Tensor, (after, before))
        gain = self._parameter("surprise.norm", self._dtype)
        normed = self._call(aten.rms_norm.default, (before, [value(before).shape[-1]], gain, PRIOR_EPS))
        prior = self._swiglu(normed, "surprise", self._dtype)
        criteria = self._parameter("surprise.criteria", torch.float32)
        window = self.parts.spec.surprise_window
        return self._call(SURPRISE, (delta, prior, criteria, self.valid, window))

    def _timescale(self, logits: torch.fx.Node) -> torch.fx.Node:
        """Return w_1 · x_t + w_2 · x_{t-1}; before the first valid token there is nothing."""
        own, last = (self._call(aten.select.int, (logits, 2, index)) for index in (0, 1))
        valid = self._cast(self.valid, self._compute)
        last = self._call(aten.mul.Tensor, (last, valid))
        batch, tokens = (int(size) for size in value(last).shape)
        shifted = self._call(aten.slice.Tensor, (last, 1, 0, tokens - 1))
        first = self._call(aten.full.default, ([batch, 1], 0.0), {"dtype": self._compute})
        return self._call(aten.add.Tensor, (own, self._call(aten.cat.default, ([first, shifted], 1))))

    def _swiglu(self, normed: torch.fx.Node, stem: str, dtype: torch.dtype) -> torch.fx.Node:
        gate = self._call(aten.silu.default, (self._linear(normed, f"{stem}.gate", dtype=dtype),))
        up = self._linear(normed, f"{stem}.up", dtype=dtype)
        return self._linear(self._call(aten.mul.Tensor, (gate, up)), f"{stem}.down", dtype=dtype)

    def _linear(
        self, operand: torch.fx.Node, weight: str, bias: str | None = None, *, dtype: torch.dtype | None = None
    ) -> torch.fx.Node:
        dtype = self._compute if dtype is None else dtype
        names = [weight] if bias is None else [weight, bias]
        return self._call(aten.linear.default, (operand, *(self._parameter(name, dtype) for name in names)))

    def _parameter(self, name: str, dtype: torch.dtype) -> torch.fx.Node:
        """Return a part as a parameter of the program: a vector of weights as the one row of a matrix."""
        if name not in self._parameters:
            tensor = self.parts.of(self.unit.layer, name).to(dtype)
            if name in ("router.weight", "router.bias") and tensor.dim() < 2:
                tensor = tensor.unsqueeze(0)
            self._parameters[name] = self.edit.add_parameter(f"route.{self.unit.layer}.{name}", tensor.clone())
        return self._parameters[name]

    def _wide(self, node: torch.fx.Node) -> torch.fx.Node:
        return self._cast(node, self._compute)

    def _narrow(self, node: torch.fx.Node) -> torch.fx.Node:
        return self._cast(node, self._dtype)

    def _cast(self, node: torch.fx.Node, dtype: torch.dtype) -> torch.fx.Node:
        if value(node).dtype == dtype:
            return node
        return self._call(aten._to_copy.default, (node,), {"dtype": dtype})

    def _negated(self, node: torch.fx.Node) -> torch.fx.Node:
        return self._call(aten.neg.default, (node,))

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> torch.fx.Node:
        return self.edit.call(target, args, kwargs, before=self.place, like=self.unit.anchor)
