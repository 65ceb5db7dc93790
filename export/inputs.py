"""Inputs for a captured program: windows of real text, seeded random values, or a file of the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from depthwire.errors import CaptureError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from depthwire.program import Program

Inputs = dict[str, np.ndarray]

_EMBEDDING = "aten.embedding.default"
# What may stand between token ids and the table that they index.
_KEEPS_VALUES = ("aten.view", "aten.reshape", "aten.to", "aten._to_copy", "aten.alias", "aten.clone", "aten.slice")


def text_windows(program: Program, text: Path, *, count: int) -> list[Inputs]:
    """Cut real text into consecutive, non-overlapping windows of tokens.

    The text is tokenised as a whole with the source's tokenizer and without special tokens (no BOS); window ``i`` of
    row ``b`` starts at token ``(i * batch + b) * seq_len``.

    Args:
        program: A causal language model or encoder from a Hugging Face directory, hub id or GGUF file.
        text: UTF-8 file.
        count: Number of windows, each of shape ``[batch, seq_len]``.

    Returns:
        ``input_ids``, and ``attention_mask`` of ones where the program has one, in the dtypes of the inputs.

    Raises:
        UsageError: The text is absent, not UTF-8, or too short, or ``count`` is below 1.
        CaptureError: The source has no tokenizer, or the program takes something else than tokens.
    """
    _check_count(count)
    example = program.example_inputs.get("input_ids")
    others = [name for name in program.input_names if name not in ("input_ids", "attention_mask")]
    if example is None or example.dim() != 2 or others:
        raise CaptureError(
            "capture.not-text",
            "the program does not take windows of tokens",
            at=program.source.reference,
            want="inputs input_ids [batch, seq_len] and, if any, attention_mask",
            got=", ".join(program.input_names),
            todo="Give the inputs as a file (load_inputs), or use random ones.",
        )
    ids = _tokenise(program, text)
    batch, length = int(example.shape[0]), int(example.shape[1])
    needed = count * batch * length
    if len(ids) < needed:
        raise UsageError(
            "capture.text-too-short",
            "the text is too short for the windows",
            at=str(text),
            want=f"{needed} tokens: {count} windows of {batch} x {length}",
            got=f"{len(ids)} tokens",
            todo="Use a longer text, fewer windows or a shorter seq_len.",
        )
    blocks = np.asarray(ids[:needed]).reshape(count, batch, length)
    windows = []
    for block in blocks:
        window = {"input_ids": block.astype(_numpy_dtype(example.dtype))}
        if "attention_mask" in program.input_names:
            window["attention_mask"] = _numpy(torch.ones_like(program.example_inputs["attention_mask"]))
        windows.append(window)
    for window in windows:
        _check_ids(program, window, str(text))
    return windows


def random_inputs(program: Program, *, count: int, seed: int = 0) -> list[Inputs]:
    """Draw inputs with the program's shapes and dtypes.

    Integers that index an embedding are uniform over its rows; an input whose name ends in ``mask`` is all ones;
    other integers are uniform over the range of the example; floats are standard normal.

    Args:
        program: Any program.
        count: Number of input sets.
        seed: The same seed gives the same values.

    Raises:
        UsageError: ``count`` is below 1.
    """
    _check_count(count)
    generator = np.random.default_rng(seed)
    rows = embedding_rows(program)
    return [
        {name: _draw(generator, name, program.example_inputs[name], rows.get(name)) for name in program.input_names}
        for _ in range(count)
    ]


def load_inputs(program: Program, file: Path) -> list[Inputs]:
    """Read inputs from a file and check them against the program.

    Args:
        program: Any program.
        file: ``.safetensors`` or ``.npz`` with one array per input, under its name: of the input's shape, or with one
            more leading axis, along which the input sets follow one another.

    Raises:
        UsageError: The file is absent, of another kind or corrupt, or names, shapes, dtypes or token ids do not fit.
    """
    arrays = _read(file)
    if set(arrays) != set(program.input_names):
        raise _mismatch(file, ", ".join(program.input_names), ", ".join(sorted(arrays)) or "no array")
    counts = {}
    for name in program.input_names:
        example, array = program.example_inputs[name], arrays[name]
        shape, dtype = tuple(example.shape), _numpy_dtype(example.dtype)
        if array.dtype != dtype or array.shape[-len(shape) :] != shape or array.ndim - len(shape) not in (0, 1):
            want = f"{name}: {dtype} {list(shape)}, or [n, {', '.join(map(str, shape))}]"
            raise _mismatch(file, want, f"{array.dtype} {list(array.shape)}")
        arrays[name] = array if array.ndim > len(shape) else array[None]
        counts[name] = len(arrays[name])
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise _mismatch(file, "the same number of input sets under every name", str(counts))
    sets = [{name: arrays[name][index] for name in program.input_names} for index in range(min(counts.values()))]
    for inputs in sets:
        _check_ids(program, inputs, str(file))
    return sets


def embedding_rows(program: Program) -> dict[str, int]:
    """Return, for each input that indexes an embedding table, the number of its rows."""
    rows = {}
    for node in program.exported.graph.nodes:
        if node.op == "placeholder" and node.name in program.input_names:
            sizes = list(_tables(node, set()))
            if sizes:
                rows[str(node.name)] = min(sizes)
    return rows


def _tables(node: Node, seen: set[Node]) -> Iterator[int]:
    seen.add(node)
    for user in node.users:
        target = str(user.target)
        if target == _EMBEDDING and user.args[1] is node:
            table = user.args[0]
            if isinstance(table, Node):
                yield int(table.meta["val"].shape[0])
        elif target.startswith(_KEEPS_VALUES) and user not in seen:
            yield from _tables(user, seen)


def _check_ids(program: Program, inputs: Mapping[str, np.ndarray], at: str) -> None:
    for name, limit in embedding_rows(program).items():
        low, high = int(inputs[name].min()), int(inputs[name].max())
        if low < 0 or high >= limit:
            raise UsageError(
                "capture.token-range",
                f"{name} holds indices outside the model's embedding table",
                at=at,
                want=f"0 to {limit - 1}",
                got=f"{low} to {high}",
                todo="Tokenise with the model's own tokenizer.",
            )


def _check_count(count: int) -> None:
    if count < 1:
        raise UsageError("capture.size", "count must be at least 1", at="count", want=">= 1", got=str(count))


def _draw(generator: np.random.Generator, name: str, example: Tensor, rows: int | None) -> np.ndarray:
    shape, dtype = tuple(example.shape), _numpy_dtype(example.dtype)
    if name.endswith("mask"):
        return np.ones(shape, dtype)
    if example.dtype.is_floating_point:
        return generator.standard_normal(shape, dtype=np.float32).astype(dtype)
    if example.dtype == torch.bool:
        return generator.integers(0, 2, shape).astype(dtype)
    low, high = (0, rows) if rows is not None else (int(example.min()), int(example.max()) + 1)
    return generator.integers(low, high, shape).astype(dtype)


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    if dtype == torch.bfloat16:
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(str(dtype).removeprefix("torch."))


def _numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(_numpy_dtype(tensor.dtype))
    return tensor.detach().numpy()


def _read(file: Path) -> dict[str, np.ndarray]:
    if file.suffix not in (".safetensors", ".npz"):
        raise _unreadable(file, f"a {file.suffix or 'nameless'} file")
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        from safetensors.torch import load_file

        return {name: _numpy(tensor) for name, tensor in load_file(str(file)).items()}
    except Exception as error:
        raise _unreadable(file, f"{type(error).__name__}: {error}") from error


def _unreadable(file: Path, got: str) -> UsageError:
    return UsageError(
        "capture.inputs-unreadable",
        "the file of inputs cannot be read",
        at=str(file),
        want="a .safetensors or .npz file",
        got=got,
        todo="Write it with safetensors.torch.save_file or numpy.savez, one array per input.",
    )


def _mismatch(file: Path, want: str, got: str) -> UsageError:
    return UsageError(
        "capture.inputs-mismatch",
        "the inputs in the file do not fit the program",
        at=str(file),
        want=want,
        got=got,
        todo="Write one array per input of the program, in its dtype.",
    )


def _tokenise(program: Program, text: Path) -> list[int]:
    from depthwire.export._tokenizer import load_tokenizer
    from depthwire.export._transformers import quiet

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "capture.text-unreadable",
            "the text cannot be read",
            at=str(text),
            want="a UTF-8 text file",
            got=f"{type(error).__name__}: {error}",
        ) from error
    tokenizer = load_tokenizer(program.source)
    with quiet():
        ids: list[int] = tokenizer(content, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return ids
