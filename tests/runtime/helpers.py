"""A tiny transformer, captured, rewritten, exported by torch.onnx and described by a manifest written by hand."""

from __future__ import annotations

import copy
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from safetensors.numpy import save_file
from torch import nn
from torch.nn import functional

from depthwire.artifact import GOLDENS, MODEL, WEIGHTS, Artifact, Checkpoint, Manifest, SourceInfo, TensorInfo
from depthwire.program import Program, Source
from depthwire.runtime.torch_exported import TorchExportedRunner

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch.export import ExportedProgram

LAYERS, VOCABULARY, WIDTH, LENGTH, WINDOWS = 4, 97, 32, 12, 2


class Attention(nn.Module):
    """Causal attention with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] to the same."""
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, 2, width // 2).transpose(1, 2) for t in self.qkv(x).split(width, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class Block(nn.Module):
    """Two pre-norm sublayers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = (
            nn.LayerNorm(WIDTH),
            nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] to the same."""
        x = x + self.attention(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class Tiny(nn.Module):
    """A language model of four layers with random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, length] token ids to [batch, length, vocabulary] logits."""
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@dataclass(frozen=True)
class Case:
    """An artefact of the tiny model and what it was made from."""

    artifact: Artifact
    original: Program
    rewritten: Program
    windows: list[dict[str, NDArray[Any]]]

    def copy_to(self, root: Path) -> Case:
        """Return the case with a copy of its artefact, to be tampered with."""
        shutil.copytree(self.artifact.root, root)
        return Case(Artifact.load(root), self.original, self.rewritten, self.windows)


def build_case(root: Path) -> Case:
    """Export the tiny model and write its artefact into ``root``."""
    original = tiny_program()
    rewritten = rewrite(original)
    generator = np.random.default_rng(1)
    windows = [{"input_ids": generator.integers(0, VOCABULARY, (1, LENGTH))} for _ in range(WINDOWS)]
    with torch_warnings():
        exported = torch.onnx.export(
            rewritten.exported, dynamo=True, optimize=False, verbose=False, output_names=["logits"]
        )
    assert exported is not None
    exported.save(root / MODEL, external_data=True)
    with TorchExportedRunner(original, name="original") as runner:
        outputs = [runner.infer(window)["logits"] for window in windows]
    goldens = {"input.input_ids": np.stack([w["input_ids"] for w in windows]), "output.logits": np.stack(outputs)}
    save_file(goldens, root / GOLDENS)
    artifact = Artifact(root, _manifest())
    for name in (MODEL, WEIGHTS, GOLDENS):
        artifact.add_file(name)
    artifact.write_manifest()
    return Case(artifact, original, rewritten, windows)


def tiny_program() -> Program:
    """Capture the tiny model."""
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(0, VOCABULARY, (1, LENGTH))}
    return capture(Tiny(), inputs, ("logits",), task="causal-lm")


def capture(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: tuple[str, ...], *, task: str | None = None
) -> Program:
    """Capture a module with keyword inputs."""
    with torch_warnings():
        exported = torch.export.export(module.eval(), (), dict(inputs)).run_decompositions({})
    return Program(exported, Source("module", type(module).__name__, task=task), inputs, outputs)


@contextmanager
def torch_warnings() -> Iterator[None]:
    """Let torch copy its own deprecated pytree class; warnings are errors otherwise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        yield


def rewrite(program: Program) -> Program:
    """Write every residual sum as (3 a + 3 b) / 3: another rounding, the same function, every node's name kept."""
    exported = copied(program.exported)
    graph = exported.graph
    for node in [n for n in graph.nodes if n.target is torch.ops.aten.add.Tensor]:
        left, right = node.args
        with graph.inserting_before(node):
            scaled = [graph.call_function(torch.ops.aten.mul.Tensor, (side, 3.0)) for side in (left, right)]
        node.args = tuple(scaled)
        with graph.inserting_after(node):
            divided = graph.call_function(torch.ops.aten.div.Tensor, (node, 3.0))
        for new in (*scaled, divided):
            new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(divided, delete_user_cb=lambda user, new=divided: user is not new)
    exported.graph_module.recompile()
    return program.replace(exported=exported)


def perturb(program: Program, weight: str, factor: float) -> Program:
    """Return the program with one weight multiplied by a factor."""
    exported = copied(program.exported)
    with torch.no_grad():
        exported.state_dict[weight].mul_(factor)
    return program.replace(exported=exported)


def perturb_file(artifact: Artifact, weight: str, factor: float) -> None:
    """Multiply one weight in the weights file by a factor, and hash the file again."""
    model = onnx.load(str(artifact.model), load_external_data=False)
    initializer = next(i for i in model.graph.initializer if i.name == weight)
    where = {entry.key: entry.value for entry in initializer.external_data}
    count = int(np.prod(initializer.dims))
    values = np.memmap(artifact.path(WEIGHTS), np.float32, "r+", int(where["offset"]), (count,))
    values *= np.float32(factor)
    values.flush()
    artifact.add_file(WEIGHTS)
    artifact.write_manifest()


def copied(exported: ExportedProgram) -> ExportedProgram:
    """Return a deep copy."""
    with torch_warnings():
        return copy.deepcopy(exported)


def _manifest() -> Manifest:
    checkpoints = [
        Checkpoint(value=value, layer=layer, role=role, module=module)
        for layer in range(2 * LAYERS)
        for value, role, module in _sublayer(layer)
    ]
    final = Checkpoint(value=f"layer_norm_{2 * LAYERS}", layer=2 * LAYERS, role="norm", module="norm")
    return Manifest(
        depthwire="0",
        created="2026-01-01T00:00:00Z",
        source=SourceInfo(kind="module", reference="Tiny", task="causal-lm"),
        recipe={},
        inputs=[TensorInfo(name="input_ids", shape=[1, LENGTH], dtype="int64")],
        outputs=[TensorInfo(name="logits", shape=[1, LENGTH, VOCABULARY], dtype="float32")],
        opsets={"": 18},
        checkpoints=[*checkpoints, final],
    )


def _sublayer(layer: int) -> list[tuple[str, str, str]]:
    """Name, role and module of what a sublayer reads and writes, as torch.export names them."""
    block, half = divmod(layer, 2)
    norm = f"layer_norm_{layer}" if layer else "layer_norm"
    module = f"blocks.{block}.{('attention', 'mlp')[half]}"
    return [(norm, "norm", f"blocks.{block}.norm{half + 1}"), (f"linear_{2 * layer + 1}", "write", module)]
