"""Inputs for a program: text, random values, files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from depthwire.errors import CaptureError, UsageError
from depthwire.export.capture import capture
from depthwire.export.inputs import embedding_rows, load_inputs, random_inputs, text_windows

if TYPE_CHECKING:
    from depthwire.program import Program

SOTU = Path(__file__).resolve().parent.parent / "data" / "sotu-2000.txt"


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.kinds = nn.Embedding(3, 4)

    def forward(
        self, ids: Tensor, kind: Tensor, x: Tensor, *, attention_mask: Tensor, step: Tensor, on: Tensor
    ) -> Tensor:
        mixed: Tensor = self.table(ids.view(2, 5)) + self.kinds(kind) + attention_mask[..., None] + step + x
        return torch.where(on, mixed, -mixed)


@pytest.fixture(scope="module")
def program() -> Program:
    ids = torch.zeros(2, 5, dtype=torch.long)
    inputs = {
        "ids": ids,
        "kind": ids.to(torch.int32),
        "attention_mask": torch.ones_like(ids),
        "step": torch.tensor([3, 7, 5, 4]),
        "x": torch.zeros(2, 5, 4),
        "on": torch.ones(4, dtype=torch.bool),
    }
    return capture(Reads(), example_inputs=inputs)


def test_the_rows_of_each_table_are_found(program: Program) -> None:
    assert embedding_rows(program) == {"ids": 10, "kind": 3}


def test_random_inputs_stay_in_range(program: Program) -> None:
    sets = random_inputs(program, count=40)
    assert len(sets) == 40
    for inputs in sets:
        assert list(inputs) == list(program.input_names)
        for name, array in inputs.items():
            example = program.example_inputs[name]
            assert array.shape == tuple(example.shape)
            assert array.dtype == example.numpy().dtype
        assert (inputs["attention_mask"] == 1).all()
    stacked = {name: np.stack([inputs[name] for inputs in sets]) for name in program.input_names}
    assert (stacked["ids"].min(), stacked["ids"].max()) == (0, 9)
    assert (stacked["kind"].min(), stacked["kind"].max()) == (0, 2)
    assert (stacked["step"].min(), stacked["step"].max()) == (3, 7)
    assert set(np.unique(stacked["on"])) == {False, True}
    assert abs(stacked["x"].std() - 1) < 0.1
    with torch.no_grad():
        tensors = [torch.from_numpy(array) for array in sets[0].values()]
        program.module()(*tensors[:3], **dict(zip(program.input_names[3:], tensors[3:], strict=True)))


def test_the_seed_decides(program: Program) -> None:
    first, same, other = (random_inputs(program, count=1, seed=seed)[0] for seed in (3, 3, 4))
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert not np.array_equal(first["x"], other["x"])


def test_bfloat16_inputs_are_bfloat16_arrays(tmp_path: Path) -> None:
    program = capture(nn.Linear(2, 2).to(torch.bfloat16), example_inputs=(torch.ones(1, 2, dtype=torch.bfloat16),))
    assert random_inputs(program, count=1)[0]["input"].dtype.name == "bfloat16"
    save_file({"input": torch.full((1, 2), 1.5, dtype=torch.bfloat16)}, tmp_path / "in.safetensors")
    loaded = load_inputs(program, tmp_path / "in.safetensors")[0]["input"]
    assert loaded.dtype.name == "bfloat16"
    assert loaded.astype(np.float32).tolist() == [[1.5, 1.5]]


# --- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, arrays: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_hold_one_set_or_many(program: Program, tmp_path: Path, suffix: str) -> None:
    sets = random_inputs(program, count=3)
    one = load_inputs(program, write(tmp_path / f"one{suffix}", sets[0]))
    assert len(one) == 1
    assert all(np.array_equal(one[0][name], sets[0][name]) for name in program.input_names)
    stacked = {name: np.stack([inputs[name] for inputs in sets]) for name in program.input_names}
    many = load_inputs(program, write(tmp_path / f"many{suffix}", stacked))
    assert len(many) == 3
    assert all(np.array_equal(many[2][name], sets[2][name]) for name in program.input_names)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"ids": None}, "capture.inputs-mismatch"),
        ({"more": np.zeros(2)}, "capture.inputs-mismatch"),
        ({"x": np.zeros((2, 5, 4))}, "capture.inputs-mismatch"),
        ({"x": np.zeros((2, 5, 3), np.float32)}, "capture.inputs-mismatch"),
        ({"x": np.zeros((4,), np.float32)}, "capture.inputs-mismatch"),
        ({"x": np.zeros((1, 1, 2, 5, 4), np.float32)}, "capture.inputs-mismatch"),
        ({"x": np.zeros((0, 2, 5, 4), np.float32)}, "capture.inputs-mismatch"),
        ({"x": np.zeros((2, 2, 5, 4), np.float32)}, "capture.inputs-mismatch"),
        ({"ids": np.full((2, 5), 10)}, "capture.token-range"),
        ({"ids": np.full((2, 5), -1)}, "capture.token-range"),
    ],
)
def test_files_that_do_not_fit(program: Program, tmp_path: Path, change: dict[str, Any], code: str) -> None:
    arrays = {**random_inputs(program, count=1)[0], **change}
    file = write(tmp_path / "in.npz", {name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UsageError) as raised:
        load_inputs(program, file)
    assert raised.value.code == code


@pytest.mark.parametrize("name", ["absent.npz", "absent.safetensors", "garbage.npz", "garbage.safetensors", "in.txt"])
def test_files_that_cannot_be_read(program: Program, tmp_path: Path, name: str) -> None:
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(UsageError) as raised:
        load_inputs(program, tmp_path / name)
    assert raised.value.code == "capture.inputs-unreadable"


def test_pickled_arrays_are_not_opened(program: Program, tmp_path: Path) -> None:
    file = tmp_path / "in.npz"
    np.savez(file, ids=np.array([{"any": "object"}], dtype=object))
    with pytest.raises(UsageError) as raised:
        load_inputs(program, file)
    assert raised.value.code == "capture.inputs-unreadable"


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one(program: Program, count: int) -> None:
    with pytest.raises(UsageError) as raised:
        random_inputs(program, count=count)
    assert raised.value.code == "capture.size"
    with pytest.raises(UsageError) as raised:
        text_windows(program, SOTU, count=count)
    assert raised.value.code == "capture.size"


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT whose tokenizer knows the words w0 … w29, and adds special tokens unless told not to."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(30))]
    (directory / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.BertModel(config).save_pretrained(directory)
    transformers.utils.logging.enable_progress_bar()
    vocabulary = {word: index for index, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(directory)
    return directory


def test_windows_follow_one_another_without_special_tokens(texts: Path, tmp_path: Path) -> None:
    program = capture(texts, batch=2, seq_len=3)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{index}" for index in range(14)))
    windows = text_windows(program, text, count=2)
    assert [window["input_ids"].tolist() for window in windows] == [
        [[5, 6, 7], [8, 9, 10]],
        [[11, 12, 13], [14, 15, 16]],
    ]
    assert all((window["attention_mask"] == 1).all() for window in windows)
    assert windows[0]["input_ids"].dtype == np.int64
    with pytest.raises(UsageError) as raised:
        text_windows(program, text, count=3)
    assert raised.value.code == "capture.text-too-short"
    assert "14 tokens" in str(raised.value.got)
    assert "18 tokens" in str(raised.value.want)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xfa"])
def test_texts_that_cannot_be_read(texts: Path, tmp_path: Path, content: bytes | None) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        text_windows(capture(texts, seq_len=3), text, count=1)
    assert raised.value.code == "capture.text-unreadable"


def test_a_program_of_other_inputs_has_no_windows(program: Program) -> None:
    with pytest.raises(CaptureError) as raised:
        text_windows(program, SOTU, count=1)
    assert raised.value.code == "capture.not-text"


def test_a_source_without_a_tokenizer(texts: Path, tmp_path: Path) -> None:
    program = capture(texts, seq_len=3)
    for kind, reference in (("pt2", "a.pt2"), ("huggingface", str(tmp_path))):
        source = dataclasses.replace(program.source, kind=kind, reference=reference)  # type: ignore[arg-type]
        with pytest.raises(CaptureError) as raised:
            text_windows(program.replace(source=source), SOTU, count=1)
        assert raised.value.code == "capture.no-tokenizer"


def test_a_tokenizer_that_is_code_is_not_run(texts: Path, tmp_path: Path) -> None:
    program, directory = capture(texts, seq_len=3), tmp_path / "own"
    directory.mkdir()
    shutil.copy(texts / "config.json", directory)
    (directory / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'marker')!r})\n")
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CaptureError) as raised:
        text_windows(
            program.replace(source=dataclasses.replace(program.source, reference=str(directory))), SOTU, count=1
        )
    assert raised.value.code == "capture.no-tokenizer"
    assert not (tmp_path / "marker").exists()


def test_smollm2_reads_the_state_of_the_union(smollm2_dir: Path) -> None:
    """The mean negative log-likelihood (nats) of the first window, as transformers itself computes it in fp32."""
    program = capture(smollm2_dir)
    assert program.example_inputs["input_ids"].shape == (1, 512)
    windows = text_windows(program, SOTU, count=4)
    module = program.module()
    losses = []
    with torch.no_grad():
        for window in windows:
            ids = torch.from_numpy(window["input_ids"])
            logits = module(ids)
            losses.append(nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item())
    assert losses == pytest.approx([3.09206, 3.05526, 3.16782, 3.24658], abs=2e-5)
