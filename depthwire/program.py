"""The value that every stage hands to the next: a captured model that remembers where it came from.

A ``Program`` wraps one ``torch.export.ExportedProgram`` together with its source, example inputs and the record of
the passes that have run. It is never changed in place: a pass returns a new one. (Several graphs over one set of
weights, such as prefill and decode, will live here as further ``ExportedProgram`` values beside ``exported``.)
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch.export.graph_signature import InputKind, OutputKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

METADATA = "depthwire.json"
"""Extra member of a saved ``.pt2`` file; JSON."""

SourceKind = Literal["huggingface", "gguf", "attn-res", "factory", "pt2", "module"]


@dataclass(frozen=True)
class Source:
    """Where a program came from, in enough detail to capture it again.

    Attributes:
        kind: Which loader produced it.
        reference: What the user named: a directory, a hub id, ``package.module:factory``, a file, or a class name.
        revision: Commit of a hub snapshot, or ``None``.
        sha256: Hash of each file that determined the model (relative name -> hex), empty where there is no file.
        task: ``causal-lm``, ``encoder``, ``vision`` or ``None`` for a plain module.
        model: Class name of the model, as a label.
        tokenizer: For ``.pt2`` files and AttnRes checkpoints: the directory or GGUF file with the tokenizer.
    """

    kind: SourceKind
    reference: str
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    task: str | None = None
    model: str | None = None
    tokenizer: str | None = None

    def tokenizer_reference(self) -> str | None:
        """Return where the tokenizer lies: a Hugging Face directory, a cached id or a ``.gguf`` file, if anywhere."""
        if self.kind == "gguf":
            path = Path(self.reference).expanduser()
            return str(path if path.is_file() else path / next(iter(self.sha256)))
        return self.reference if self.kind == "huggingface" else self.tokenizer


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: name, options, how often it rewrote, why it declined elsewhere, and what it weighed."""

    name: str
    options: Mapping[str, object] = field(default_factory=dict)
    rewrites: int = 0
    declines: tuple[Mapping[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Program:
    """A captured model with static shapes.

    Attributes:
        exported: The functional graph, its signature, weights and constants.
        source: Where it came from.
        example_inputs: One example per user input, in the order of the graph's inputs; fixes shapes and dtypes.
        output_names: One name per output, in order; these become the names of the ONNX outputs.
        history: The passes that have run.
    """

    exported: ExportedProgram
    source: Source
    example_inputs: Mapping[str, torch.Tensor]
    output_names: tuple[str, ...]
    history: tuple[PassRecord, ...] = ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the user inputs, in order; equal to the placeholder names in the graph."""
        specs = self.exported.graph_signature.input_specs
        return tuple(s.arg.name for s in specs if s.kind is InputKind.USER_INPUT)

    @property
    def output_nodes(self) -> tuple[str, ...]:
        """Names of the FX nodes that are the outputs, in order."""
        specs = self.exported.graph_signature.output_specs
        return tuple(s.arg.name for s in specs if s.kind is OutputKind.USER_OUTPUT)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, counting tied (shared) storage once."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in self.exported.state_dict.values()
            if isinstance(t, torch.Tensor)
        }
        return sum(storages.values())

    def module(self) -> torch.nn.Module:
        """Return the program as a trainable ``nn.Module`` that shares its weights (lifted queries are parameters)."""
        return self.exported.module()

    def replace(self, **changes: object) -> Program:
        """Return a copy with some fields replaced."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def with_state(self, state_dict: Mapping[str, torch.Tensor]) -> Program:
        """Return the program with new weights, such as those of a fine-tuned ``module()``.

        Args:
            state_dict: Same keys and shapes as ``exported.state_dict``; buffers that are not persistent may be absent.

        Raises:
            CaptureError: A key is missing or extra, or a shape differs.
        """
        from depthwire._state import replace_state

        return self.replace(exported=replace_state(self.exported, state_dict))

    def save(self, path: str | Path) -> None:
        """Write a ``.pt2`` file that ``torch.export.load`` and ``depthwire convert`` both read.

        What the format has no place for (output names, task, where the tokenizer lies) goes into an extra member.
        """
        metadata = {
            "schema_version": 1,
            "output_names": list(self.output_names),
            "task": self.source.task,
            "model": self.source.model,
            "tokenizer": self.source.tokenizer_reference(),
        }
        torch.export.save(self.exported, str(path), extra_files={METADATA: json.dumps(metadata)})
