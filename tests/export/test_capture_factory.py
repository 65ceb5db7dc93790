"""``package.module:factory``: found, called, refused."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from depthwire.errors import CaptureError, UsageError
from depthwire.export.capture import capture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FACTORY = """
import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
    def forward(self, left, right):
        import lazy_helper
        return left * self.weight + right

class Holder:
    @staticmethod
    def make():
        return Pair(), (torch.ones(2, 3), torch.zeros(2, 3))

def with_inputs():
    return Pair(), {"right": torch.zeros(2, 3), "left": torch.ones(2, 3)}
def with_list():
    return Pair(), [torch.ones(2, 3), torch.zeros(2, 3)]
def alone():
    return Pair()
def wrong():
    return 3
def wrong_pair():
    return Pair(), "text"
def wrong_inputs():
    return Pair(), {"left": 3}
def wrong_names():
    return Pair(), {"left": torch.ones(3), "rihgt": torch.ones(3)}
def raises():
    raise RuntimeError("no weights here")
def needs_an_argument(path):
    return Pair()
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16))
number = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "my_models").mkdir()
    (tmp_path / "my_models" / "__init__.py").write_text("")
    (tmp_path / "my_models" / "factories.py").write_text(FACTORY)
    (tmp_path / "my_models" / "broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "lazy_helper.py").write_text("")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_models", "my_models.factories", "my_models.broken", "lazy_helper"):
        sys.modules.pop(name, None)


# --- factories -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("function", ["with_inputs", "with_list", "Holder.make"])
def test_a_factory_in_the_working_directory(function: str) -> None:
    path = list(sys.path)
    program = capture(f"my_models.factories:{function}")
    assert program.source.kind == "factory"
    assert program.source.reference == f"my_models.factories:{function}"
    assert program.source.model == "Pair"
    assert program.source.task is None
    assert program.source.sha256 == {}
    assert program.input_names == ("left", "right")
    assert torch.equal(program.example_inputs["left"], torch.ones(2, 3))
    assert program.output_names == ("output_0",)
    assert list(program.exported.state_dict) == ["weight"]
    assert torch.equal(program.module()(torch.ones(2, 3), torch.ones(2, 3)), torch.full((2, 3), 2.0))
    assert sys.path == path


@pytest.mark.usefixtures("factories")
def test_a_factory_of_a_module_takes_inputs_from_the_caller() -> None:
    inputs = {"left": torch.ones(1, 3), "right": torch.ones(1, 3)}
    assert capture("my_models.factories:alone", example_inputs=inputs).example_inputs["left"].shape == (1, 3)


@pytest.mark.usefixtures("factories")
def test_a_factory_of_a_transformers_model_needs_no_inputs() -> None:
    pytest.importorskip("transformers")
    program = capture("my_models.factories:llama", seq_len=4, batch=2)
    assert program.source.task == "causal-lm"
    assert program.example_inputs["input_ids"].shape == (2, 4)


@pytest.mark.usefixtures("factories")
def test_a_factorys_module_is_converted() -> None:
    program = capture("my_models.factories:with_inputs", dtype="bf16")
    assert program.exported.state_dict["weight"].dtype == torch.bfloat16
    assert program.example_inputs["left"].dtype == torch.bfloat16


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("reference", "code", "got"),
    [
        ("my_models.absent:make", "capture.factory-import", "ModuleNotFoundError"),
        ("my_models.broken:make", "capture.factory-import", "a_package_that_is_not_there"),
        ("my_models.factories:absent", "capture.factory-import", "AttributeError"),
        ("my_models.factories:number", "capture.factory-not-callable", "int"),
        ("my_models.factories:raises", "capture.factory-failed", "no weights here"),
        ("my_models.factories:needs_an_argument", "capture.factory-failed", "path"),
        ("my_models.factories:wrong", "capture.factory-return", "int"),
        ("my_models.factories:wrong_pair", "capture.factory-return", "str"),
        ("my_models.factories:wrong_inputs", "capture.factory-return", "int"),
        ("my_models.factories:alone", "capture.no-example-inputs", "a module alone"),
    ],
)
def test_each_failure_of_a_factory_has_its_error(reference: str, code: str, got: str) -> None:
    with pytest.raises(CaptureError) as raised:
        capture(reference)
    assert raised.value.code == code
    assert got in str(raised.value.got)
    assert raised.value.todo


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("function", "options", "code"),
    [
        ("wrong_names", {}, "capture.example-inputs"),
        ("with_inputs", {"example_inputs": (torch.ones(3),)}, "capture.example-inputs"),
        ("with_inputs", {"seq_len": 3}, "capture.option-without-effect"),
        ("with_inputs", {"batch": 2}, "capture.option-without-effect"),
        ("with_inputs", {"revision": "main"}, "capture.option-without-effect"),
        ("with_inputs", {"trust_remote_code": True}, "capture.option-without-effect"),
    ],
)
def test_options_without_effect_on_a_factory(function: str, options: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as raised:
        capture(f"my_models.factories:{function}", **options)
    assert raised.value.code == code
