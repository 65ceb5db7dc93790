"""Depthwire's operators as TensorRT plugins whose kernels are compiled already.

Importing this file registers every operator that ``plugins.json`` beside it lists; import it before the ONNX file is
parsed. It needs ``tensorrt`` 10.9 or later and numpy, nothing else. The kernels go into the engine: what runs the
engine needs neither this file nor Python.

    import tensorrt as trt
    import depthwire_plugins

    network = builder.create_network(depthwire_plugins.network_flags())
    ...parse...
    depthwire_plugins.check(network)
"""

# No ``from __future__ import annotations``: tensorrt.plugin reads the annotations of what it registers as objects.
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import numpy.typing as npt
import tensorrt as trt
import tensorrt.plugin as trtp

MINIMUM = (10, 9)
"""TensorRT with ``tensorrt.plugin.aot_impl``."""

_VARIANT = npt.NDArray[np.int32]
_CODE = Union[str, bytes]  # noqa: UP007 - tensorrt.plugin up to 10.x looks for typing.Union
_REGISTERED: dict[str, "Plugins"] = {}


class PluginError(RuntimeError):
    """The plugins do not fit this TensorRT, or their files are not whole."""


class Plugins:
    """The operators of one ``plugins.json``.

    Attributes:
        folder: Where it lies.
        index: What it says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, Any] = json.loads((folder / "plugins.json").read_text(encoding="utf-8"))
        if self.index["schema_version"] != 1:
            raise PluginError(f"plugins.json has schema version {self.index['schema_version']}, not 1")
        self._code: dict[str, _CODE] = {name: self._read(kernel) for name, kernel in self.index["kernels"].items()}

    def _read(self, kernel: dict[str, Any]) -> _CODE:
        code = (self.folder / kernel["file"]).read_bytes()
        found = hashlib.sha256(code).hexdigest()
        if found != kernel["sha256"]:
            raise PluginError(f"{kernel['file']} has sha256 {found}, not {kernel['sha256']}")
        return str(code, "ascii") if kernel["form"] == "ptx" else code

    def register(self) -> None:
        """Make all operators known to TensorRT."""
        for name, operator in self.index["operators"].items():
            _register(f"{self.index['namespace']}::{name}", operator, self)

    def kernel(self, name: str) -> tuple[dict[str, Any], _CODE]:
        """Return what is known of a kernel, and its code."""
        return self.index["kernels"][name], self._code[name]


def register(folder: str | Path | None = None) -> Plugins:
    """Register the operators of a folder, by default this file's, once.

    Raises:
        PluginError: This TensorRT is too old, or a file is not the one that is listed.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:2])
    if version < MINIMUM:
        raise PluginError(f"TensorRT {trt.__version__} has no ahead-of-time plugins; 10.9 is the first that has")
    place = Path(folder or Path(__file__).parent).resolve()
    if str(place) not in _REGISTERED:
        plugins = Plugins(place)
        plugins.register()
        _REGISTERED[str(place)] = plugins
    return _REGISTERED[str(place)]


def network_flags() -> int:
    """Return the flags of a network for these plugins: strongly typed, and plugins ahead of time."""
    flags = trt.NetworkDefinitionCreationFlag
    aot = 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
    # TensorRT 11 has no other networks than strongly typed ones, and may no longer name them.
    return aot | (1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)


def check(network: trt.INetworkDefinition, folder: str | Path | None = None) -> int:
    """Return how many layers are plugins, after checking that no operator was built from its body instead.

    Raises:
        PluginError: There are fewer than the file has operators.
    """
    wanted = int(register(folder).index["nodes"])
    layers = (network.get_layer(place) for place in range(network.num_layers))
    found = int(sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers))
    if found < wanted:
        raise PluginError(f"{wanted} operators are to be plugins, but the network has {found} plugin layers")
    return found


