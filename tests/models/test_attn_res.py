"""The reference decoder against other implementations and against the equations of the paper."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from depthwire.errors import CaptureError, UsageError
from depthwire.models import attn_res
from depthwire.models._layers import MixtureOfExperts
from depthwire.models.attn_res import AttnResConfig, AttnResDecoder, MoeConfig
from depthwire.ops import attn_res_read_reference

if TYPE_CHECKING:
    from pathlib import Path

SMALL = AttnResConfig(
    vocab_size=64, width=32, layers=5, heads=4, kv_heads=2, head_dim=8, mlp_width=48, max_length=32, eps=1e-5
)
# fp64 throughout: two orders of summation over at most a few hundred terms stay far below this.
FP64 = 1e-10


def make(seed: int = 0, **changes: Any) -> AttnResDecoder:
    """A decoder in fp64 with every parameter drawn, queries, gains and biases among them."""
    torch.manual_seed(seed)
    model = AttnResDecoder(dataclasses.replace(SMALL, **changes)).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("res_proj.weight"):
                weight.normal_(std=0.5)
    return model


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def mixture(config: MoeConfig) -> MixtureOfExperts:
    moe = make(moe=config).layers[0].mlp
    assert isinstance(moe, MixtureOfExperts)
    return moe


def close(got: Tensor, want: Tensor, *, rtol: float = FP64, atol: float = FP64) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


# --- the plain decoder is a Llama ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_plain_decoder_computes_what_transformers_llama_computes(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = make(residual="plain", tied_embeddings=tied)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    llama = LlamaForCausalLM(config).double().eval()
    state = {name if name.startswith("lm_head") else f"model.{name}": t for name, t in model.state_dict().items()}
    missing, left_over = llama.load_state_dict(state, strict=False)
    assert left_over == []
    assert missing == (["lm_head.weight"] if tied else [])
    # transformers computes RMSNorm and the rotary angles in fp32 even in an fp64 model.
    close(model(ids()), llama(ids()).logits, rtol=1e-4, atol=1e-5)


def test_mixture_of_experts_computes_what_transformers_mixtral_computes() -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    moe = MoeConfig(experts=6, top_k=2, width=16)
    ours = mixture(moe)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=16, num_local_experts=6, num_experts_per_tok=2, hidden_act="silu"
    )
    config._experts_implementation = "eager"
    theirs: Any = MixtralSparseMoeBlock(config).double().eval()
    state = ours.state_dict()
    halves = [
        torch.cat([state[f"experts.{e}.gate_proj.weight"], state[f"experts.{e}.up_proj.weight"]]) for e in range(6)
    ]
    theirs.load_state_dict(
        {
            "gate.weight": state["gate.weight"],
            "experts.gate_up_proj": torch.stack(halves),
            "experts.down_proj": torch.stack([state[f"experts.{e}.down_proj.weight"] for e in range(6)]),
        }
    )
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    result = theirs(x)
    # transformers takes the softmax of the router in fp32 even in an fp64 model.
    close(ours(x), result[0] if isinstance(result, tuple) else result, rtol=1e-5, atol=1e-6)


# --- the reads are the paper's ------------------------------------------------------------------------------------


class Taps:
    """What went into every pre-norm and came out of every sublayer, in order of execution."""

    def __init__(self, model: AttnResDecoder) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        for layer in model.layers:
            for norm, part in (
                (layer.input_layernorm, layer.self_attn),
                (layer.post_attention_layernorm, layer.mlp),
            ):
                assert isinstance(norm, nn.Module)
                assert isinstance(part, nn.Module)
                norm.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]))
                part.register_forward_hook(lambda _, __, out: self.outputs.append(out))
        model.norm.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]))


def paper_sources(embedding: Tensor, outputs: list[Tensor], size: int, index: int) -> list[Tensor]:
    """Sources of sublayer ``index`` by equations of section 3: finished blocks of ``size`` sublayers, open block."""
    blocks = [outputs[start : start + size] for start in range(0, index, size)]
    sums = [torch.stack([*block[: index - number * size]]).sum(0) for number, block in enumerate(blocks)]
    return [embedding, *sums]


@pytest.mark.parametrize(("residual", "size"), [("full", 1), *((f"block-layers:{k}", 2 * k) for k in (1, 2, 3, 5, 7))])
@pytest.mark.parametrize("gain", [True, False])
def test_every_read_mixes_the_sources_of_the_paper(residual: str, size: int, gain: bool) -> None:
    model = make(residual=residual, key_norm_gain=gain)
    taps = Taps(model)
    model(ids())
    embedding = model.embed_tokens(ids())
    state = model.state_dict()
    names = [f"layers.{i}.{part}_res" for i in range(SMALL.layers) for part in ("self_attention", "mlp")]
    names.append("output_attn_res")
    assert len(taps.inputs) == len(names) == 2 * SMALL.layers + 1
    for index, (name, got) in enumerate(zip(names, taps.inputs, strict=True)):
        query = state[f"{name}_proj.weight"][0] * (state[f"{name}_norm.weight"] if gain else 1)
        sources = paper_sources(embedding, taps.outputs, size, index)
        close(got, attn_res_read_reference(query, sources, SMALL.eps, 1.0))


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 9])
def test_reads_have_the_source_counts_of_kimi_k3(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    read = attn_res.depth_read

    def counted(sources: list[Tensor], proj: nn.Linear, norm: nn.RMSNorm) -> Tensor:
        counts.append(len(sources))
        return read(sources, proj, norm)

    monkeypatch.setattr(attn_res, "depth_read", counted)
    make(residual=f"block-layers:{blocks}")(ids())
    want = []
    for layer in range(SMALL.layers):
        want += [math.ceil(layer / blocks) + 1, layer // blocks + 2]
    assert counts == [*want, math.ceil(SMALL.layers / blocks) + 1]


def test_queries_start_at_zero_and_then_every_read_is_a_mean() -> None:
    torch.manual_seed(0)
    model = AttnResDecoder(dataclasses.replace(SMALL, residual="block-layers:2")).double()
    queries = [weight for name, weight in model.named_parameters() if name.endswith("res_proj.weight")]
    assert len(queries) == 2 * SMALL.layers + 1
    assert all(not weight.any() for weight in queries)
    taps = Taps(model)
    model(ids())
    sources = paper_sources(model.embed_tokens(ids()), taps.outputs, 4, 5)
    assert len(sources) == 3
    close(taps.inputs[5], torch.stack(sources).mean(0))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("residual", ["full", "block-layers:2"])
def test_with_zero_queries_and_no_eps_it_is_the_plain_decoder(residual: str, norm: str) -> None:
    lifted, plain = make(residual=residual, norm=norm, eps=1e-30), make(residual="plain", norm=norm, eps=1e-30)
    state = lifted.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    differs = (lifted(ids()) - plain(ids())).abs().max()
    assert differs > 0.01  # drawn queries choose
    for name, weight in lifted.named_parameters():
        if name.endswith("res_proj.weight"):
            nn.init.zeros_(weight)
    close(lifted(ids()), plain(ids()))


def test_a_token_does_not_see_later_ones() -> None:
    model, tokens = make(residual="block-layers:2"), ids()
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % SMALL.vocab_size
    close(model(changed)[:, :7], model(tokens)[:, :7])
    assert (model(changed)[:, 7:] - model(tokens)[:, 7:]).abs().max() > 1e-3


# --- mixture of experts -------------------------------------------------------------------------------------------

ROUTERS = [
    MoeConfig(experts=5, top_k=2, width=16),
    MoeConfig(experts=5, top_k=1, width=16, router="sigmoid", selection_bias=True, scale=2.5),
    MoeConfig(experts=4, top_k=4, width=8, shared_width=12),
]


def by_token(moe: MixtureOfExperts, config: MoeConfig, x: Tensor) -> Tensor:
    """Each token sent to its experts alone, one after the other."""
    state, out = moe.state_dict(), torch.zeros_like(x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).tolist():
        token = x[tuple(place)]
        logits = state["gate.weight"] @ token
        scores = logits.softmax(0) if config.router == "softmax" else logits.sigmoid()
        ranked = scores + state.get("gate.e_score_correction_bias", torch.zeros(()))
        chosen = sorted(range(config.experts), key=lambda e: -float(ranked[e]))[: config.top_k]
        total = sum(scores[e] for e in chosen)
        for e in chosen:
            out[tuple(place)] += config.scale * scores[e] / total * moe.experts[e](token)
        if moe.shared_experts is not None:
            out[tuple(place)] += moe.shared_experts(token)
    return out


@pytest.mark.parametrize("config", ROUTERS)
@pytest.mark.parametrize("starved", [False, True])
def test_a_mixture_is_right_for_any_split_of_the_tokens(config: MoeConfig, starved: bool) -> None:
    moe = mixture(config)
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if starved:  # all tokens alike: every expert but the chosen ones receives none
        x = x[:1, :1].expand(2, 7, 32)
    weights = moe.gate(x)
    assert ((weights != 0).sum(-1) == config.top_k).all()
    assert ((weights != 0).any(0).any(0).sum() == config.top_k) == (starved or config.top_k == config.experts)
    close(moe(x), by_token(moe, config, x))


def test_the_selection_bias_chooses_and_does_not_weigh() -> None:
    moe = mixture(ROUTERS[1])
    assert moe.gate.e_score_correction_bias is not None
    x = torch.randn(1, 50, 32, dtype=torch.float64)
    with torch.no_grad():
        moe.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 0, 0, 0, 0]))
    assert (moe.gate(x)[..., 0] == 2.5).all()


def test_the_first_layers_may_stay_dense() -> None:
    model = make(moe=MoeConfig(experts=3, top_k=1, width=8, dense_layers=2))
    kinds = [type(layer.mlp).__name__ for layer in model.layers]
    assert kinds == ["Mlp"] * 2 + ["MixtureOfExperts"] * 3


@pytest.mark.parametrize("config", ROUTERS)
def test_a_mixture_exports_with_static_shapes(config: MoeConfig) -> None:
    model = make(moe=config, residual="block-layers:2")
    exported = torch.export.export(model, (), {"input_ids": ids()}).module()
    other = (ids() * 7 + 3) % SMALL.vocab_size  # another split of the tokens than the one exported with
    close(exported(input_ids=other), model(other))


# --- precision, files, refusals -----------------------------------------------------------------------------------


def test_a_bf16_decoder_reads_in_fp32() -> None:
    model = make(residual="full").bfloat16()
    layer = model.layers[3]
    sources = [torch.randn(1, 4, 32).bfloat16() for _ in range(7)]
    got = attn_res.depth_read(sources, layer.mlp_res_proj, layer.mlp_res_norm)  # type: ignore[arg-type]
    query = (layer.mlp_res_proj.weight[0].float() * layer.mlp_res_norm.weight.float()).detach()  # type: ignore[union-attr, operator, index]
    want = attn_res_read_reference(query, [source.float() for source in sources], SMALL.eps, 1.0)
    assert got.dtype == torch.bfloat16
    # Rounding to bf16 happens once, at the end: half a unit in the last of 8 bits, plus the noise of fp32.
    close(got.float(), want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("changes", [{}, {"moe": ROUTERS[1], "residual": "block-layers:3", "tied_embeddings": False}])
def test_what_was_saved_loads_as_it_was(tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    model = make(**changes).to(dtype)
    model.save(tmp_path / "model")
    loaded = AttnResDecoder.load(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    want = model.state_dict()
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == dict.fromkeys(want, dtype)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, want[name]), name
    assert torch.equal(loaded(ids()), model(ids()))


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({"width": 0}, "width"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"residual": "block:2"}, "residual"),
        ({"residual": "block-layers:0"}, "residual"),
        ({"norm": "batchnorm"}, "norm"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_a_shape_that_makes_no_decoder_is_refused(changes: dict[str, Any], at: str) -> None:
    with pytest.raises(UsageError) as caught:
        dataclasses.replace(SMALL, **changes)
    assert (caught.value.code, caught.value.at) == ("attn-res.config", at)


@pytest.mark.parametrize("sizes", [{"experts": 2, "top_k": 3}, {"top_k": 0}, {"shared_width": -1}])
def test_a_mixture_that_makes_no_sense_is_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"attn-res\.config"):
        dataclasses.replace(MoeConfig(experts=4, top_k=2, width=8), **sizes)


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"depth": 3}, "depth: Unexpected"),
        ({"width": "32"}, "width: Input should be a valid integer"),
        ({"heads": 3}, "kv_heads"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(fields: dict[str, object], got: str) -> None:
    with pytest.raises(CaptureError, match=r"checkpoint\.config") as caught:
        AttnResConfig.from_dict({**dataclasses.asdict(SMALL), **fields}, at="here")
    assert got in str(caught.value.got)


@pytest.mark.parametrize("factory", [attn_res.full, attn_res.block, attn_res.plain])
def test_the_factories_return_a_model_and_its_inputs(factory: Any) -> None:
    state = torch.random.get_rng_state()
    (model, inputs), (again, _) = factory(), factory()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(model(**inputs), again(**inputs))
