"""Asks the plugins of a folder what TensorRT's builder would, and prints one JSON object a node.

NVIDIA's own ``tensorrt.plugin`` runs: it checks and registers the plugins, creates each, and calls their functions.
What is not TensorRT's is below it: TensorRT-RTX's bindings give the data types and the plugin registry, and a stand-in
takes the part of the builder in C++, with expressions of dimensions that are evaluated afterwards for several shapes::

    python -m tests.runtime.triton.plugin_builder VERSION FOLDER < requests

VERSION is that of ``.cache/tensorrt-python``; a request is ``{"op_type", "variant", "shapes"}``, the last a list of
shapes of all inputs.
"""

from __future__ import annotations

import enum
import hashlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

PYTHON = ROOT / ".cache" / "tensorrt-python"
Shapes = list[list[int]]


class Expression:
    """A number that depends on the shapes of the inputs, as ``IDimensionExpr`` does."""

    def __init__(self, value: Callable[[Shapes], int]) -> None:
        self.value = value

    def is_constant(self) -> bool:
        """Say that nothing is known: every dimension is dynamic."""
        return False


class Builder:
    """``IExprBuilder``."""

    def constant(self, value: int) -> Expression:
        """Return a number."""
        return Expression(lambda _: value)

    def operation(self, operation: Any, first: Expression, second: Expression) -> Expression:
        """Return the result of an operation on two numbers."""
        compute: dict[str, Callable[[int, int], int]] = {
            "SUM": lambda a, b: a + b,
            "PROD": lambda a, b: a * b,
            "CEIL_DIV": lambda a, b: -(-a // b),
        }
        return Expression(lambda shapes: compute[operation.name](first.value(shapes), second.value(shapes)))


class Request(enum.IntEnum):
    """``QuickPluginCreationRequest``."""

    UNKNOWN = 0
    PREFER_JIT = 1
    PREFER_AOT = 2
    STRICT_JIT = 3
    STRICT_AOT = 4


class AotBuild:
    """``IPluginV3QuickAOTBuild``, an interface without code."""


class SymExpr:
    """``ISymExpr``, one too."""


class Setter(dict[int, Any]):
    """``ISymExprs``: where the extra arguments go."""

    nbSymExprs = 0  # noqa: N815 - TensorRT's name


def tensorrt(version: str) -> Any:
    """Make ``import tensorrt`` and ``import tensorrt.plugin`` work, and return the first."""
    import tensorrt_rtx

    module: Any = types.ModuleType("tensorrt")
    module.__path__ = [str(PYTHON / version / "tensorrt_bindings")]
    for name in dir(tensorrt_rtx):
        if not name.startswith("__") and name != "plugin":
            setattr(module, name, getattr(tensorrt_rtx, name))
    module.__version__ = f"{version}.0"
    module.QuickPluginCreationRequest = Request
    module.IPluginV3QuickAOTBuild, module.ISymExpr = AotBuild, SymExpr
    module.IDimensionExpr, module.DimsExprs = Expression, lambda length: [None] * length
    sys.modules["tensorrt"] = module
    return module


def load(folder: Path) -> Any:
    """Import the module that is shipped, from where it lies."""
    spec = importlib.util.spec_from_file_location("depthwire_plugins", folder / "depthwire_plugins.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def described(trt: Any, dtype: Any, rank: int) -> Any:
    """Return what the builder says of an operand whose dimensions are all dynamic."""
    found = trt.DynamicPluginTensorDesc()
    plain = trt.PluginTensorDesc()
    plain.dims, plain.type, plain.format = (-1,) * rank, dtype, trt.TensorFormat.LINEAR
    found.desc, found.min, found.opt, found.max = plain, *(trt.Dims((size,) * rank) for size in (1, 2, 4))
    return found


def asked(trt: Any, operator: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Go through what the builder does with one node."""
    op_type, dtypes = request["op_type"], operator["variants"][request["variant"]]["dtypes"]
    named = {"FP32": "FLOAT", "FP16": "HALF"}
    types_of = [getattr(trt.DataType, named.get(dtypes[name], dtypes[name])) for name in operator["inputs"]]
    ranks = [len(shape) for shape in request["shapes"][0]]
    creator = trt.get_plugin_registry().get_creator(op_type, "1", "depthwire")
    # The parser passes an attribute that is an integer as an int32 field of length 1.
    variant = trt.PluginField("variant", np.array([request["variant"]], np.int32), trt.PluginFieldType.INT32)
    fields = trt.PluginFieldCollection([variant])
    plugin = creator.create_plugin(op_type, "depthwire", fields, trt.TensorRTPhase.BUILD, Request.PREFER_AOT)
    assert type(plugin).__name__ == "_TemplateAOTPlugin"
    found = list(plugin.get_output_data_types(types_of, ranks))
    assert len(found) == plugin.get_num_outputs()
    inputs = [
        [Expression(lambda shapes, i=i, j=j: shapes[i][j]) for j in range(rank)]  # type: ignore[misc]
        for i, rank in enumerate(ranks)
    ]
    outputs = plugin.get_output_shapes(inputs, [], Builder())
    operands = [
        described(trt, kind, len(dims)) for kind, dims in zip([*types_of, *found], [*inputs, *outputs], strict=True)
    ]
    combinations = plugin.get_supported_format_combinations(operands, len(inputs))
    assert len(combinations) == len(operands)  # one combination
    plugin.configure_plugin(operands[: len(inputs)], operands[len(inputs) :])
    launches = []
    for tactic in plugin.get_valid_tactics():
        plugin.set_tactic(tactic)
        params, extra = types.SimpleNamespace(), Setter()
        plugin.get_launch_params(inputs, operands, len(inputs), params, extra, Builder())
        descs = [operand.desc for operand in operands]
        symbol, code = plugin.get_kernel(descs[: len(inputs)], descs[len(inputs) :])
        assert extra.nbSymExprs == len(extra)
        assert all(expression.dtype == trt.PluginArgDataType.INT32 for expression in extra.values())
        launches += [
            {
                "tactic": tactic,
                "symbol": symbol,
                "sha256": hashlib.sha256(code).hexdigest(),
                **{name: value.expr.value(shapes) for name, value in vars(params).items()},
                "arguments": [extra[place].expr.value(shapes) for place in range(len(extra))],
                "outputs": [[dim.value(shapes) for dim in dims] for dims in outputs],
            }
            for shapes in request["shapes"]
        ]
    return {
        "types": [kind.name for kind in (*types_of, *found)],
        "combination": [kind.type.name for kind in combinations],
        "layouts": sorted({kind.format.name for kind in combinations}),
        "launches": launches,
    }


def main() -> None:
    """Answer the requests of standard input."""
    version, folder = sys.argv[1], Path(sys.argv[2])
    trt = tensorrt(version)
    module = load(folder)
    assert module.register(folder) is module.PLUGINS  # once only
    for request in json.load(sys.stdin):
        operator = module.PLUGINS.index["operators"][request["op_type"]]
        sys.stdout.write(json.dumps(asked(trt, operator, request)) + "\n")


if __name__ == "__main__":
    main()
