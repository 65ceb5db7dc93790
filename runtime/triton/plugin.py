"""The operators of a model as TensorRT plugins that were compiled ahead of time.

``write_plugins`` writes what the device imports and what TensorRT embeds into the engine; ``write_plugin_model`` the
ONNX file that calls for it. TensorRT's parser looks for a plugin only under the namespace that a node's attribute
``plugin_namespace`` names, and from 10.15 on takes a node's function body unless it has that attribute. So the plugin
form is a file of its own, with the same graph, bodies and weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from depthwire.errors import BuildError, UsageError
from depthwire.runtime._target_checks import PLUGINS_SINCE
from depthwire.runtime.triton.compile import capability_of, require_triton
from depthwire.runtime.triton.plugin_operators import NAMESPACE, Operator, plugin_operators, tactics_of, variants_of
from depthwire.runtime.triton.plugin_ptx import PluginCode, plugin_code

if TYPE_CHECKING:
    from onnx import ModelProto

    from depthwire.runtime.triton.compile import Spec

INDEX: Final = "plugins.json"
MODULE: Final = "depthwire_plugins.py"


@dataclass(frozen=True)
class PluginEntry:
    """One variant of a plugin with one of its launches (TensorRT: tactics).

    Attributes:
        op_type: Name of the operator and of the plugin.
        variant: Its number, which nodes have as an attribute.
        tactic: Number of the launch, from 1; TensorRT times them and takes the fastest.
        key: Of the kernel.
        parameters: Names of all that TensorRT passes, in its order.
        file: Name of the kernel's file in the folder.
        sha256: Of the file.
        form: ``ptx`` or ``cubin``.
        symbol: Name of the kernel in it.
        threads: Of a block.
        shared: Bytes of dynamic shared memory.
        registers: Of a thread.
        spills: Bytes spilled by a thread: 0.
    """

    op_type: str
    variant: int
    tactic: int
    key: str
    parameters: tuple[str, ...]
    file: str
    sha256: str
    form: Literal["ptx", "cubin"]
    symbol: str
    threads: int
    shared: int
    registers: int
    spills: int


def write_plugins(model: Path, capability: str, folder: Path, *, tensorrt: str) -> list[PluginEntry]:
    """Write a model's operators as TensorRT plugins, to a folder that appears only when it is whole.

    The folder holds ``depthwire_plugins.py``, to be imported on the device before the parser runs, ``plugins.json``
    that it reads, and one file a kernel.

    Args:
        model: The ONNX file, of either form.
        capability: Compute capability of the device, in any usual spelling.
        folder: Where to; replaced if it holds earlier plugins.
        tensorrt: Version of the device's TensorRT.

    Returns:
        What was written, operator by operator.

    Raises:
        UsageError: ``plugin.tensorrt-version``; ``triton.no-operators``; as ``capability_of`` and
            ``plugin_operators``.
        BuildError: ``triton.missing``; ``plugin.not-plugins`` if the folder exists and holds something else; as
            ``plugin_operators`` and ``plugin_code``.
    """
    import onnx

    require_version(tensorrt)
    capability = capability_of(capability)
    require_triton()
    if folder.exists() and not (folder / INDEX).is_file():
        raise BuildError(
            "plugin.not-plugins",
            "The folder for the plugins holds something else",
            at=str(folder),
            want=f"no folder yet, or one with {INDEX}",
            got="another folder",
            todo="Name another folder, or remove this one.",
        )
    operators = [operator for _, operator in plugin_operators(onnx.load(str(model), load_external_data=False))]
    if not operators:
        raise UsageError(
            "triton.no-operators",
            "The model has no depth-attention or routing operators to make plugins of",
            at=str(model),
            want="nodes AttnRes…, SelectTokens… and the like of domain depthwire",
            got="none",
            todo="Make the bundle with the form 'function'; a plain residual stream needs no plugins.",
        )
    variants = variants_of(operators)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        fresh = Path(temporary) / "plugins"
        fresh.mkdir()
        plans = {name: [_tactics(each, capability) for each in found] for name, found in variants.items()}
        codes = {code.spec.key: code for found in plans.values() for plan in found for _, code in plan}
        for code in codes.values():
            (fresh / _file(code)).write_bytes(code.code)
        index = {
            "schema_version": 1,
            "namespace": NAMESPACE,
            "tensorrt": tensorrt,
            "tensorrt_minimum": ".".join(map(str, PLUGINS_SINCE)),
            "compute_capability": capability,
            "nodes": len(operators),
            "operators": {
                name: operator_json([[operator for operator, _ in plan] for plan in found])
                for name, found in plans.items()
            },
            "kernels": {key: _kernel_json(code) for key, code in codes.items()},
        }
        (fresh / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(Path(__file__).parent.parent / "deploy" / MODULE, fresh / MODULE)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    return [
        _entry(place, tactic, operator, code)
        for found in plans.values()
        for place, plan in enumerate(found)
        for tactic, (operator, code) in enumerate(plan, start=1)
    ]


def write_plugin_model(model: Path, out: Path) -> int:
    """Write the plugin form of an ONNX file: every custom operator names its plugin and the variant of it.

    Weights outside the file stay where they are: ``out`` must lie beside the same files as ``model``.

    Args:
        model: The file, of either form.
        out: Where to.

    Returns:
        The number of operators.

    Raises:
        BuildError, UsageError: As ``plugin_operators``.
    """
    import onnx

    loaded = onnx.load(str(model), load_external_data=False)
    count = to_plugin_form(loaded)
    onnx.save(loaded, str(out))
    return count


def to_plugin_form(model: ModelProto) -> int:
    """Change a model to the plugin form in place; see ``write_plugin_model``."""
    from onnx import helper

    found = plugin_operators(model)
    variants = variants_of([operator for _, operator in found])
    for node, operator in found:
        places = {each.identity: place for place, each in enumerate(variants[operator.op_type])}
        added = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "variant": places[operator.identity]}
        kept = [attribute for attribute in node.attribute if attribute.name not in added]
        node.ClearField("attribute")
        node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in added.items())])
        # A plugin has all its outputs: the parser counts those that have a name.
        for place, name in enumerate(operator.outputs):
            if place == len(node.output):
                node.output.append("")
            node.output[place] = node.output[place] or f"{node.output[0]}/{name}"
    return len(found)


def require_version(tensorrt: str) -> None:
    """Refuse a TensorRT without ahead-of-time plugins.

    Raises:
        UsageError: ``plugin.tensorrt-version``: older than 10.9, TensorRT-RTX, or not a version.
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", tensorrt)[:2])
    if len(numbers) < 2 or numbers < PLUGINS_SINCE:
        since = ".".join(map(str, PLUGINS_SINCE))
        raise UsageError(
            "plugin.tensorrt-version",
            "This TensorRT takes no plugins that were compiled ahead of time",
            at="tensorrt",
            want=f"TensorRT {since} or later; TensorRT-RTX, whose versions begin with 1, has none",
            got=tensorrt or "no version",
            todo="Use the form 'function', or a JetPack with a newer TensorRT.",
        )


