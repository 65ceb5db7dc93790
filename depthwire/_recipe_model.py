"""The fields of a recipe: every choice behind one run, as YAML.

A command line is a recipe plus flags, and a flag wins over the file. The resolved recipe (every default filled in) is
kept in the manifest, so that ``depthwire verify`` can capture and rewrite the same model again. Relative paths mean
what they mean on the command line: they start from the current directory.

This module imports neither torch nor a back end: a bad recipe is refused before anything slow starts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from depthwire.errors import UsageError

Positive = Annotated[int, Field(gt=0)]
FilePath = Annotated[Path, Field(strict=False)]

_PARTITION = re.compile(r"full|(?:block|block-layers):[1-9][0-9]*")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def _attn_res(value: str | None) -> str | None:
    if value is None or value == "none":
        return None
    if _PARTITION.fullmatch(value) is None:
        raise PydanticCustomError("attn_res", "'full', 'block:N' or 'block-layers:K' with N, K >= 1")
    return value


def _capacity(value: object) -> object:
    """Check a capacity, or several with commas; YAML reads 0.5 as a number."""
    if value is None:
        return None
    from depthwire.route import parse_capacity

    text = str(value)
    for part in text.split(","):
        parse_capacity(part)
    return text


def _capability(value: object) -> object:
    """Spell a compute capability as the targets do; YAML reads 8.6 as a number."""
    from depthwire.runtime.target import parse_compute_capability

    try:
        return parse_compute_capability(f"{value:.1f}" if isinstance(value, float) else str(value))
    except UsageError as error:
        raise PydanticCustomError("compute_capability", "a compute capability such as SM86, sm_120 or 8.6") from error


def _size(value: object) -> object:
    """Read a number of bytes: an integer, or text such as ``4 GiB`` or ``512MB``."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    unit = "" if match is None else match[2].lower().removesuffix("b")
    if match is None or unit not in _UNITS:
        raise PydanticCustomError("size", "a number of bytes, such as 536870912, 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[unit])


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SourceOptions(_Strict):
    """What to capture, and the static shapes to capture it with."""

    reference: str | None = None
    """A Hugging Face directory or cached id, ``package.module:factory`` or a ``.pt2`` file."""
    task: Literal["causal-lm", "encoder", "vision"] | None = None
    """How to run the model; detected from its configuration when absent."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Weights are cast to it; as stored when absent."""
    revision: str | None = None
    """Commit of a cached hub snapshot."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model's directory."""
    batch: Positive = 1
    """Sequences (or images) per run."""
    seq_len: Positive | None = None
    """Tokens per sequence; the source's own default when absent."""
    image_size: Positive | None = None
    """Pixels per side of a vision model's input; the configuration's when absent."""
    padding: bool = False
    """Give a causal language model an ``attention_mask`` input, for padded and ragged batches."""
    checkpoint_map: str | None = None
    """How an AttnRes checkpoint calls its weights: ``kimi-k3``, ``fla``, ``paper`` or a YAML file."""


class RouteOptions(_Strict):
    """Which layers compute a share of the tokens only, and how these are chosen (``depthwire.route.RouteSpec``)."""

    parts: FilePath | None = None
    """``.safetensors`` with fitted routers, priors and thresholds; it holds the other fields but ``capacity``."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Draw untrained routers instead, to measure speed with."""
    layers: str | None = None
    """Routed layers, counted from 0: ``9,11,13``, ``8-20:2``, ``every:2`` or ``all``."""
    capacity: Annotated[str | None, BeforeValidator(_capacity)] = None
    """Share of the tokens that a routed layer computes, such as 0.5 or 50%; or one per layer, with commas."""
    capacities: Annotated[str | None, BeforeValidator(_capacity)] = None
    """Further capacities, such as ``12.5%,25%,100%``: a graph for each over the same weights; the first is that of
    ``model.onnx`` where ``capacity`` is absent and the parts hold none."""
    carry: bool | None = None
    """Return the counts of the running budgets (``route_states_out``), for the next chunk to start with."""
    unit: Literal["block", "attention", "mlp"] | None = None
    """What an unselected token skips (default ``block``: the whole layer)."""
    keys_values: Literal["selected", "all"] | None = None
    """Tokens that are keys and values of a routed attention (default ``selected``, which shrinks the K/V cache)."""
    rule: Literal["budget", "top-k"] | None = None
    """``budget``: causal, the default for causal language models; ``top-k`` of the sequence, the default for others."""
    score: Literal["linear", "mod", "surprise", "timescale"] | None = None
    """What ranks the tokens (default ``linear``)."""
    gate: Literal["one", "score", "sigmoid", "surprise"] | None = None
    """What a selected token's update is multiplied by (default ``one``)."""
    fallback: Literal["identity", "linear", "swiglu"] | None = None
    """What an unselected token's update is (default ``identity``: none)."""
    margin: Annotated[int, Field(ge=0)] | None = None
    """Tokens that a running budget grants beyond the share of those seen (default 1)."""
    window: Annotated[int, Field(ge=0)] | None = None
    """With ``top-k``, tokens per window that is selected from apart (default 0: the whole sequence)."""

    @property
    def enabled(self) -> bool:
        """Whether anything is routed."""
        return any(value is not None for value in self.model_dump().values())


class PrecisionOptions(_Strict):
    """In which dtypes the written graph computes (``docs/precision.md``)."""

    kind: Literal["fp32", "fp16", "bf16", "int8", "int4-weights"] = "fp32"
    """``fp32``: as captured. ``fp16``, ``bf16``: with islands of fp32. ``int8``, ``int4-weights``: linear layers are
    quantised, the rest computes in ``rest``."""
    rest: Literal["fp32", "fp16", "bf16"] | None = None
    """Dtype of what ``int8`` and ``int4-weights`` do not quantise; fp32 for ONNX Runtime, else fp16, when absent."""
    logits: Literal["same", "fp32"] = "same"
    """``fp32`` keeps the product behind the logits in fp32; ``same`` computes it as the others."""
    calibration: FilePath | None = None
    """Text to measure ranges on; absent: the windows of ``goldens.text`` behind those that are compared."""
    calibration_windows: Positive = 8
    """Windows to measure ranges on."""


class GoldenOptions(_Strict):
    """Inputs that the original model is run on; its outputs travel with the artefact."""

    count: Positive = 1
    """Windows that are stored with their outputs."""
    text: FilePath | None = None
    """Text for the windows (causal LMs and encoders); random inputs when neither it nor ``inputs`` is given."""
    inputs: FilePath | None = None
    """``.safetensors`` or ``.npz`` with one array per input, stacked along a new first axis for several windows."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the random inputs."""

    @model_validator(mode="after")
    def _one_origin(self) -> GoldenOptions:
        if self.text is not None and self.inputs is not None:
            raise PydanticCustomError("one_origin", "either 'text' or 'inputs', not both")
        return self


class VerifyOptions(_Strict):
    """How the written model is compared with the original."""

    enabled: bool = True
    """Whether ``convert`` verifies."""
    windows: Positive = 4
    """Windows to compare on; the first ones are those of the goldens."""


class QualityOptions(_Strict):
    """How much a routed model, or one of another precision, may lose against the original."""

    max_perplexity_increase: Annotated[float, Field(ge=0)] | None = None
    """Largest relative increase of the perplexity on the windows (0.05: 5 %); no limit when absent."""
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least share of positions with the same most likely token (0.995: 99.5 %); no limit when absent."""


class BuildOptions(_Strict):
    """How the engine is built."""

    enabled: bool = True
    """Whether ``convert`` builds an engine (targets that run the ONNX file itself have none)."""
    compute_capabilities: list[Annotated[str, BeforeValidator(_capability)]] | None = None
    """GPUs to build for (``SM86``, …); the target's own when absent."""
    workspace: Annotated[Positive, BeforeValidator(_size)] | None = None
    """Most scratch memory the engine may use, in bytes or as ``4GiB``; the builder's default when absent."""
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    """Builder effort, 0 to 5; the builder's default when absent."""
    check_memory: bool = True
    """Refuse a build that is predicted not to fit into memory."""
    route_inputs: bool = False
    """Thresholds, budgets and counts of a routed model become inputs of the engine instead of constants."""
    all_capacities: bool = False
    """One engine for every capacity of a routed model; its slots and tables become inputs."""
    strip_weights: bool = False
    """Leave the weights out of the engine; they are put back where it is loaded. Needs a GPU to build."""
    max_batch: Positive | None = None
    """The engine takes batches of 1 to this, tuned for it; the batch that was captured, alone, when absent."""


class Recipe(_Strict):
    """Everything that one run is made of."""

    source: SourceOptions = SourceOptions()
    attn_res: Annotated[str | None, AfterValidator(_attn_res)] = None
    """How sublayers are grouped into depth sources: ``full``, ``block:N``, ``block-layers:K``; absent: no rewrite."""
    correction: Literal["eps", "scale"] = "eps"
    """How the lift keeps each norm's epsilon exact: divide eps by n², or scale the read by n."""
    queries: FilePath | None = None
    """``.safetensors`` with trained depth queries; zero when absent, which preserves the function."""
    collapse_zero_queries: bool = False
    """Turn reads whose query is zero back into a plain residual stream."""
    schedule: Literal["auto", "single"] = "auto"
    """Let reads share passes over their sources where that moves fewer bytes (``auto``), or never (``single``)."""
    route: RouteOptions = RouteOptions()
    precision: PrecisionOptions = PrecisionOptions()
    target: str = "ort-cpu"
    """What the artefact is for; ``depthwire targets`` lists them."""
    opset: Annotated[int, Field(ge=18)] | None = None
    """ONNX opset; the target's when absent."""
    goldens: GoldenOptions = GoldenOptions()
    verify: VerifyOptions = VerifyOptions()
    quality: QualityOptions = QualityOptions()
    build: BuildOptions = BuildOptions()
    out: FilePath | None = None
    """Directory to write."""

    @model_validator(mode="after")
    def _queries_need_lift(self) -> Recipe:
        if self.queries is not None and self.attn_res is None:
            raise PydanticCustomError("queries_need_lift", "'attn_res' as well: queries belong to AttnRes reads")
        return self

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready values, every default filled in."""
        return self.model_dump(mode="json")
