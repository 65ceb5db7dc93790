"""Checkpoints under other names: written for real, loaded, and computing the same to the last bit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from depthwire.errors import CaptureError, DepthwireError, UsageError
from depthwire.models.attn_res import AttnResConfig, AttnResDecoder, MoeConfig
from depthwire.models.checkpoints import load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

TRAINED = Path(__file__).parent.parent / "data" / "attn_res_small"
State = dict[str, Tensor]

PAPER_LIKE = [
    (r"layers\.(\d+)\.self_attention_res_", r"layers.\1.attn_res_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".mlp_norm."),
    (r"\.self_attn\.", ".attn."),
]
NAMES: dict[str, list[tuple[str, str]]] = {
    "kimi-k3": [(r"^(?!lm_head)", "model.")],
    "kimi-k3-multimodal": [(r"^(?!lm_head)", "language_model.model."), (r"^lm_head", "language_model.lm_head")],
    "fla": [
        *PAPER_LIKE,
        (r"^embed_tokens", "embeddings"),
        (r"^output_attn_res_", "res_"),
        (r"^(?!lm_head)", "model."),
    ],
    "paper": [*PAPER_LIKE, (r"^embed_tokens", "tok_embeddings"), (r"^output_attn_res_", "final_attn_res_")],
}
MOE_NAMES = [
    (r"\.mlp\.(gate\.|experts\.|shared_experts\.)", r".block_sparse_moe.\1"),
    (r"(experts\.\d+)\.gate_proj", r"\1.w1"),
    (r"(experts\.\d+)\.up_proj", r"\1.w3"),
    (r"(experts\.\d+)\.down_proj", r"\1.w2"),
]


def renamed(state: State, rules: list[tuple[str, str]]) -> State:
    out = {}
    for name, tensor in state.items():
        new = name
        for pattern, to in rules:
            new = re.sub(pattern, to, new, count=1)
        out[new] = tensor.clone()
    assert len(out) == len(state)
    return out


def hf_config(config: AttnResConfig, **extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        **extra,
    }


def fla_config(config: AttnResConfig, block: int | None) -> dict[str, Any]:
    fields = hf_config(config, attnres_block_size=block, hidden_act="swish", qk_norm=False, window_size=None)
    former = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "rms_norm_eps": "norm_eps"}
    return {former.get(name, name): value for name, value in fields.items() if name != "head_dim"}


def write(directory: Path, state: State, config: dict[str, Any] | None, shards: int = 1) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, directory / "model.safetensors")
        return directory
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(state))}
    for file in sorted(set(weight_map.values())):
        save_file({name: state[name] for name, where in weight_map.items() if where == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def ids(model: AttnResDecoder) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(2))


def same(loaded: AttnResDecoder, original: AttnResDecoder) -> None:
    assert loaded.config == original.config
    want = original.state_dict()
    assert set(loaded.state_dict()) == set(want)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, want[name]), name
        assert tensor.dtype == want[name].dtype, name
    assert torch.equal(loaded(ids(original)), original(ids(original)))


@pytest.fixture(scope="module")
def trained() -> AttnResDecoder:
    return AttnResDecoder.load(TRAINED)


@pytest.fixture(scope="module")
def tiny() -> AttnResDecoder:
    torch.manual_seed(0)
    config = AttnResConfig(48, 16, 3, 4, 2, 4, 24, max_length=32, residual="full", tied_embeddings=False)
    model = AttnResDecoder(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    return model


SCHEMES: list[tuple[str, str, Callable[[AttnResConfig], dict[str, Any]]]] = [
    ("kimi-k3", "kimi-k3", lambda c: hf_config(c, attn_res_block_size=c.block_layers)),
    ("kimi-k3-multimodal", "kimi-k3", lambda c: {"text_config": hf_config(c, attn_res_block_size=c.block_layers)}),
    ("fla", "fla", lambda c: fla_config(c, 2 * (c.block_layers or 0))),
    ("paper", "paper", lambda c: hf_config(c, attn_res_block_size=2 * (c.block_layers or 0))),
]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("names", "scheme", "config"), SCHEMES, ids=[scheme[0] for scheme in SCHEMES])
def test_the_trained_model_under_other_names_is_the_trained_model(
    tmp_path: Path,
    trained: AttnResDecoder,
    *,
    names: str,
    scheme: str,
    config: Callable[[AttnResConfig], dict[str, Any]],
    shards: int,
) -> None:
    assert trained.config.tied_embeddings
    path = write(tmp_path / "c", renamed(trained.state_dict(), NAMES[names]), config(trained.config), shards)
    same(load_checkpoint(path, scheme), trained)


@pytest.mark.parametrize(("scheme", "block"), [("fla", 1), ("paper", 1), ("paper", None)])
def test_one_sublayer_per_block_is_full(tmp_path: Path, tiny: AttnResDecoder, scheme: str, block: int | None) -> None:
    config = fla_config(tiny.config, block) if scheme == "fla" else hf_config(tiny.config, attn_res_block_size=block)
    same(load_checkpoint(write(tmp_path / "c", renamed(tiny.state_dict(), NAMES[scheme]), config), scheme), tiny)


@pytest.mark.parametrize("spelling", [MOE_NAMES, []], ids=["block_sparse_moe", "mlp"])
def test_a_mixture_of_experts_under_the_names_of_k3(tmp_path: Path, spelling: list[tuple[str, str]]) -> None:
    moe = MoeConfig(4, 2, 8, shared_width=16, router="sigmoid", selection_bias=True, scale=2.5, dense_layers=1)
    config = AttnResConfig(48, 16, 3, 4, 2, 4, 24, max_length=32, residual="block-layers:2", moe=moe)
    torch.manual_seed(0)
    model = AttnResDecoder(config).bfloat16().eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight)
        if name.endswith(("e_score_correction_bias", "_res_norm.weight", "_res_proj.weight")):
            weight.data = weight.data.float()  # what the release keeps in fp32 stays in fp32
    fields = hf_config(
        config,
        attn_res_block_size=2,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=8,
        num_shared_experts=2,
        moe_router_activation_func="sigmoid",
        moe_renormalize=True,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
    )
    path = write(tmp_path / "c", renamed(model.state_dict(), [*spelling, *NAMES["kimi-k3"]]), fields)
    same(load_checkpoint(path, "kimi-k3"), model)
    assert load_checkpoint(path, "kimi-k3", dtype=torch.float32)(ids(model)).dtype == torch.float32


def own_map(tmp_path: Path, config: AttnResConfig, **changes: Any) -> Path:
    """A map for a checkpoint in GPT-2's manner: matrices as [in, out], queries as [d], its own words."""
    matrix = {"transpose": True}
    fields = {
        "config": {**dataclasses.asdict(config)},
        "ignore": ["rope.inv_freq", r"h\.{i}\.attn\.bias"],
        "rules": [
            {"from": "wte", "to": "embed_tokens.weight"},
            {"from": "head", "to": "lm_head.weight", **matrix},
            {"from": "ln_f", "to": "norm.weight"},
            {"regex": r"h\.(?P<i>\d+)\.attn\.(?P<p>[qkvo])", "to": "layers.{i}.self_attn.{p}_proj.weight", **matrix},
            {
                "regex": r"h\.(?P<i>\d+)\.mlp\.(?P<p>gate|up|down)",
                "to": "layers.{i}.mlp.{p}_proj.weight",
                **matrix,
            },
            {"regex": r"h\.(?P<i>\d+)\.n1", "to": "layers.{i}.input_layernorm.weight"},
            {"regex": r"h\.(?P<i>\d+)\.n2", "to": "layers.{i}.post_attention_layernorm.weight"},
            {"from": "h.{i}.r1.w", "to": "layers.{i}.self_attention_res_proj.weight", "reshape": [1, -1]},
            {"from": "h.{i}.r2.w", "to": "layers.{i}.mlp_res_proj.weight", "reshape": [1, -1]},
            {"from": "h.{i}.r1.g", "to": "layers.{i}.self_attention_res_norm.weight"},
            {"from": "h.{i}.r2.g", "to": "layers.{i}.mlp_res_norm.weight"},
            {"from": "out.w", "to": "output_attn_res_proj.weight", "reshape": [1, -1]},
            {"from": "out.g", "to": "output_attn_res_norm.weight"},
        ],
        **changes,
    }
    file = tmp_path / "map.yaml"
    file.write_text(yaml.safe_dump(fields))
    return file


