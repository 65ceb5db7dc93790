"""Write a randomly initialised Llama-shaped model of 1.5 billion parameters (6 GB in fp32) as a Hugging Face directory.

For testing what a large model needs: protobuf's 2 GB limit, time, memory. Nothing is downloaded; tensors are drawn
and written shard by shard, so making the model takes little memory.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, HIDDEN, LAYERS, HEADS, KEY_HEADS, VOCAB = 2048, 5632, 30, 16, 8, 32000


def config(layers: int) -> dict[str, object]:
    """Return the configuration, as transformers reads it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def layer_shapes(index: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one layer."""
    prefix, keys = f"model.layers.{index}.", WIDTH * KEY_HEADS // HEADS
    return {
        f"{prefix}input_layernorm.weight": (WIDTH,),
        f"{prefix}self_attn.q_proj.weight": (WIDTH, WIDTH),
        f"{prefix}self_attn.k_proj.weight": (keys, WIDTH),
        f"{prefix}self_attn.v_proj.weight": (keys, WIDTH),
        f"{prefix}self_attn.o_proj.weight": (WIDTH, WIDTH),
        f"{prefix}post_attention_layernorm.weight": (WIDTH,),
        f"{prefix}mlp.gate_proj.weight": (HIDDEN, WIDTH),
        f"{prefix}mlp.up_proj.weight": (HIDDEN, WIDTH),
        f"{prefix}mlp.down_proj.weight": (WIDTH, HIDDEN),
    }


def shards(layers: int) -> list[dict[str, tuple[int, ...]]]:
    """Return the tensors of every shard: the embeddings, then one layer a shard."""
    ends = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "lm_head.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    return [ends, *(layer_shapes(index) for index in range(layers))]


def write(out: Path, *, layers: int = LAYERS, seed: int = 0) -> int:
    """Write the directory.

    Args:
        out: Where; must not exist.
        layers: Number of layers; 30 make 1.5 billion parameters.
        seed: Seed of the weights.

    Returns:
        The number of parameters.
    """
    out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    names, weight_map, count = shards(layers), {}, 0
    for number, shapes in enumerate(names, start=1):
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                tensors[name] = torch.ones(shape)
            else:
                tensors[name] = torch.empty(shape).normal_(0, 1 / math.sqrt(shape[-1]), generator=generator)
            weight_map[name] = file
            count += tensors[name].numel()
        save_file(tensors, out / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 4 * count}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    (out / "config.json").write_text(json.dumps(config(layers), indent=1), encoding="utf-8")
    return count


def main() -> None:
    """Write the model and print its size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    count = write(arguments.out, layers=arguments.layers)
    print(f"{arguments.out}: {count / 1e9:.2f} billion parameters, {4 * count / 1e9:.1f} GB")  # noqa: T201


if __name__ == "__main__":
    main()
