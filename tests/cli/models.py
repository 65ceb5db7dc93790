"""Tiny models for the command line's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path


def tiny_llama(*, seed: int = 0, layers: int = 2) -> Any:
    """Return a randomly initialised Llama, hidden size 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def save_tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """Write it as a Hugging Face directory without a tokenizer."""
    tiny_llama(seed=seed).save_pretrained(folder)
    return folder


def save_post_norm_bert(folder: Path) -> Path:
    """Write a randomly initialised BERT (post-norm) as a Hugging Face directory."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder
