"""What is known of each place a model can be compiled for: one checked TOML file per target.

A target says which builder makes its engine, for which GPUs, and in which form the ONNX graph must come. Facts that
were never tried on the hardware itself stand under ``unconfirmed`` and are shown to the user as such.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import re
import sys
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from depthwire.errors import InternalError, UsageError
from depthwire.runtime.memory import MemoryModel  # noqa: TC001 - pydantic reads the annotation

if TYPE_CHECKING:
    from collections.abc import Sequence

# 10.1 was Jetson Thor's number under CUDA 12; CUDA 13 renamed the same chip 11.0.
_RENAMED = {"SM101": "SM110"}
_SPELLING = re.compile(
    r"(?:(?:sm|compute)[_ -]?)?(?:(?P<major>\d{1,2})\.(?P<minor>\d)|(?P<digits>\d{2,3}))", re.IGNORECASE
)


class Target(BaseModel):
    """One target, as its TOML file states it.

    Attributes:
        name: Identifier on the command line.
        title: The hardware in words.
        builder: What makes the engine; ``onnxruntime`` runs ``model.onnx`` itself and builds nothing.
        status: ``implemented``, or ``planned`` while its builder does not exist.
        compute_capabilities: NVIDIA compute capabilities that the builder can compile for, as ``SM86``.
        default_compute_capabilities: Those that are compiled for when the user names none.
        refused_compute_capabilities: Real GPUs that this target cannot serve, with the reason.
        opset: Version of the ONNX operator set that the graph is exported with.
        attention: ``op`` where the builder takes ONNX ``Attention`` nodes, ``decomposed`` where it must not see one.
        custom_ops: ``function`` where the builder expands function bodies, ``plugin`` where it wants a plugin,
            ``kernels`` where Depthwire has kernels of its own and function bodies run without them.
        optimization_level: Builder level 0 to 5, or ``None`` for the builder's own default.
        workspace_bytes: Limit of the builder's workspace, or ``None`` for the builder's own default.
        memory: Prediction of the builder's peak memory, or ``None`` where it was never measured.
        notes: Facts worth knowing before a build.
        unconfirmed: Statements that were never tried on the hardware.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    title: str
    builder: Literal["tensorrt-rtx", "tensorrt", "onnxruntime"]
    status: Literal["implemented", "planned"]
    compute_capabilities: tuple[str, ...] = ()
    default_compute_capabilities: tuple[str, ...] = ()
    refused_compute_capabilities: dict[str, str] = Field(default_factory=dict)
    opset: int = Field(ge=18)
    attention: Literal["op", "decomposed"]
    custom_ops: Literal["function", "plugin", "kernels"]
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    workspace_bytes: int | None = Field(default=None, gt=0)
    memory: MemoryModel | None = None
    notes: tuple[str, ...] = ()
    unconfirmed: tuple[str, ...] = ()

    @property
    def confirmed(self) -> bool:
        """Whether every statement of this target was tried on its hardware."""
        return not self.unconfirmed

    @model_validator(mode="after")
    def _defaults_are_supported(self) -> Target:
        unsupported = set(self.default_compute_capabilities) - set(self.compute_capabilities)
        both = set(self.refused_compute_capabilities) & set(self.compute_capabilities)
        if unsupported or both:
            raise ValueError(f"defaults that are not supported: {unsupported}; supported and refused: {both}")
        return self

    def resolve_compute_capabilities(self, requested: Sequence[str] | None) -> tuple[str, ...]:
        """Return the compute capabilities to compile for, in ascending order and without repetition.

        Args:
            requested: User spellings (``SM86``, ``sm_86``, ``8.6``, ``86``), or ``None`` for the target's default.

        Raises:
            UsageError: ``target.bad-compute-capability``, ``target.compute-capability-unsupported``, or
                ``target.no-compute-capability`` for an empty request.
        """
        if requested is None:
            return self.default_compute_capabilities
        wanted = {parse_compute_capability(text): text for text in requested}
        for capability, text in wanted.items():
            if capability not in self.compute_capabilities:
                raise self._unsupported(capability, text)
        if not wanted and self.compute_capabilities:
            raise UsageError(
                "target.no-compute-capability",
                "No compute capability was named to build for",
                at=f"target {self.name}",
                want=f"at least one of {', '.join(self.compute_capabilities)}",
                got="an empty list",
                todo=f"Name one, or leave the option out for {', '.join(self.default_compute_capabilities)}.",
            )
        return tuple(sorted(wanted, key=lambda capability: int(capability[2:])))

    def _unsupported(self, capability: str, text: str) -> UsageError:
        reason = self.refused_compute_capabilities.get(capability)
        return UsageError(
            "target.compute-capability-unsupported",
            reason or f"Target {self.name} cannot build for {capability}",
            at=f"target {self.name}",
            want=f"one of {', '.join(self.compute_capabilities)}" if self.compute_capabilities else "none",
            got=capability if capability == text else f"{capability} (written {text!r})",
            todo="Leave it out, or choose the target that serves this GPU: 'depthwire targets' lists them.",
        )


def parse_compute_capability(text: str) -> str:
    """Return a compute capability as ``SM86``, whichever of the usual spellings it came in.

    Args:
        text: ``SM86``, ``sm_86``, ``compute_86``, ``8.6`` or ``86``; ``10.1`` means Jetson Thor and gives ``SM110``.

    Raises:
        UsageError: ``target.bad-compute-capability``.
    """
    match = _SPELLING.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            "target.bad-compute-capability",
            "This is not a compute capability",
            at="compute capability",
            want="a spelling such as SM86, sm_86, 8.6 or 86",
            got=repr(text),
            todo="Look up the GPU's compute capability in NVIDIA's list of CUDA GPUs.",
        )
    digits = match["digits"] or f"{match['major']}{match['minor']}"
    name = f"SM{int(digits)}"
    return _RENAMED.get(name, name)


def list_targets() -> list[Target]:
    """Return every target, ordered by name."""
    folder = importlib.resources.files("depthwire.runtime.targets")
    files = sorted((item for item in folder.iterdir() if item.name.endswith(".toml")), key=lambda item: item.name)
    return [_read(item.name, item.read_text(encoding="utf-8")) for item in files]


def load_target(name: str) -> Target:
    """Return the target of this name.

    Raises:
        UsageError: ``target.unknown``, with the nearest name.
    """
    targets = {target.name: target for target in list_targets()}
    if name in targets:
        return targets[name]
    near = difflib.get_close_matches(name.lower(), targets, n=1, cutoff=0.5)
    raise UsageError(
        "target.unknown",
        "There is no target of this name",
        at="target",
        want=f"one of {', '.join(targets)}",
        got=repr(name),
        todo=(f"Did you mean {near[0]!r}? " if near else "") + "'depthwire targets' describes them.",
    )


def _read(file: str, text: str) -> Target:
    # tomllib came with Python 3.11; tomli is the same parser for 3.10.
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        target = Target.model_validate(toml.loads(text))
    except (ValidationError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    if f"{target.name}.toml" != file:
        raise _damaged(file, f"it names itself {target.name!r}")
    return target


def _damaged(file: str, got: str) -> InternalError:
    return InternalError(
        "target.bad-file",
        "A target file of this installation is damaged",
        at=f"depthwire/runtime/targets/{file}",
        want="the fields of depthwire.runtime.target.Target",
        got=got,
        todo="Install Depthwire again; if it stays, report it.",
    )
