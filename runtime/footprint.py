"""How large an engine will be, and what it will need in memory to be built, loaded and run: predicted, not measured.

**Engine.** A file of weights and kernels::

    engine = weights + base + per_product * products + per_call * calls

``products`` counts the matrix products outside function bodies (each brings kernels of its own), ``calls`` the calls of
function bodies (depth-attention reads, token selections). Both are smaller for half precision, a call larger for its
casts. The coefficients of ``targets/rtx.toml`` are fitted, by least squares of the relative error, to TensorRT-RTX
1.7.1.116 building for SM86 on Linux x86-64; weights and engines in bytes:

===============================================  ===========  ========  =====  ===========  =====
model (float32 unless said)                          weights  products  calls       engine  ratio
===============================================  ===========  ========  =====  ===========  =====
1 norm, 1 product of 32                                4,224         1      0      296,244   1.00
1 norm, 1 product of 1024                          4,198,400         1      0    4,497,268   1.00
4 layers x 256                                    25,239,612        37      0   26,808,044   1.00
4 layers x 256, float16                           12,619,834        37      0   13,644,124   1.00
8 layers x 384                                   100,163,644        73      0  102,899,212   1.00
8 layers x 384, float16                           50,081,850        73      0   51,723,924   1.00
16 layers x 128                                   18,907,196       145      0   23,960,684   1.00
12 layers x 512                                  266,977,340       109      0  270,876,460   1.00
8 AttnRes layers x 128, blocks of 2                4,881,584        73     17   11,136,188   1.03
8 AttnRes layers x 128, blocks of 2, float16       2,448,300        73     17    9,681,532   0.99
6 AttnRes layers x 128, full, float16              1,857,452        55     14    8,300,028   0.92
12 AttnRes layers x 256, full                     52,484,160       109     28   61,331,804   1.03
Mixture of Depths, small                           3,708,576        58     15    9,798,020   0.96
Mixture of Depths, small, float16                  1,857,948        58     15    7,426,180   1.08
*held out*
16 layers x 128, float16                           9,453,626       145      0   12,327,692   1.05
32 layers x 64                                     9,494,588       289      0   19,194,852   1.00
12 layers x 512, float16                         133,488,698       109      0  135,747,716   1.00
6 layers x 768                                   423,202,876        55      0  425,355,100   1.00
8 AttnRes layers x 128, blocks of 2, bfloat16      2,448,300        73     17    9,653,644   0.99
8 AttnRes layers x 128, blocks of 2, int8          1,289,446        73     17    9,390,052   0.89
8 AttnRes layers x 128, blocks of 2, int4          1,004,972        73     17    9,131,836   0.89
6 AttnRes layers x 128, full                       3,699,888        55     14    8,917,180   1.01
12 AttnRes layers x 256, blocks of 3              52,475,968       109     26   61,071,356   1.02
16 AttnRes layers x 384, float16                  50,383,276       145     34   63,725,892   1.01
6 AttnRes layers x 512, full                      99,848,368        55     14  105,249,612   1.00
Subjective Depth, small                            3,745,480        64     18   11,025,596   0.94
Subjective Depth, small, float16                   1,875,652        64     18    8,898,212   1.02
Subjective Timescale, small                        3,710,168        58     15    9,115,764   1.03
Subjective Timescale, small, float16               1,859,540        58     15    6,998,204   1.15
SmolLM2-135M, 8 AttnRes blocks, 512 tokens       538,697,648       271     65  562,384,084   1.00
===============================================  ===========  ========  =====  ===========  =====

What was held out is off by at most 7 % where the engine is larger than 10 MB, and by 15 % where it is smaller; but for
half-precision models narrower than 128, whose products are cheaper than this: 32 layers x 64 in float16 took 6.1 MB,
not the 11.5 MB predicted. A second and third GPU, or another one, change some kilobytes. Engines of other builders were
not measured; the same coefficients stand in for theirs.

**Run time.** ::

    run     = engine + activations + inputs and outputs + context
    loading = run + engine                                           (where CPU and GPU share the memory)

``activations`` is the peak of a liveness analysis over the ONNX graph with its static shapes
(``_onnx_memory.peak``), with the size of a floating-point element that the precision has. It is an upper estimate: a
builder fuses, and then some of these values never exist. ``context`` is what the CUDA context and the builder's runtime
take, an assumption of the target's file. While a file is deserialised it is in memory twice.

**Build.** ``runtime.memory`` for the builder's process. Where the engine is built on the device, the tactics that are
timed need the workspace, the activations and a context beside it.

**Fits.** On a board the system and its carve-outs (``reserved_bytes``, an assumption) come first; loading and building
must fit into what is left. A GPU with memory of its own must hold the engine that runs, and the weights, workspace and
activations of the build.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from depthwire.errors import BuildError
from depthwire.runtime._onnx_memory import ModelFacts, read_model
from depthwire.runtime.memory import gigabytes

if TYPE_CHECKING:
    from depthwire.runtime.target import Precision, Target

__all__ = [
    "EngineModel",
    "Footprint",
    "ModelFacts",
    "footprint",
    "own_precision",
    "problems",
    "read_model",
    "require_fits",
]

INT4_BLOCK = 64
"""Weights that share a scale in int4-weights."""
EIGHT_BIT_SHARE = 0.5
"""Largest share of the linear weights that int4-weights gives 8 bits; what is predicted has all of it."""

_FLOAT32, _HALF = 4, 2


class EngineModel(BaseModel):
    """Coefficients of an engine's size; see the module's text for the formula.

    Attributes:
        base_bytes: An engine with nothing in it.
        bytes_per_product: For each matrix product outside function bodies: float32, then half precision.
        bytes_per_call: For each call of a function body, likewise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_bytes: int = Field(ge=0)
    bytes_per_product: tuple[int, int]
    bytes_per_call: tuple[int, int]

    def predict(self, *, weight_bytes: int, products: int, calls: int, half: bool) -> int:
        """Return the predicted size of an engine in bytes."""
        kind = int(half)
        return (
            weight_bytes + self.base_bytes + self.bytes_per_product[kind] * products + self.bytes_per_call[kind] * calls
        )


