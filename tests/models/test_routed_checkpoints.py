"""Routed models from dense checkpoints: every weight accounted for, and the dense function kept at capacity 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from depthwire.errors import CaptureError, UsageError
from depthwire.models.attn_res import AttnResDecoder
from depthwire.models.attn_res_config import AttnResConfig
from depthwire.models.routed_checkpoints import build, from_pretrained, load_routed
from depthwire.models.routing_config import RoutedConfig, RoutingConfig
from depthwire.runtime.tolerances import LOOSEST_RTOL
from tests.models.routed import KINDS, ids, make

if TYPE_CHECKING:
    from depthwire.models.routing_config import Kind

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCKS = KINDS[:3]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with its own output matrix, in fp32, as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    directory = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def changed(source: Path, target: Path, **config: object) -> Path:
    shutil.copytree(source, target)
    fields = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**fields, **config}))
    return target


def refused(directory: Path, kind: Kind = "subjective_depth") -> CaptureError:
    with pytest.raises(CaptureError) as error:
        from_pretrained(directory, kind)
    return error.value


@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_a_converted_llama_is_that_llama_at_capacity_1(kind: Kind, llama: Path) -> None:
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    tokens = ids() % 64
    # Weights that were stored in fp32 and angles made in fp32: their products differ in the last digits of fp32.
    for rule in ("top-k", "budget"):
        found = from_pretrained(llama, kind, RoutingConfig(capacity=1.0, rule=rule), dtype=torch.float64)
        torch.testing.assert_close(found.model(tokens), reference(tokens).logits, rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    got, want = found.model(tokens, mask), reference(tokens, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_weight_is_accounted_for(kind: Kind, llama: Path) -> None:
    stored = load_file(llama / "model.safetensors")
    found = from_pretrained(llama, kind)
    assert {name.removeprefix("model.") for name in stored} == set(found.loaded)
    state = found.model.state_dict()
    assert set(found.loaded) | set(found.new) == set(state)
    assert not set(found.loaded) & set(found.new)
    assert all(torch.equal(state[name.removeprefix("model.")], weight) for name, weight in stored.items())
    parts = (".prior.", ".transition.", ".router.", ".surprise.", ".threshold")
    assert all(any(part in name for part in parts) for name in found.new)


def test_what_does_not_add_up_is_one_error(llama: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    for name, state, code in (
        ("more", {**weights, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, "checkpoint.left-over"),
        ("router", {**weights, "model.layers.1.threshold": torch.zeros(())}, "checkpoint.left-over"),
        ("fewer", {k: v for k, v in weights.items() if k != "model.layers.3.mlp.up_proj.weight"}, "checkpoint.missing"),
        ("twice", {**weights, "norm.weight": torch.ones(32)}, "checkpoint.twice"),
        ("shape", {**weights, "model.norm.weight": torch.ones(31)}, "checkpoint.shape"),
    ):
        directory = changed(llama, tmp_path / name)
        save_file(state, directory / "model.safetensors")
        error = refused(directory)
        assert error.code == code, name
    assert refused(changed(llama, tmp_path / "layers", num_hidden_layers=3)).code == "checkpoint.left-over"
    assert refused(changed(llama, tmp_path / "deeper", num_hidden_layers=5)).code == "checkpoint.missing"
    assert refused(changed(llama, tmp_path / "tied", tie_word_embeddings=True)).code == "checkpoint.tied"
    assert refused(changed(llama, tmp_path / "gpt", model_type="gpt2")).code == "checkpoint.config"
    assert refused(changed(llama, tmp_path / "biased", attention_bias=True)).code == "checkpoint.config"
    yarn = changed(llama, tmp_path / "yarn", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})
    assert refused(yarn).code == "checkpoint.config"
    assert refused(tmp_path / "none").code == "checkpoint.no-weights"


@torch.no_grad()
def test_an_attn_res_checkpoint_gets_routers(tmp_path: Path) -> None:
    directory = ROOT / "tests" / "data" / "attn_res_small"
    dense = AttnResDecoder.load(directory).double()
    routing = RoutingConfig(capacity=1.0, unit="both", predictor=True, fallback="prior")
    found = from_pretrained(directory, "attn_res", routing, dtype=torch.float64)
    assert set(found.loaded) == set(dense.state_dict())
    # Two fp64 computations of one function; the queries are bf16 in one and fp64 of the same values in the other.
    torch.testing.assert_close(found.model(ids()), dense(ids()), rtol=1e-9, atol=1e-9)
    found.model.capacity = 0.5
    assert (found.model(ids()) - dense(ids())).abs().max() > 0.1
    with pytest.raises(UsageError) as error:
        from_pretrained(directory, "mixture_of_depths")
    assert error.value.code == "routed-model.config"
    dense.config.save(tmp_path / "config.json")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_saved_is_loaded(kind: Kind, tmp_path: Path) -> None:
    model = make(kind, rule="budget").float()
    model.cast(torch.bfloat16).save(tmp_path)
    again = load_routed(tmp_path)
    assert again.config == model.config
    state = again.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    thresholds = [weight for name, weight in state.items() if name.endswith("threshold")]
    assert all(threshold.dtype == torch.float32 and bool(threshold.isfinite()) for threshold in thresholds)
    assert torch.equal(again(ids()), model(ids()))


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    make("mixture_of_depths").save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for changes, code in (
        ({"layers.1.router.proj.weight": None}, "checkpoint.missing"),
        ({"layers.0.router.proj.weight": torch.ones(1, 64)}, "checkpoint.left-over"),
        ({"layers.1.router.proj.weight": torch.ones(1, 63)}, "checkpoint.shape"),
    ):
        save_file({k: v for k, v in {**state, **changes}.items() if v is not None}, tmp_path / "model.safetensors")
        with pytest.raises(CaptureError) as error:
            load_routed(tmp_path)
        assert error.value.code == code
    fields = json.loads((tmp_path / "config.json").read_text())
    for broken in ({"model_type": "llama"}, {"kind": "moe"}, {"routing": {"capacity": 2.0}}, {"extra": 1}):
        (tmp_path / "config.json").write_text(json.dumps({**fields, **broken}))
        with pytest.raises(CaptureError) as error:
            load_routed(tmp_path)
        assert error.value.code == "checkpoint.config"


DECODER = AttnResConfig(64, 32, 4, 4, 2, 8, 48, residual="plain")


@pytest.mark.parametrize(
    ("kind", "routing", "at"),
    [
        ("mixture_of_depths", {"capacity": 0.0}, "capacity"),
        ("mixture_of_depths", {"capacity": 1.5}, "capacity"),
        ("mixture_of_depths", {"capacity": float("nan")}, "capacity"),
        ("mixture_of_depths", {"margin": -1}, "margin"),
        ("mixture_of_depths", {"window": 0}, "window"),
        ("mixture_of_depths", {"prior_factor": 0.0}, "prior_factor"),
        ("mixture_of_depths", {"layers": (4,)}, "routing.layers"),
        ("mixture_of_depths", {"layers": (3, 1)}, "layers"),
        ("mixture_of_depths", {"layers": ()}, "routing.layers"),
        ("mixture_of_depths", {"unit": "mlp"}, "routing.unit"),
        ("mixture_of_depths", {"fallback": "prior"}, "routing.fallback"),
        ("subjective_depth", {"layers": (0, 2)}, "routing.layers"),
        ("subjective_depth", {"layers": (1, 2)}, "routing.layers"),
        ("attn_res", {"unit": "both"}, "decoder.residual"),
        ("unheard_of", {}, "kind"),
    ],
)
def test_what_cannot_be_routed_is_refused(kind: Kind, routing: dict[str, object], at: str) -> None:
    with pytest.raises(UsageError) as error:
        build(RoutedConfig(kind, DECODER, RoutingConfig(**routing)))  # type: ignore[arg-type]
    assert (error.value.code, error.value.at) == ("routed-model.config", at)


@torch.no_grad()
def test_smollm2_keeps_its_function(smollm2_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    from depthwire.runtime.tolerances import tolerance

    reference = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    tokens = torch.randint(0, 49152, (1, 32), generator=torch.Generator().manual_seed(0))
    want = reference(tokens).logits
    bound = tolerance("float32", "logits")
    for kind in BLOCKS:
        found = from_pretrained(smollm2_dir, kind, RoutingConfig(capacity=1.0))
        assert len(found.loaded) == 272
        worst = (found.model(tokens) - want).abs().max()
        assert worst <= bound.atol + bound.rtol * want.abs().max()
        found.model.capacity = 0.5
        assert (found.model(tokens) - want).abs().max() > LOOSEST_RTOL * want.abs().max()
