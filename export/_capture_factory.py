"""``package.module:factory`` and plain modules."""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from depthwire.errors import CaptureError, DepthwireError, UsageError
from depthwire.export._hf_program import hf_program, is_transformers_model
from depthwire.export._options import DTYPES, CaptureOptions
from depthwire.export._torch_export import export_module
from depthwire.export._transformers import quiet
from depthwire.program import Program, Source, SourceKind

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_SHAPE_OPTIONS = ("batch", "seq_len", "image_size", "task", "padding")


def capture_factory(reference: str, options: CaptureOptions) -> Program:
    """Call ``package.module:factory``, which returns a module, or a module and its example inputs.

    Raises:
        CaptureError: It cannot be imported or called, or returns something else.
        UsageError: An option has no effect on the module.
    """
    options.refuse("package.module:factory", ("revision", "trust_remote_code"), "The factory loads the model itself.")
    with _working_directory_importable():
        return _from_factory(reference, options)


def _from_factory(reference: str, options: CaptureOptions) -> Program:
    module, inputs = _unpack(reference, _call(reference))
    if inputs is not None:
        if options.example_inputs is not None:
            raise UsageError(
                "capture.example-inputs",
                "the factory returns example inputs of its own",
                at=reference,
                want="example inputs from one place",
                got="example_inputs besides the factory's",
            )
        options = _with_inputs(options, reference, inputs)
    if options.dtype is not None:
        dtype = DTYPES[options.dtype]
        module = module.to(dtype)
        options = CaptureOptions(**{**vars(options), "dtype": None, "example_inputs": _cast(options, dtype)})
    return _program(module, options, "factory", reference)


def capture_module(module: nn.Module, options: CaptureOptions) -> Program:
    """Capture a module that the caller holds; it is left unchanged.

    Raises:
        CaptureError: There are no example inputs, or the module cannot be exported.
        UsageError: An option has no effect on the module.
    """
    options.refuse("an nn.Module", ("dtype", "revision", "trust_remote_code"), "Convert the module itself first.")
    return _program(module, options, "module", f"{type(module).__module__}.{type(module).__qualname__}")


def _program(module: nn.Module, options: CaptureOptions, kind: SourceKind, reference: str) -> Program:
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(
            "capture.export-refused",
            "a TorchScript module has no Python forward to export",
            at=reference,
            want="an nn.Module",
            got=type(module).__name__,
            todo="Capture the module that was scripted.",
        )
    if is_transformers_model(module):
        with quiet():
            exported, task, inputs, names = hf_program(module, options)
        return Program(exported, Source(kind, reference, task=task, model=type(module).__name__), inputs, names)
    options.refuse("a plain nn.Module", _SHAPE_OPTIONS, "The example inputs fix the sizes.")
    if options.example_inputs is None:
        raise CaptureError(
            "capture.no-example-inputs",
            "a plain nn.Module needs example inputs, which fix the shapes",
            at=reference,
            want="(module, example_inputs) from a factory, or capture(module, example_inputs=…)",
            got="a module alone",
            todo="Return a mapping from the names of forward's parameters to tensors beside the module.",
        )
    exported, names = export_module(module, options.example_inputs)
    source = Source(kind, reference, model=type(module).__name__)
    return Program(exported, source, example_by_name(exported), names)


def example_by_name(exported: ExportedProgram) -> dict[str, Tensor]:
    """Return the example inputs that a program carries, by the names of its inputs."""
    names = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.target is None]
    return dict(zip(names, tree_leaves(exported.example_inputs), strict=True))


def _call(reference: str) -> Any:
    module_name, _, path = reference.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:
        raise _failed("capture.factory-import", reference, f"{module_name!r} cannot be imported", error) from error
    try:
        target = operator.attrgetter(path)(target)
    except AttributeError as error:
        raise _failed("capture.factory-import", reference, f"{module_name!r} has no {path!r}", error) from error
    if not callable(target):
        raise CaptureError(
            "capture.factory-not-callable",
            f"{reference} is not a function",
            at=reference,
            want="a callable without arguments that returns an nn.Module or (module, example_inputs)",
            got=type(target).__name__,
            todo="Name a function or class.",
        )
    try:
        return target()
    except DepthwireError:
        raise
    except Exception as error:
        raise _failed("capture.factory-failed", reference, f"{reference} raised an exception", error) from error


def _failed(code: str, reference: str, what: str, error: Exception) -> CaptureError:
    lines = str(error).splitlines()
    return CaptureError(
        code,
        what,
        at=reference,
        want="package.module:factory, importable from the working directory, called without arguments",
        got=f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": "),
        todo="Run it in Python: from package.module import factory; factory().",
    )


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Put the working directory first on the path, as ``python -m`` does, for as long as the factory runs."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _unpack(reference: str, returned: Any) -> tuple[nn.Module, Any]:
    if isinstance(returned, nn.Module):
        return returned, None
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], nn.Module):
        return returned[0], returned[1]
    got = type(returned).__name__
    if isinstance(returned, tuple):
        got = f"({', '.join(type(item).__name__ for item in returned)})"
    raise CaptureError(
        "capture.factory-return",
        f"{reference} does not return a model",
        at=reference,
        want="nn.Module, or (nn.Module, example_inputs)",
        got=got,
        todo="Return the module, and beside it a mapping from names to tensors or a tuple of tensors.",
    )


def _with_inputs(options: CaptureOptions, reference: str, inputs: Any) -> CaptureOptions:
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    options = CaptureOptions(**{**vars(options), "example_inputs": inputs})
    try:
        options.check()
    except UsageError as error:
        raise CaptureError(
            "capture.factory-return", error.what, at=reference, want=error.want, got=error.got, todo=error.todo
        ) from error
    return options


def _cast(options: CaptureOptions, dtype: torch.dtype) -> Any:
    """Give floating example inputs the dtype of the module."""

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.dtype.is_floating_point else value

    inputs = options.example_inputs
    if inputs is None:
        return None
    if isinstance(inputs, Mapping):
        return {name: cast(value) for name, value in inputs.items()}
    return tuple(cast(value) for value in inputs)
