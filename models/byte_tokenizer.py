"""The tokenizer of byte-level models: token i is the byte i of the UTF-8 text.

Written as the ``tokenizer.json`` of the tokenizers library (byte-level pre-tokenisation and a BPE without merges), so
that the same reader as for any other checkpoint finds it and no table of merges is trained or shipped.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

VOCAB_SIZE = 256


def _characters() -> list[str]:
    """Return the printable character that the byte-level pre-tokeniser puts for each byte.

    Bytes that print stand for themselves; the others take the code points from 256 on, in order (GPT-2's table).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, spare = [], 256
    for byte in range(VOCAB_SIZE):
        characters.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return characters


def save_byte_tokenizer(directory: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` beside a model's weights.

    Args:
        directory: An existing directory.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_characters())},
            "merges": [],
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**9}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
