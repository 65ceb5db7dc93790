"""One way through ``torch.export`` for every source: flat tensor outputs, static shapes, no mutation, named errors.

A module is exported through a *view*: an instance of a subclass made on the spot, which shares the module's
parameters and submodules and overrides ``forward`` alone. So weights keep their own names (a wrapping module would
put its attribute's name before each), and the user's object is left as it was.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from depthwire._logs import logs_disabled
from depthwire.errors import CaptureError, DepthwireError, UsageError
from depthwire.export._outputs import distinct, named_tensors
from depthwire.export._refusal import export_refused

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

    from depthwire.export._options import ExampleInputs

Select = Callable[[Any], Any]

_GRAD_REGION = "wrap_with_set_grad_enabled"


def export_module(
    module: nn.Module,
    inputs: ExampleInputs,
    *,
    fixed: Mapping[str, object] | None = None,
    select: Select | None = None,
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Export a module in eval mode, without gradients, with the static shapes of its example inputs.

    Args:
        module: Left unchanged, its training flags included.
        inputs: Tensors by parameter name of ``forward``, or in its order.
        fixed: Further keyword arguments of ``forward``. When given, the inputs must be a mapping, and the names in it
            are the whole signature of the exported program.
        select: Picks from what ``forward`` returns; the tensors in the result, at any depth, are the outputs.

    Returns:
        The functional program and one name per output: dictionary keys and field names, else ``output_<i>``.

    Raises:
        UsageError: The inputs do not fit ``forward``.
        CaptureError: ``torch.export`` refuses the module, or its outputs, shapes or mutations cannot be compiled.
    """
    args, kwargs, signature = _bind(module, inputs, narrowed=fixed is not None)
    names: list[str] = []
    view = _view(module, signature, fixed or {}, select, names)
    with _eval_mode(module):
        view.training = False
        exported = _export(view, args, kwargs, grad=False)
        if any(str(node.target) == _GRAD_REGION for node in exported.graph.nodes):
            # torch 2.13 cannot functionalise a region that enables gradients inside a program that has none.
            exported = _export(view, args, kwargs, grad=True)
        exported = functional(exported)
    require_static(exported)
    return exported, tuple(names)


def _export(view: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], *, grad: bool) -> ExportedProgram:
    try:
        # torch logs a traceback for each failure that it also raises.
        with torch.set_grad_enabled(grad), logs_disabled(logging.CRITICAL):
            return torch.export.export(view, args, kwargs, strict=False)
    except DepthwireError:
        raise
    except Exception as error:
        raise export_refused(error, view) from error


def functional(exported: ExportedProgram) -> ExportedProgram:
    """Return the program without in-place operators and without nested graphs (autocast and no-grad regions).

    ``run_decompositions({})`` decomposes nothing but functionalises; it costs seconds on a real model, so a program
    that is functional already is returned as it is.

    Raises:
        CaptureError: The functional program would write to a buffer, a parameter or an input.
    """
    if any(_is_mutable(node) or node.op == "get_attr" for node in exported.graph.nodes):
        try:
            with warnings.catch_warnings(), logs_disabled(logging.CRITICAL):
                # torch 2.13 deep-copies its own deprecated pytree leaves here.
                warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
                exported = exported.run_decompositions({})
        except Exception as error:
            raise export_refused(error, None) from error
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                "capture.mutates-state",
                "forward writes to a tensor that outlives the call, which a compiled graph cannot do",
                at=spec.target or spec.arg.name,
                want="a forward that only reads its parameters, buffers and inputs",
                got=spec.kind.name.lower().replace("_", " "),
                todo="Return the new value as an output, or drop the update in eval mode (if self.training: …).",
            )
    return exported


