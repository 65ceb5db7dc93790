"""What is known of each place a model can be compiled for: one checked TOML file per target.

A target says which builder makes its engine, for which GPUs, and in which form the ONNX graph must come. Facts that
were never tried on the hardware itself stand under ``unconfirmed`` and are shown to the user as such. What a target
refuses is in ``_target_checks``.
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
from depthwire.runtime._target_checks import PLUGINS_SINCE, require_form, require_precision, version_of
from depthwire.runtime.footprint import EngineModel  # noqa: TC001 - pydantic reads the annotation
from depthwire.runtime.memory import MemoryModel  # noqa: TC001 - pydantic reads the annotation

if TYPE_CHECKING:
    from collections.abc import Sequence

# 10.1 was Jetson Thor's number under CUDA 12; CUDA 13 renamed the same chip 11.0.
_RENAMED = {"SM101": "SM110"}
_SPELLING = re.compile(
    r"(?:(?:sm|compute)[_ -]?)?(?:(?P<major>\d{1,2})\.(?P<minor>\d)|(?P<digits>\d{2,3}))", re.IGNORECASE
)


Precision = Literal["fp32", "fp16", "bf16", "int8", "int4-weights"]
CustomOps = Literal["function", "plugin", "kernels"]


class Variant(BaseModel):
    """What another JetPack changes on a board.

    Attributes:
        l4t: Release of Jetson Linux, such as ``39.2``.
        cuda: CUDA toolkit that comes with it.
        tensorrt: TensorRT that comes with it.
        tensorrt_range: As in ``Target``.
        strongly_typed: As in ``Target``.
        custom_ops: As in ``Target``.
        expand_functions: As in ``Target``.
        operators_missing: As in ``Target``.
        parser_opset: As in ``Target``.
        unconfirmed: As in ``Target``, beside the board's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    l4t: str
    cuda: str
    tensorrt: str
    tensorrt_range: tuple[str, str]
    strongly_typed: bool
    custom_ops: Literal["function", "plugin"]
    expand_functions: bool = False
    operators_missing: tuple[str, ...] = ()
    parser_opset: int | None = None
    unconfirmed: tuple[str, ...] = ()