@dataclass(frozen=True)
class Footprint:
    """What one graph takes in one precision on one target, in bytes; ``None`` where nothing is built.

    Attributes:
        precision: The precision.
        own: Whether the graph has it; else the graph would have to be converted again.
        weight_bytes: Weights, embeddings among them.
        embedding_bytes: Embeddings and an output head, which keep the floating-point type.
        engine_bytes: Predicted size of the engine.
        activation_bytes: Most that values take at once.
        interface_bytes: Inputs and outputs.
        context_bytes: CUDA context and the builder's runtime, as the target assumes.
        run_bytes: All of this together.
        loading_bytes: Most while the engine is loaded.
        build_bytes: Peak of the builder's process and, on a device that shares its memory, of what it times.
        build_device_bytes: What the build needs of a GPU with memory of its own.
        peak_at: The node at which activations are largest.
    """

    precision: Precision
    own: bool
    weight_bytes: int
    embedding_bytes: int
    engine_bytes: int | None
    activation_bytes: int
    interface_bytes: int
    context_bytes: int
    run_bytes: int
    loading_bytes: int
    build_bytes: int | None
    build_device_bytes: int | None
    peak_at: str

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Problem:
    """Why a graph cannot run, or not be built, on a target.

    Attributes:
        code: Of the error that ``require_fits`` raises for it.
        what: One sentence.
        at: Layer or step.
        want: The limit.
        got: What the graph needs.
        todo: What helps.
    """

    code: str
    what: str
    at: str
    want: str
    got: str
    todo: str

    def __str__(self) -> str:
        return f"{self.what} ({self.got}; {self.want})"


def own_precision(facts: ModelFacts) -> Precision:
    """Return the precision that a graph has, by what its linear weights are stored in."""
    weights = facts.weights
    bits = 8 * weights.linear_stored / weights.linear if weights.linear else 8 * facts.floating
    # Between two precisions lie graphs of which a few weights were left alone.
    if bits < 6:
        return "int4-weights"
    if bits < 12:
        return "int8"
    if bits > 24:
        return "fp32"
    return "bf16" if facts.brain else "fp16"


def weight_bytes(facts: ModelFacts, precision: Precision, rest: int) -> int:
    """Return the bytes of a graph's weights in a precision.

    Args:
        facts: The graph.
        precision: The precision.
        rest: Bytes of an element of what is not quantised: 4 or 2.
    """
    weights = facts.weights
    four, eight = 1 - EIGHT_BIT_SHARE, EIGHT_BIT_SHARE
    scales = weights.linear * four / INT4_BLOCK + weights.channels * eight
    linear = {
        "fp32": _FLOAT32 * weights.linear,
        "fp16": _HALF * weights.linear,
        "bf16": _HALF * weights.linear,
        "int8": weights.linear + rest * weights.channels,
        "int4-weights": round(weights.linear * (four / 2 + eight) + rest * scales),
    }[precision]
    return linear + rest * (weights.embedding + weights.rest) + weights.fixed