def in_own_words(model: AttnResDecoder) -> State:
    rules = [
        (r"embed_tokens.weight", "wte"),
        (r"lm_head.weight", "head"),
        (r"^norm.weight", "ln_f"),
        (r"layers\.(\d+)\.self_attn\.(.)_proj.weight", r"h.\1.attn.\2"),
        (r"layers\.(\d+)\.mlp\.(\w+)_proj.weight", r"h.\1.mlp.\2"),
        (r"layers\.(\d+)\.input_layernorm.weight", r"h.\1.n1"),
        (r"layers\.(\d+)\.post_attention_layernorm.weight", r"h.\1.n2"),
        (r"layers\.(\d+)\.self_attention_res_proj.weight", r"h.\1.r1.w"),
        (r"layers\.(\d+)\.mlp_res_proj.weight", r"h.\1.r2.w"),
        (r"layers\.(\d+)\.self_attention_res_norm.weight", r"h.\1.r1.g"),
        (r"layers\.(\d+)\.mlp_res_norm.weight", r"h.\1.r2.g"),
        (r"output_attn_res_proj.weight", "out.w"),
        (r"output_attn_res_norm.weight", "out.g"),
    ]
    state = {}
    for name, tensor in renamed(model.state_dict(), rules).items():
        turned = re.fullmatch(r"h\.\d+\.(attn|mlp)\.\w+|head", name)
        state[name] = tensor.t().contiguous() if turned else tensor.squeeze(0) if name.endswith(".w") else tensor
    return {**state, "rope.inv_freq": torch.ones(2), "h.0.attn.bias": torch.ones(3, dtype=torch.int64)}