def require_static(exported: ExportedProgram) -> None:
    """Refuse symbolic shapes, and inputs or outputs that are not tensors.

    Raises:
        CaptureError: ``capture.dynamic-shapes`` or ``capture.non-tensor``.
    """
    if exported.range_constraints:
        symbols = ", ".join(str(symbol) for symbol in exported.range_constraints)
        raise CaptureError(
            "capture.dynamic-shapes",
            "the program has shapes that are known only when it runs",
            at=_first_symbolic(exported),
            want="static shapes",
            got=f"symbolic sizes {symbols}",
            todo="Export without dynamic_shapes, and replace operations whose output size depends on values "
            "(nonzero, boolean masks, unique) by torch.where or a static top-k. To compute some of the tokens: "
            "index = scores.topk(k, dim=1).indices.sort(dim=1).values.unsqueeze(-1).expand(-1, -1, width); "
            "out = x.scatter(1, index, block(x.gather(1, index))).",
        )
    arguments = [(spec.arg, "input") for spec in exported.graph_signature.input_specs if _is_user(spec.kind)]
    arguments += [(spec.arg, "output") for spec in exported.graph_signature.output_specs if _is_user(spec.kind)]
    for argument, side in arguments:
        if isinstance(argument, ConstantArgument):
            raise CaptureError(
                "capture.non-tensor",
                f"an {side} of the program is not a tensor",
                at=argument.name or side,
                want="tensors only",
                got=repr(argument.value),
                todo="Bind or drop it in a wrapping module and export again.",
            )


def _is_user(kind: InputKind | OutputKind) -> bool:
    return kind in (InputKind.USER_INPUT, OutputKind.USER_OUTPUT)


def _first_symbolic(exported: ExportedProgram) -> str | None:
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
            return str(node.name)
    return None


def _is_mutable(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _bind(
    module: nn.Module, inputs: ExampleInputs, *, narrowed: bool
) -> tuple[tuple[Tensor, ...], dict[str, Tensor], inspect.Signature]:
    """Split the inputs into positional and keyword ones, in the order of the signature."""
    if "forward" in vars(module):
        raise UsageError(
            "capture.patched-forward",
            "forward is replaced on the instance, so the class does not say what the model computes",
            at=type(module).__name__,
            want="forward defined by the class",
            got="an instance attribute 'forward'",
            todo="Define the replacement as a method of a subclass or of a wrapping module.",
        )
    signature = inspect.signature(type(module).forward)
    if narrowed:
        if not isinstance(inputs, Mapping):
            raise UsageError(
                "capture.example-inputs",
                "example inputs of a transformers model are given by name",
                at="example_inputs",
                want="a mapping such as {'input_ids': …}",
                got="a tuple",
            )
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in ("self", *inputs)])
    try:
        bound = signature.bind(None, **inputs) if isinstance(inputs, Mapping) else signature.bind(None, *inputs)
    except TypeError as error:
        raise UsageError(
            "capture.example-inputs",
            "the example inputs do not fit the signature of forward",
            at=type(module).__name__,
            want=f"forward{signature}",
            got=", ".join(inputs) if isinstance(inputs, Mapping) else f"{len(inputs)} positional tensors",
            todo=f"Name one tensor for each required parameter ({error}).",
        ) from error
    seen: set[int] = set()
    args = tuple(_distinct(value, seen) for value in bound.args[1:])
    return args, {name: _distinct(value, seen) for name, value in bound.kwargs.items()}, signature


def _distinct(value: Any, seen: set[int]) -> Any:
    """Return a copy of a tensor that is given a second time: torch.export would take both inputs for one."""
    if not isinstance(value, Tensor):
        return value
    repeated = id(value) in seen
    seen.add(id(value))
    return value.clone() if repeated else value


def _view(
    module: nn.Module,
    signature: inspect.Signature,
    fixed: Mapping[str, object],
    select: Select | None,
    names: list[str],
) -> nn.Module:
    """Make the object that is exported; its ``forward`` fills ``names`` when it is traced."""
    cls = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        if fixed:
            kwargs, args = {**signature.bind(self, *args, **kwargs).arguments, **fixed}, ()
            kwargs.pop("self")
        result = cls.forward(self, *args, **kwargs)
        outputs = named_tensors(result if select is None else select(result))
        names[:] = [name for name, _ in outputs]
        return distinct([tensor for _, tensor in outputs], [*args, *kwargs.values()])

    forward.__signature__ = signature  # type: ignore[attr-defined]
    labels = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    view: nn.Module = object.__new__(type(cls.__name__, (cls,), labels))
    view.__dict__.update(vars(module))
    for registry in ("_parameters", "_buffers", "_modules"):
        view.__dict__[registry] = dict(vars(module)[registry])
    return view


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