@functools.lru_cache(maxsize=512)
def _code(spec: Spec, capability: str, parameters: tuple[str, ...]) -> PluginCode:
    return plugin_code(spec, capability, parameters)


def _code_or_none(spec: Spec, capability: str, parameters: tuple[str, ...]) -> PluginCode | None:
    try:
        return _code(spec, capability, parameters)
    except BuildError as error:
        if error.code == "plugin.resources":
            return None
        raise


def _tactics(operator: Operator, capability: str) -> list[tuple[Operator, PluginCode]]:
    """Compile the ways to launch an operator; those that do not fit the GPU are left out, but not the first."""
    first, *others = tactics_of(operator)
    fitting = ((other, _code_or_none(other.spec, capability, other.parameters)) for other in others)
    return [
        (first, _code(first.spec, capability, first.parameters)),
        *((other, code) for other, code in fitting if code is not None),
    ]


def _file(code: PluginCode) -> str:
    return f"{code.spec.key}-{code.capability.lower()}.{code.form}"


def operator_json(variants: list[list[Operator]]) -> dict[str, Any]:
    """Return what ``plugins.json`` says of one operator, each of whose variants has one or more launches."""
    first = variants[0][0]
    return {
        "inputs": list(first.inputs),
        "arguments": {name: extent.as_json() for name, extent in first.arguments.items()},
        "outputs": {name: [extent.as_json() for extent in shape] for name, shape in first.outputs.items()},
        "variants": [
            {
                "dtypes": tactics[0].dtypes,
                "tactics": [{"kernel": each.spec.key, "grid": _grid_json(each)} for each in tactics],
            }
            for tactics in variants
        ],
    }


def _grid_json(operator: Operator) -> list[Any]:
    return [factor if isinstance(factor, int) else factor.as_json() for factor in operator.grid]


def _kernel_json(code: PluginCode) -> dict[str, Any]:
    return {
        "file": _file(code),
        "sha256": hashlib.sha256(code.code).hexdigest(),
        "form": code.form,
        "symbol": code.symbol,
        "parameters": list(code.parameters),
        "threads": code.threads,
        "shared": code.shared,
        "registers": code.registers,
        "spills": code.spills,
        "spec": {"class": type(code.spec).__name__, **asdict(code.spec)},
    }


def _entry(variant: int, tactic: int, operator: Operator, code: PluginCode) -> PluginEntry:
    return PluginEntry(
        op_type=operator.op_type,
        variant=variant,
        tactic=tactic,
        key=code.spec.key,
        parameters=code.parameters,
        file=_file(code),
        sha256=hashlib.sha256(code.code).hexdigest(),
        form=code.form,
        symbol=code.symbol,
        threads=code.threads,
        shared=code.shared,
        registers=code.registers,
        spills=code.spills,
    )
