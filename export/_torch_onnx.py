"""The one file that reaches below ``torch.onnx.export``: translation of an exported program, node by node.

``torch.onnx.export`` first decomposes the program, which traces it again, and every value gets a new name. Our
programs are canonical already, so they go straight to the translation table of the same exporter, and ONNX value
names equal FX node names. An operator without a translation is decomposed first (``decompose_missing``), and only
that one.

Written against torch 2.13; the range in pyproject.toml says so.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch

from depthwire.errors import ExportError
from depthwire.passes._base import where

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import onnx_ir as ir
    from torch.export import ExportedProgram

_TRANSLATED_HERE = ("_operator", "math")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes about torchvision and about lists of tensors, which nobody asked for."""
    loggers = [logging.getLogger(f"torch.onnx._internal.exporter.{name}") for name in ("_registration", "_core")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Translator:
    """The exporter's translation table for one opset, with the custom operators added."""

    def __init__(self, opset: int, custom: Mapping[str, Callable[..., Any]]) -> None:
        """Load the table.

        Args:
            opset: ONNX opset to translate to.
            custom: Qualified torch name, with the overload unless it is the default -> onnxscript callable; of
                operators that are not registered nothing is used.
        """
        with _quiet():
            from torch.onnx._internal.exporter import _registration

            self._registry = _registration.ONNXRegistry.from_torchlib(opset_version=opset)
            for name, function in custom.items():
                namespace, op = name.split("::")
                op, _, overload = op.partition(".")
                packet = getattr(getattr(torch.ops, namespace), op, None)
                if packet is not None:  # else its package is not imported, so no program can hold it
                    self._registry.register_op(getattr(packet, overload or "default"), function)

    def missing(self, exported: ExportedProgram) -> list[torch.fx.Node]:
        """Return the calls that have no translation."""
        return [
            node
            for node in exported.graph.nodes
            if node.op == "call_function"
            and isinstance(node.target, torch._ops.OpOverload)
            and not self._registry.is_registered(node.target)
        ]

    def decompose_missing(self, exported: ExportedProgram) -> ExportedProgram:
        """Decompose the operators without a translation, and refuse those that cannot be decomposed."""
        targets = {node.target for node in self.missing(exported)}
        if not targets:
            return exported
        table = torch.export.default_decompositions().materialize()
        table = {**torch._decomp.decomposition_table, **table}  # noqa: SLF001 - has no public spelling
        wanted = {target: table[target] for target in targets if target in table}
        if wanted:
            with _quiet():
                exported = exported.run_decompositions(wanted)
        left = self.missing(exported)
        if left:
            node = left[0]
            names = sorted({str(other.target) for other in left})
            raise ExportError(
                "export.no-translation",
                "An operator of the model has no ONNX translation",
                at=where(node),
                want="operators of aten, or custom operators that Depthwire knows",
                got=", ".join(names),
                todo="Use another implementation of this module (for instance attn_implementation='eager').",
            )
        return exported

    def translate(self, exported: ExportedProgram) -> ir.Model:
        """Translate node by node; value names are the FX node names.

        Raises:
            ExportError: A translation fails; names the node and its module.
        """
        from torch.onnx._internal.exporter import _core, _fx_passes

        with _quiet():
            exported.graph_module.graph.lint()
            module = exported.graph_module
            _fx_passes.insert_type_promotion_nodes(module)
            try:
                program = _core._exported_program_to_onnx_program(  # noqa: SLF001 - this file's purpose
                    exported, registry=self._registry
                )
            except Exception as error:
                cause: BaseException = error
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                raise ExportError(
                    "export.translation-failed",
                    "The model cannot be translated to ONNX",
                    at=str(error).splitlines()[0],
                    want="an ONNX translation of every node",
                    got=f"{type(cause).__name__}: {cause}".splitlines()[0],
                    todo="Report this with the model's configuration.",
                ) from error
        return program.model
