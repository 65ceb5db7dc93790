"""The files of a Hugging Face checkpoint: found, checked and hashed before transformers opens any of them."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from depthwire._hash import sha256_file
from depthwire.errors import CaptureError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TOKENIZER = re.compile(
    r"tokenizer.*\.(json|model)|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|"
    r"(spiece|sentencepiece.*|spm)\.model|chat_template\.\w+|preprocessor_config\.json"
)
_HUB_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """A directory that was found whole.

    Attributes:
        directory: Where it lies.
        config: ``config.json``, parsed.
        weights: The safetensors files that hold the weights.
        dtype: The floating dtype that most bytes of the weights have, as safetensors spells it (``F32``, ``BF16``).
    """

    directory: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    dtype: str

    def sha256(self) -> dict[str, str]:
        """Hash the configuration, the weights and the tokenizer, by name."""
        extra = [path for path in self.directory.iterdir() if _TOKENIZER.fullmatch(path.name) and path.is_file()]
        files = {path.name: path for path in (self.directory / CONFIG, *self.weights, *extra)}
        return {name: sha256_file(files[name]) for name in sorted(files)}


def read_checkpoint(directory: Path) -> Checkpoint:
    """Check that a directory holds a configuration and whole safetensors files.

    Raises:
        CaptureError: What is missing, corrupt, pickled, quantised or an adapter.
    """
    config = read_json(directory / CONFIG, missing=_no_config(directory))
    _refuse_kinds(directory, config)
    weights = _weight_files(directory)
    sizes: Counter[str] = Counter()
    for path in weights:
        sizes.update(_dtypes(path))
    floating = {dtype: size for dtype, size in sizes.items() if re.fullmatch(r"B?F(16|32|64)", dtype)}
    if not floating:
        raise CaptureError(
            "capture.quantized-checkpoint",
            "the weights are not stored in a floating dtype",
            at=str(directory),
            want="F32, BF16 or F16 weights",
            got=", ".join(sorted(sizes)) or "no tensor at all",
            todo="Use the unquantised checkpoint, or a .gguf file, which is dequantised.",
        )
    return Checkpoint(directory, config, weights, max(floating, key=lambda dtype: floating[dtype]))


def cached_snapshot(reference: str, revision: str | None) -> tuple[Path, str]:
    """Return the local directory and commit of a hub id that is in the Hugging Face cache; never downloads.

    Raises:
        CaptureError: ``capture.no-such-model``.
    """
    if _HUB_ID.fullmatch(reference) and ".." not in reference and "--" not in reference:
        from depthwire.export._transformers import require_transformers

        require_transformers(reference)
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(reference, CONFIG, revision=revision)
        except HFValidationError:
            found = None  # no id of the hub's, so not a cached one
        if isinstance(found, str):
            return Path(found).parent, Path(found).parent.name
    named = f" at revision {revision}" if revision else ""
    raise CaptureError(
        "capture.no-such-model",
        f"there is no model {reference!r}{named}",
        at=reference,
        want="a Hugging Face directory or cached hub id, a .gguf or .pt2 file, or package.module:factory",
        got="neither a path nor a cached hub id (nothing is downloaded)",
        todo=_did_you_mean(Path(reference)) or "Check the path, or download the model into the cache first.",
    )


def read_json(path: Path, *, missing: CaptureError) -> dict[str, Any]:
    """Parse a JSON object of the checkpoint.

    Raises:
        CaptureError: ``missing`` when there is no such file, ``capture.bad-config`` when it is no JSON object.
    """
    if not path.is_file():
        raise missing
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _bad_config(path, str(error)) from error
    if not isinstance(value, dict):
        raise _bad_config(path, f"a JSON {type(value).__name__}")
    return value


def _bad_config(path: Path, got: str) -> CaptureError:
    return CaptureError(
        "capture.bad-config",
        f"{path.name} cannot be read",
        at=str(path),
        want="a JSON object",
        got=got,
        todo="Copy the file again from where the model came from.",
    )


def _no_config(directory: Path) -> CaptureError:
    listed = sorted(path.name for path in directory.iterdir())
    return CaptureError(
        "capture.no-config",
        "the directory is not a Hugging Face model: it has no config.json",
        at=str(directory),
        want="config.json and safetensors weights, or exactly one .gguf file",
        got=", ".join(listed[:8]) + (", …" if len(listed) > 8 else "") or "an empty directory",
        todo=_did_you_mean_inside(directory) or "Name the directory that model.save_pretrained wrote.",
    )


def _refuse_kinds(directory: Path, config: dict[str, Any]) -> None:
    if (directory / "adapter_config.json").is_file():
        raise CaptureError(
            "capture.adapter-checkpoint",
            "the directory holds an adapter, whose weights apply only on top of another model",
            at=str(directory / "adapter_config.json"),
            want="a whole model",
            got="adapter_config.json",
            todo="Merge it first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out).",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"]
        raise CaptureError(
            "capture.quantized-checkpoint",
            "the checkpoint is quantised",
            at=str(directory / CONFIG),
            want="floating weights",
            got=str(method.get("quant_method", "quantization_config") if isinstance(method, dict) else method),
            todo="Use the unquantised checkpoint, or a .gguf file, which is dequantised.",
        )


def _weight_files(directory: Path) -> tuple[Path, ...]:
    if (directory / SINGLE).is_file():
        return (directory / SINGLE,)
    if not (directory / INDEX).is_file():
        raise _no_weights(directory)
    index = read_json(directory / INDEX, missing=_no_weights(directory))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad_config(directory / INDEX, "no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise _bad_config(directory / INDEX, f"weight_map names a file outside the directory: {outside[0]!r}")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CaptureError(
            "capture.missing-shards",
            f"{len(missing)} of {len(names)} weight files are missing",
            at=str(directory),
            want=", ".join(names[:4]) + (", …" if len(names) > 4 else ""),
            got=f"no {', '.join(missing[:4])}" + (", …" if len(missing) > 4 else ""),
            todo="Complete the download or copy.",
        )
    return tuple(directory / name for name in names)


def _no_weights(directory: Path) -> CaptureError:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return pickle_refused(directory / pickles[0])
    others = [name for name in names if name.endswith((".safetensors", ".h5", ".msgpack", ".onnx", ".gguf"))]
    return CaptureError(
        "capture.no-weights",
        "the directory has a config.json and no weights",
        at=str(directory),
        want=f"{SINGLE}, or {INDEX} with its shards",
        got=", ".join(others) or "no weight file",
        todo="Save the model with model.save_pretrained(directory), or name the .gguf file itself.",
    )


def pickle_refused(path: Path) -> CaptureError:
    """Say why a pickle is never opened, and how to convert it."""
    return CaptureError(
        "capture.pickle-checkpoint",
        "the weights are a pickle, which can run code when it is loaded; pickles are never opened",
        at=str(path),
        want="safetensors",
        got=path.name,
        todo="If you trust the file, convert it once with transformers: "
        "AutoModel….from_pretrained(directory, use_safetensors=False).save_pretrained(out).",
    )


def _dtypes(path: Path) -> Counter[str]:
    """Open one safetensors file, which checks its header against its length, and count elements by dtype."""
    from safetensors import SafetensorError, safe_open

    sizes: Counter[str] = Counter()
    try:
        with safe_open(str(path), framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open is not iterable)
                part = file.get_slice(name)
                sizes[part.get_dtype()] += prod(part.get_shape())
    except (SafetensorError, OSError) as error:
        raise CaptureError(
            "capture.corrupt-checkpoint",
            "a weight file cannot be read",
            at=str(path),
            want="a whole safetensors file",
            got=f"{error} ({path.stat().st_size} bytes)",
            todo="Copy or download the file again.",
        ) from error
    return sizes


def _did_you_mean(path: Path) -> str | None:
    parent = path.parent
    if not parent.is_dir():
        return None
    close = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    return f"Did you mean {parent / close[0]}?" if close else None


def _did_you_mean_inside(directory: Path) -> str | None:
    inside = sorted(path.parent for path in directory.glob(f"*/{CONFIG}"))
    return f"Did you mean {inside[0]}?" if inside else None