def footprint(facts: ModelFacts, target: Target, precision: Precision | None = None) -> Footprint:
    """Predict what a graph takes on a target.

    Args:
        facts: The graph, from ``read_model``.
        target: Where it is to run.
        precision: Another precision than the graph's own: what it would be if the model were converted again. What int8
            and int4-weights do not quantise is then in half precision, for ONNX Runtime in float32, as by ``convert``.
    """
    own = own_precision(facts)
    chosen = own if precision is None else precision
    wide = chosen == "fp32" or (chosen in {"int8", "int4-weights"} and target.builder == "onnxruntime")
    floating = facts.floating if chosen == own else _FLOAT32 if wide else _HALF
    bytes_of_weights = facts.weights.stored if chosen == own else weight_bytes(facts, chosen, floating)
    activations, peak_at = facts.peaks[0 if chosen == own else floating]
    engine = build = on_gpu = None
    if target.engine is not None:
        engine = target.engine.predict(
            weight_bytes=bytes_of_weights,
            products=facts.graph.products,
            calls=facts.calls,
            half=floating < _FLOAT32,
        )
    if target.memory is not None:
        build = target.memory.predict(
            weight_bytes=bytes_of_weights, products=facts.graph.products, nodes=facts.graph.nodes
        )
        if target.builds_on == "device":
            timed = (target.workspace_bytes or 0) + activations + facts.interface + target.context_bytes
            build, on_gpu = (build + timed, None) if target.memory_is_unified else (build, bytes_of_weights + timed)
    run = (engine or bytes_of_weights) + activations + facts.interface + target.context_bytes
    return Footprint(
        precision=chosen,
        own=chosen == own,
        weight_bytes=bytes_of_weights,
        embedding_bytes=facts.weights.embedding * floating,
        engine_bytes=engine,
        activation_bytes=activations,
        interface_bytes=facts.interface,
        context_bytes=target.context_bytes,
        run_bytes=run,
        loading_bytes=run + (engine or 0) if target.memory_is_unified else run,
        build_bytes=build,
        build_device_bytes=on_gpu,
        peak_at=peak_at,
    )


def problems(target: Target, facts: ModelFacts, needs: Footprint) -> list[Problem]:
    """Return why a graph does not fit a target: selections, then memory; nothing where it does."""
    return [*_wide_selections(target, facts), *_memory(target, facts, needs)]


def require_fits(target: Target, facts: ModelFacts) -> Footprint:
    """Refuse a graph that breaks a limit of a target.

    Args:
        target: Where the engine is to be built and run.
        facts: The graph, from ``read_model``.

    Returns:
        What it is predicted to take.

    Raises:
        BuildError: ``target.topk-limit`` or ``target.memory-limit``.
    """
    needs = footprint(facts, target)
    for problem in problems(target, facts, needs):
        raise BuildError(
            problem.code, problem.what, at=problem.at, want=problem.want, got=problem.got, todo=problem.todo
        )
    return needs


def _wide_selections(target: Target, facts: ModelFacts) -> list[Problem]:
    limit = target.topk_limit
    if limit is None:
        return []
    return [
        Problem(
            "target.topk-limit",
            f"A layer selects more than TopK of target {target.name} returns",
            f"{facts.path.name}: {each.node}" + (f" (module {each.module})" if each.module else ""),
            f"K of at most {limit}",
            f"the best {each.k} of {each.of}",
            "Route with --route-rule budget, which needs no TopK, select in windows with --route-window, or convert a "
            "shorter sequence.",
        )
        for each in facts.selections
        if each.k > limit
    ]


def _memory(target: Target, facts: ModelFacts, needs: Footprint) -> list[Problem]:
    if target.memory_bytes is None:
        return []
    room = target.memory_bytes - target.reserved_bytes
    total, taken = gigabytes(target.memory_bytes), gigabytes(target.reserved_bytes)
    weights, values = gigabytes(needs.weight_bytes), gigabytes(needs.activation_bytes)
    shared = target.memory_is_unified
    steps = {
        "Building": needs.build_bytes if shared else needs.build_device_bytes,
        "Loading": needs.loading_bytes if shared else None,
        "Running": needs.run_bytes,
    }
    return [
        Problem(
            "target.memory-limit",
            f"{step} the engine needs more memory than target {target.name} has",
            f"{facts.path.name}: {weights} of weights, {values} of values at {needs.peak_at or 'no node'}",
            f"at most {gigabytes(room)}: {total} less {taken} for the system",
            f"about {gigabytes(count)}",
            "Convert in a narrower precision or for a shorter sequence, or choose a board with more memory: "
            "'depthwire plan' shows what each would take.",
        )
        for step, count in steps.items()
        if count is not None and count > room
    ]