def test_a_map_of_the_users_own(tmp_path: Path, tiny: AttnResDecoder) -> None:
    path = write(tmp_path / "c", in_own_words(tiny), None)
    same(load_checkpoint(path, own_map(tmp_path, tiny.config)), tiny)


def test_keys_without_gain_make_a_decoder_without_gains(tmp_path: Path) -> None:
    config = AttnResConfig(48, 16, 2, 4, 2, 4, 24, max_length=32, residual="block-layers:1", key_norm_gain=False)
    torch.manual_seed(0)
    model = AttnResDecoder(config).eval()
    path = write(tmp_path / "c", renamed(model.state_dict(), NAMES["fla"]), fla_config(config, 2))
    same(load_checkpoint(path, "fla"), model)


def test_an_output_matrix_that_repeats_the_embedding_is_taken(tmp_path: Path, trained: AttnResDecoder) -> None:
    state = renamed(trained.state_dict(), NAMES["fla"])
    state["lm_head.weight"] = state["model.embeddings.weight"].clone()
    config = fla_config(trained.config, 2 * (trained.config.block_layers or 0))
    same(load_checkpoint(write(tmp_path / "c", state, config), "fla"), trained)
    state["lm_head.weight"][3, 5] += 1
    refused(write(tmp_path / "c", state, config), "checkpoint.tied", "fla")


# --- refusals -----------------------------------------------------------------------------------------------------


def refused(path: Path, code: str, scheme: str | Path | None = None) -> DepthwireError:
    with pytest.raises((CaptureError, UsageError)) as caught:
        load_checkpoint(path, scheme)
    error = caught.value
    assert error.code == code
    assert None not in (error.at, error.want, error.got, error.todo)
    return error


def test_what_is_left_over_or_missing_is_named(tmp_path: Path, tiny: AttnResDecoder) -> None:
    state, config = renamed(tiny.state_dict(), NAMES["fla"]), fla_config(tiny.config, 1)
    more = {**state, "model.layers.0.attn.q_norm.weight": torch.ones(4)}
    error = refused(write(tmp_path / "a", more, config), "checkpoint.left-over", "fla")
    assert "model.layers.0.attn.q_norm.weight" in str(error.at)
    less = {name: tensor for name, tensor in state.items() if name != "model.layers.1.mlp_res_proj.weight"}
    error = refused(write(tmp_path / "b", less, config), "checkpoint.missing", "fla")
    assert error.got == "layers.1.mlp_res_proj.weight"
    error = refused(write(tmp_path / "c", state, {**config, "num_hidden_layers": 2}), "checkpoint.left-over", "fla")
    assert "model.layers.2.attn_norm.weight" in str(error.got)


def test_two_tensors_for_one_place_are_refused(tmp_path: Path, tiny: AttnResDecoder) -> None:
    state = renamed(tiny.state_dict(), NAMES["fla"])
    state["norm.weight"] = state["model.norm.weight"].clone()
    refused(write(tmp_path / "c", state, fla_config(tiny.config, 1)), "checkpoint.twice", "fla")


