"""The learned parts of a routing: routers, priors and thresholds, in one safetensors file.

::

    layers.{i}.router.weight      [d]          linear, mod;  [2, d] for timescale: of x_t and of x_{t-1}
    layers.{i}.router.bias        []           linear
    layers.{i}.surprise.norm      [d]          gain of the prior's RMSNorm (eps: ``PRIOR_EPS``)
    layers.{i}.surprise.{gate,up} [d_i, d]     the prior, SwiGLU: down · (silu(gate · u) * (up · u))
    layers.{i}.surprise.down      [d, d_i]
    layers.{i}.surprise.criteria  [4]          log(o_ce + 1e-10), m_cu, beta_ce, beta_cu
    layers.{i}.fallback.weight    [d, d]       linear: update of an unselected token, from its normed state
    layers.{i}.fallback.bias      [d]
    layers.{i}.fallback.{gate,up,down}         swiglu
    layers.{i}.threshold          []           least score of a candidate under a running budget

All fp32. The file's metadata holds the specification, the hash of the parts, and the hash of the model that they were
fitted to; loading checks all three.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from depthwire.errors import UsageError
from depthwire.route import RouteSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT = 1
METADATA = "depthwire.route"
PRIOR_EPS = 1e-5
PRIOR_FACTOR = 16
"""Width of a drawn prior: d / 16, as in the published SDT."""


@dataclass(frozen=True)
class RouteParts:
    """A specification with its learned tensors.

    Attributes:
        spec: What is routed.
        tensors: See the module's docstring.
        model_sha256: ``weights_sha256`` of the model they belong to; ``None`` for parts that were drawn.
    """

    spec: RouteSpec
    tensors: Mapping[str, torch.Tensor]
    model_sha256: str | None = None

    def of(self, layer: int, name: str) -> torch.Tensor:
        """Return one part of one layer."""
        return self.tensors[f"layers.{layer}.{name}"]

    def check(self, width: int) -> None:
        """Raise UsageError unless exactly the parts that the specification needs are there, with their shapes."""
        wanted = part_shapes(self.spec, width, self._prior_widths())
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        wrong = [
            f"{name} {list(found[name]) if name in found else 'missing'}"
            for name, shape in wanted.items()
            if found.get(name) != shape
        ] + [f"{name} left over" for name in found if name not in wanted]
        wrong += [f"{name} {tensor.dtype}" for name, tensor in self.tensors.items() if tensor.dtype != torch.float32]
        wrong += [f"{name} not finite" for name, tensor in self.tensors.items() if not _finite(name, tensor)]
        if wrong:
            raise UsageError(
                "route.parts",
                "The parts do not fit the routing they are for",
                at="--route",
                want=f"{len(wanted)} fp32 tensors for layers {', '.join(map(str, self.spec.layers))} of width {width}",
                got="; ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""),
                todo="Fit the parts to this model, or name the layers that they were fitted for.",
            )

    def check_model(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Raise UsageError unless the parts were fitted to a model with these weights."""
        if self.model_sha256 is None:
            return
        found = weights_sha256(weights)
        if found != self.model_sha256:
            raise UsageError(
                "route.other-model",
                "The routing was fitted to another model",
                at="--route",
                want=f"a model with weights sha256 {self.model_sha256[:16]}…",
                got=f"{found[:16]}…",
                todo="Use the model (and --dtype) that the routers and priors were fitted to, or fit them again.",
            )

    def save(self, path: str | Path) -> None:
        """Write the file."""
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().float().contiguous().clone() for name, tensor in self.tensors.items()}
        head = {
            "format": FORMAT,
            "spec": self.spec.as_dict(),
            "model_sha256": self.model_sha256,
            "parts_sha256": weights_sha256(tensors),
        }
        save_file(tensors, str(path), metadata={METADATA: json.dumps(head, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> RouteParts:
        """Read and check the file.

        Raises:
            UsageError: ``route.file``: it is absent, no such file, of another format, or its hash differs.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise _file_error(path, f"{type(error).__name__}: {error}") from error
        try:
            head: dict[str, Any] = json.loads(metadata.get(METADATA, "null")) or {}
        except json.JSONDecodeError as error:
            raise _file_error(path, "metadata that is no JSON") from error
        if head.get("format") != FORMAT:
            raise _file_error(path, f"format {head.get('format')}, metadata {sorted(metadata)}")
        if head.get("parts_sha256") != weights_sha256(tensors):
            raise _file_error(path, "tensors whose hash is not the recorded one")
        return cls(RouteSpec.from_dict(head["spec"]), tensors, head.get("model_sha256"))

    def _prior_widths(self) -> dict[str, int]:
        """Return the inner widths of the SwiGLU parts, which the file itself decides."""
        gates = (name for name in self.tensors if name.endswith((".surprise.gate", ".fallback.gate")))
        return {name.removesuffix(".gate"): int(self.tensors[name].shape[0]) for name in gates}


def part_shapes(spec: RouteSpec, width: int, inner: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every part that a specification needs.

    Args:
        spec: What is routed.
        width: d.
        inner: Inner width of a SwiGLU part, by its stem (``layers.3.surprise``); d / 16, even, where absent.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    default = -(-width // PRIOR_FACTOR)
    default += default % 2
    for layer in spec.layers:
        stem = f"layers.{layer}"
        if spec.score == "surprise":
            hidden = (inner or {}).get(f"{stem}.surprise", default)
            shapes[f"{stem}.surprise.norm"] = (width,)
            shapes.update(_swiglu(f"{stem}.surprise", width, hidden))
            shapes[f"{stem}.surprise.criteria"] = (4,)
        else:
            shapes[f"{stem}.router.weight"] = (2, width) if spec.score == "timescale" else (width,)
            if spec.score == "linear":
                shapes[f"{stem}.router.bias"] = ()
        if spec.fallback == "linear":
            shapes[f"{stem}.fallback.weight"] = (width, width)
            shapes[f"{stem}.fallback.bias"] = (width,)
        elif spec.fallback == "swiglu":
            shapes.update(_swiglu(f"{stem}.fallback", width, (inner or {}).get(f"{stem}.fallback", default)))
        if spec.rule == "budget":
            shapes[f"{stem}.threshold"] = ()
    return shapes


def draw_parts(spec: RouteSpec, width: int, seed: int) -> RouteParts:
    """Return untrained parts: routers of unit variance, priors with N(0, 0.02²), thresholds in the middle.

    What is routed by them is as good as chance; they serve for measuring speed and for tests.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in part_shapes(spec, width).items():
        if name.endswith("router.weight"):
            tensors[name] = torch.randn(shape, generator=generator) * width**-0.5
        elif name.endswith("criteria"):
            # o_ce = 1.025, m_cu = 1.1, betas softplus(-0.3) and softplus(-0.6): the published initial values.
            tensors[name] = torch.tensor([0.024692613, 1.1, 0.554355, 0.437488])
        elif name.endswith("norm"):
            tensors[name] = torch.ones(shape)
        elif name.endswith("threshold"):
            middle = 1.386 if spec.score == "surprise" else 0.0  # 2 log 2: both criteria at zero
            tensors[name] = torch.tensor(middle)
        elif name.endswith("bias"):
            tensors[name] = torch.zeros(shape)
        else:
            tensors[name] = torch.randn(shape, generator=generator) * 0.02
    return RouteParts(spec, tensors)


def weights_sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """Return the hash of named tensors: names, dtypes, shapes and bytes, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _swiglu(stem: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.gate": (hidden, width), f"{stem}.up": (hidden, width), f"{stem}.down": (width, hidden)}


def _finite(name: str, tensor: torch.Tensor) -> bool:
    """A threshold may be minus infinity, which takes every valid token."""
    if name.endswith("threshold"):
        return not bool(tensor.isnan().any())
    return bool(tensor.isfinite().all())


def _file_error(path: str | Path, got: str) -> UsageError:
    return UsageError(
        "route.file",
        "The routing file cannot be read",
        at=str(path),
        want=f"a .safetensors file of routing parts, format {FORMAT}",
        got=got,
        todo="Write it with depthwire.RouteParts.save.",
    )