def _register(plugin: str, operator: dict[str, Any], plugins: Plugins) -> None:
    """Register one operator: its shapes, its dtypes and tactics, and its kernels."""
    inputs, outputs, variants = operator["inputs"], operator["outputs"], operator["variants"]

    def describe(*descs: trtp.TensorDesc, **attributes: npt.NDArray[np.int32]) -> tuple[trtp.TensorDesc, ...]:
        names = dict(zip(inputs, descs, strict=True))
        dtypes = variants[_number(attributes["variant"])]["dtypes"]
        return tuple(
            trtp.from_shape_expr(_dims(shape, names), _data_type(dtypes[name])) for name, shape in outputs.items()
        )

    def tune(*arguments: Any) -> list[trtp.AutoTuneCombination]:
        variant = variants[_number(arguments[len(inputs)])]
        types = ", ".join(variant["dtypes"][name] for name in (*inputs, *outputs))
        return [trtp.AutoTuneCombination(types, "LINEAR", list(range(1, 1 + len(variant["tactics"]))))]

    def launch(*arguments: Any) -> tuple[_CODE, _CODE, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        names = dict(zip(inputs, arguments[: len(inputs)], strict=True))
        # Without a choice TensorRT names tactic 0.
        tactic = variants[_number(arguments[len(inputs)])]["tactics"][max(0, int(arguments[-1]) - 1)]
        kernel, code = plugins.kernel(tactic["kernel"])
        params = trtp.KernelLaunchParams()
        params.grid_x = _product(tactic["grid"], names)
        params.block_x = kernel["threads"]
        params.shared_mem = kernel["shared"]
        extra = trtp.SymIntExprs(len(operator["arguments"]))
        for place, extent in enumerate(operator["arguments"].values()):
            extra[place] = trtp.SymInt32(_product([extent], names))
        return kernel["symbol"], code, params, extra

    result: Any = tuple.__class_getitem__((trtp.TensorDesc,) * len(outputs))
    emitted = tuple[_CODE, _CODE, trtp.KernelLaunchParams, trtp.SymIntExprs]
    descs = [(name, trtp.TensorDesc) for name in inputs]
    trtp.register(plugin)(_signed(describe, [*descs, ("variant", _VARIANT)], result))
    tuned = [*descs, ("variant", _VARIANT), ("outputs", result)]
    trtp.autotune(plugin)(_signed(tune, tuned, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(plugin)(_signed(launch, [*tuned, ("tactic", int)], emitted))


def _signed(function: Callable[..., Any], parameters: Sequence[tuple[str, Any]], result: Any) -> Callable[..., Any]:
    """Give a function the signature by which tensorrt.plugin knows its operands."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters],
        return_annotation=result,
    )
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _number(variant: npt.NDArray[np.int32]) -> int:
    return int(np.asarray(variant).reshape(-1)[0])


def _data_type(name: str) -> trt.DataType:
    known = {"FP32": "FLOAT", "FP16": "HALF"}
    found: trt.DataType = getattr(trt.DataType, known.get(name, name))
    return found


def _dims(shape: Sequence[dict[str, Any]], descs: dict[str, Any]) -> tuple[trtp.ShapeExpr, ...]:
    """Return the dimensions that a shape is put together from."""
    found: list[trtp.ShapeExpr] = []
    for extent in shape:
        every = list(descs[extent["of"]].shape_expr)
        found += every[slice(*extent["dims"])]
    return tuple(found)


def _product(factors: Sequence[Any], descs: dict[str, Any]) -> trtp.ShapeExpr:
    """Return a number as an expression of dimensions."""
    result = trtp.ShapeExpr(math.prod(factor for factor in factors if isinstance(factor, int)))
    for extent in factors:
        if isinstance(extent, int):
            continue
        part = trtp.ShapeExpr(1)
        for dim in _dims([extent], descs):
            part = part * dim
        result = result * (trtp.cdiv(part, extent["per"]) if extent["per"] > 1 else part)
    return result


PLUGINS = register()