def test_a_shape_that_differs_is_refused(tmp_path: Path, tiny: AttnResDecoder) -> None:
    state, config = renamed(tiny.state_dict(), NAMES["fla"]), fla_config(tiny.config, 1)
    error = refused(write(tmp_path / "a", state, {**config, "intermediate_size": 25}), "checkpoint.shape", "fla")
    assert (error.want, error.got) == ("[16, 25] for layers.0.mlp.down_proj.weight", "[16, 24]")
    words = write(tmp_path / "b", in_own_words(tiny), None)
    fields = yaml.safe_load(own_map(tmp_path, tiny.config).read_text())
    fields["rules"][2]["reshape"] = [5, -1]
    error = refused(words, "checkpoint.shape", own_map(tmp_path, tiny.config, rules=fields["rules"]))
    assert "reshape [5, -1]" in str(error.want)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("qk_norm", True),
        ("window_size", 128),
        ("hidden_act", "gelu"),
        ("attnres_block_size", 3),
        ("attnres_block_size", None),
        ("kv_lora_rank", 512),
        ("linear_attn_config", {"kda_layers": [1]}),
        ("rope_theta", None),
        ("hidden_size", "16"),
        ("num_heads", None),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}),
        ("num_kv_heads", 3),
    ],
)
def test_a_configuration_beyond_the_decoder_is_refused(
    tmp_path: Path, tiny: AttnResDecoder, field: str, value: object
) -> None:
    config = {**fla_config(tiny.config, 1), field: value}
    refused(write(tmp_path / "c", renamed(tiny.state_dict(), NAMES["fla"]), config), "checkpoint.config", "fla")


@pytest.mark.parametrize(
    "text",
    [
        "rules: []",
        "rules: [{to: x}]",
        "rules: [{from: a, regex: b, to: c}]",
        "rules: [{regex: 'a(', to: c}]",
        "rules: [{from: 'a.{i}', to: 'b.{j}'}]",
        "rules: [{from: a, transposed: true}]",
        "rules: [{from: a}]\nignore: ['(']",
        "rules: [{from: a",
        "- 3",
        "",
    ],
)
def test_a_map_that_cannot_be_read_is_refused(tmp_path: Path, tiny: AttnResDecoder, text: str) -> None:
    file = tmp_path / "map.yaml"
    file.write_text(text)
    refused(write(tmp_path / "c", tiny.state_dict(), None), "checkpoint.map", file)


def test_files_that_are_not_there_or_not_whole_are_refused(tmp_path: Path, tiny: AttnResDecoder) -> None:
    good = write(tmp_path / "good", renamed(tiny.state_dict(), NAMES["fla"]), fla_config(tiny.config, 1))
    refused(tmp_path / "nowhere", "checkpoint.no-weights", "fla")
    refused(good, "checkpoint.map", "no-such-map")
    refused(good, "checkpoint.config")  # another's names without a map
    shards = write(tmp_path / "shards", renamed(tiny.state_dict(), NAMES["fla"]), fla_config(tiny.config, 1), 3)
    (shards / "model-00002-of-00003.safetensors").unlink()
    refused(shards, "checkpoint.no-weights", "fla")
    outside = {"weight_map": {"a": "../good/model.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(outside))
    refused(shards, "checkpoint.corrupt", "fla")
    file = good / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    refused(good, "checkpoint.corrupt", "fla")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(tiny.state_dict(), pickled / "pytorch_model.bin")
    refused(pickled, "checkpoint.no-weights", "fla")


def test_weights_that_are_no_floats_are_refused(tmp_path: Path, tiny: AttnResDecoder) -> None:
    state = renamed(tiny.state_dict(), NAMES["fla"])
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 16, dtype=torch.int8)
    refused(write(tmp_path / "c", state, fla_config(tiny.config, 1)), "checkpoint.quantized", "fla")


@pytest.mark.parametrize("directory", [TRAINED, TRAINED.with_name("attn_res_small_full")], ids=["block", "full"])
def test_the_trained_queries_are_far_from_zero(directory: Path) -> None:
    """What tests of native models rely on: a read that came out as the mean of its sources would be noticed."""
    assert {tensor.dtype for tensor in load_file(directory / "model.safetensors").values()} == {torch.bfloat16}
    model = AttnResDecoder.load(directory).float()
    text = torch.tensor(list((TRAINED.parent / "sotu-2000.txt").read_bytes()[: 4 * 128])).view(4, 128)

    def loss() -> float:
        with torch.inference_mode():
            logits = model(text)[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()))

    trained = loss()
    assert trained < 1.9  # 1.45 and 1.60 on the whole text, in windows of twice the length
    for name, weight in model.named_parameters():
        if name.endswith("res_proj.weight"):
            torch.nn.init.zeros_(weight)
    assert loss() > trained + 0.5