class Target(BaseModel):
    """One target, as its TOML file states it.

    Attributes:
        name: Identifier on the command line.
        aliases: Shorter names for it.
        title: The hardware in words.
        builder: What makes the engine; ``onnxruntime`` runs ``model.onnx`` itself and builds nothing.
        builds_on: ``anywhere`` where the builder needs no GPU, ``device`` where the GPU that runs the engine must build
            it, ``None`` where nothing is built.
        tried: What Depthwire's own tests did: ``run``, ``built`` (and not run), or ``nothing``.
        compute_capabilities: NVIDIA compute capabilities that the builder can compile for, as ``SM86``; a board's own.
        default_compute_capabilities: Those that are compiled for when the user names none.
        refused_compute_capabilities: Real GPUs that this target cannot serve, with the reason.
        boards: Whole words, in lower case, of which one must occur in the device's own name: in ``compatible`` of the
            device tree for a Jetson module (``p3767-0004``), in the name that CUDA reports for other GPUs (``h100``).
        memory_bytes: Nominal memory for engine and activations, 10**9 bytes a GB; ``None`` where targets differ.
        memory_is_unified: Whether CPU and GPU share that memory, so that the system and the builder take from it.
        reserved_bytes: Assumed to be taken by the system, its carve-outs and the driver, before anything is loaded.
        context_bytes: Assumed size of the CUDA context and the builder's runtime.
        jetpack: JetPack release whose other facts these are; ``None`` for what is no Jetson.
        l4t: Release of Jetson Linux that comes with it, ``36.4``.
        cuda: CUDA toolkit that comes with it.
        tensorrt: Version of the builder that the facts are about, such as ``10.3``.
        tensorrt_range: Half-open range of builder versions for which the graph's form is right.
        strongly_typed: Whether the builder knows strongly typed networks alone; where not, a flag asks for them.
        precisions: Values of ``--precision`` that an engine for the target can have.
        precision_limits: Compute capabilities that have fewer of them.
        opset: Version of the ONNX operator set that the graph is exported with.
        parser_opset: Newest operator set that the builder's parser documents; ``None`` where it was not found.
        operators_missing: Standard operators that the parser does not know and the graph must not have, in function
            bodies neither.
        attention: ``op`` where the builder takes ONNX ``Attention`` nodes, ``decomposed`` where it must not see one.
        custom_ops: ``function`` where the builder expands function bodies, ``plugin`` where it also takes a plugin
            instead, ``kernels`` where Depthwire has kernels of its own and function bodies run without them.
        expand_functions: Whether function bodies must be put in place of their calls in the file. TensorRT before 10.8
            confuses a body's input with a value of the same name in the graph around it.
        topk_limit: Largest K of a ``TopK``, or ``None`` for no limit.
        dla: Why the deep learning accelerators are not used; empty where there are none.
        optimization_level: Builder level 0 to 5, or ``None`` for the builder's own default.
        workspace_bytes: Limit of the builder's workspace, or ``None`` for the builder's own default.
        power_modes: Names of the power modes of ``nvpmodel``, as far as they are known.
        memory: Prediction of the builder's peak memory, or ``None`` where nothing is built.
        engine: Prediction of an engine's size, or ``None`` where nothing is built.
        variants: Other JetPack releases of the board, by their version.
        notes: Facts worth knowing before a build.
        unconfirmed: Statements that were never tried on the hardware.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    aliases: tuple[str, ...] = ()
    title: str
    builder: Literal["tensorrt-rtx", "tensorrt", "onnxruntime"]
    builds_on: Literal["anywhere", "device"] | None = None
    tried: Literal["run", "built", "nothing"] = "nothing"
    compute_capabilities: tuple[str, ...] = ()
    default_compute_capabilities: tuple[str, ...] = ()
    refused_compute_capabilities: dict[str, str] = Field(default_factory=dict)
    boards: tuple[str, ...] = ()
    memory_bytes: int | None = Field(default=None, gt=0)
    memory_is_unified: bool = False
    reserved_bytes: int = Field(default=0, ge=0)
    context_bytes: int = Field(default=0, ge=0)
    jetpack: str | None = None
    l4t: str | None = None
    cuda: str | None = None
    tensorrt: str | None = None
    tensorrt_range: tuple[str, str] | None = None
    strongly_typed: bool = False
    precisions: tuple[Precision, ...]
    precision_limits: dict[str, tuple[Precision, ...]] = Field(default_factory=dict)
    opset: int = Field(ge=18)
    parser_opset: int | None = None
    operators_missing: tuple[str, ...] = ()
    attention: Literal["op", "decomposed"]
    custom_ops: CustomOps
    expand_functions: bool = False
    topk_limit: int | None = Field(default=None, gt=0)
    dla: str = ""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    workspace_bytes: int | None = Field(default=None, gt=0)
    power_modes: tuple[str, ...] = ()
    memory: MemoryModel | None = None
    engine: EngineModel | None = None
    variants: dict[str, Variant] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unconfirmed: tuple[str, ...] = ()

    @property
    def confirmed(self) -> bool:
        """Whether every statement of this target was tried on its hardware."""
        return not self.unconfirmed

    @property
    def jetpacks(self) -> tuple[str, ...]:
        """JetPack releases that there are facts of, the default one first."""
        return () if self.jetpack is None else (self.jetpack, *self.variants)

    def with_jetpack(self, version: str) -> Target:
        """Return the board under another JetPack.

        Args:
            version: Such as ``7.2``. A newer patch of a known release has that release's facts: ``6.2.1`` those of 6.2.

        Raises:
            UsageError: ``target.unknown-jetpack``.
        """
        parts = version.strip().split(".")
        known = [name for name in self.jetpacks if parts[: len(name.split("."))] == name.split(".")]
        if not known:
            raise UsageError(
                "target.unknown-jetpack",
                f"Nothing is known of target {self.name} under this JetPack"
                if self.jetpacks
                else f"Target {self.name} has no JetPack",
                at=f"target {self.name}",
                want=f"one of {', '.join(self.jetpacks)}" if self.jetpacks else "no --jetpack",
                got=repr(version),
                todo="Name a JetPack that the board can have, or leave the option out."
                if self.jetpacks
                else "Leave the option out.",
            )
        name = max(known, key=len)
        if name == self.jetpack:
            return self
        variant = self.variants[name]
        facts = variant.model_dump(exclude={"unconfirmed"})
        rest = {key: value for key, value in self.variants.items() if key != name}
        unconfirmed = (*self.unconfirmed, *variant.unconfirmed)
        return self.model_copy(update={**facts, "jetpack": name, "variants": rest, "unconfirmed": unconfirmed})

    def require_precision(self, precision: Precision, capabilities: Sequence[str] = ()) -> None:
        """Refuse a precision that an engine for this target cannot have; see ``_target_checks``."""
        require_precision(self, precision, capabilities)

    def require_form(self, form: Literal["function", "plugin"]) -> None:
        """Refuse a form of the custom operators that this target's builder does not take; see ``_target_checks``."""
        require_form(self, form)

    @model_validator(mode="after")
    def _defaults_are_supported(self) -> Target:
        unsupported = set(self.default_compute_capabilities) - set(self.compute_capabilities)
        both = set(self.refused_compute_capabilities) & set(self.compute_capabilities)
        if unsupported or both:
            raise ValueError(f"defaults that are not supported: {unsupported}; supported and refused: {both}")
        limited = set(self.precision_limits) - set(self.compute_capabilities)
        if limited:
            raise ValueError(f"precisions of compute capabilities that are not supported: {limited}")
        if (self.builds_on is None) != (self.builder == "onnxruntime"):
            raise ValueError(f"builder {self.builder} builds on {self.builds_on}")
        forms = [
            (self.custom_ops, self.tensorrt),
            *((each.custom_ops, each.tensorrt) for each in self.variants.values()),
        ]
        for custom_ops, version in forms:
            if custom_ops == "plugin" and version_of(version or "0") < PLUGINS_SINCE:
                raise ValueError(f"plugins in TensorRT {version}")
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


def load_target(name: str, jetpack: str | None = None) -> Target:
    """Return the target of this name or alias.

    Args:
        name: As in ``depthwire targets``.
        jetpack: JetPack of a Jetson board; its file's default when absent.

    Raises:
        UsageError: ``target.unknown``, with the nearest name, or ``target.unknown-jetpack``.
    """
    found = list_targets()
    targets = {target.name: target for target in found}
    targets.update({alias: target for target in found for alias in target.aliases})
    if name in targets:
        target = targets[name]
        return target if jetpack is None else target.with_jetpack(jetpack)
    near = difflib.get_close_matches(name.lower(), targets, n=1, cutoff=0.5)
    raise UsageError(
        "target.unknown",
        "There is no target of this name",
        at="target",
        want=f"one of {', '.join(target.name for target in found)}",
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
