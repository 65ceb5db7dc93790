"""A .pt2 file: what loads, and which files are refused."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from depthwire.errors import CaptureError, UsageError
from depthwire.export.capture import capture
from depthwire.program import METADATA
from tests.export.pt2_files import MODEL, SAMPLES, Members, Small, saved_members, saved_program, write

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def saved() -> bytes:
    return saved_program()


@pytest.fixture
def members() -> Members:
    return saved_members()


# --- what loads ------------------------------------------------------------------------------------------------------


def test_a_saved_program_loads_with_its_values_names_and_ties(tmp_path: Path, saved: bytes) -> None:
    file = tmp_path / "small.pt2"
    file.write_bytes(saved)
    program = capture(file)
    torch.manual_seed(0)
    expected = Small()(torch.ones(2, 3, 4))
    outputs = program.module()(torch.ones(2, 3, 4))
    assert program.output_names == ("hidden", "pooled")
    assert program.input_names == ("x",)
    assert torch.equal(outputs["hidden"], expected["hidden"])
    state = program.exported.state_dict
    assert state["first.weight"].data_ptr() == state["second.weight"].data_ptr()
    assert program.source.kind == "pt2"
    assert list(program.source.sha256) == ["small.pt2"]
    assert program.example_inputs["x"].shape == (2, 3, 4)


def test_a_program_of_ours_goes_through_save_and_capture(tmp_path: Path) -> None:
    program = capture(Small(), example_inputs=(torch.ones(2, 3, 4),))
    program.save(tmp_path / "program.pt2")
    again = capture(tmp_path / "program.pt2")
    inputs = torch.randn(2, 3, 4)
    for left, right in zip(program.module()(inputs), again.module()(inputs), strict=True):
        assert torch.equal(left, right)
    stacks = [node.meta["nn_module_stack"] for node in again.exported.graph.nodes if node.op == "call_function"]
    assert all(stacks)


def test_a_program_with_our_operator_loads(tmp_path: Path) -> None:
    from depthwire.ops import attn_res_read

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = attn_res_read(self.query, [x, 2 * x], 1e-6, 1.0)
            return mixed

    program = capture(Reads(), example_inputs=(torch.ones(2, 4),))
    program.save(tmp_path / "reads.pt2")
    again = capture(tmp_path / "reads.pt2")
    targets = {str(node.target) for node in again.exported.graph.nodes}
    assert "depthwire.attn_res_read.default" in targets
    assert torch.equal(again.module()(torch.ones(2, 4)), torch.full((2, 4), 1.5))


def test_autocast_regions_and_extra_files_load(tmp_path: Path) -> None:
    class Region(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", enabled=False):
                first, second = torch.relu(x).chunk(2, dim=-1)
            return first, torch.einsum("bd,bd->b", second, second)

    file = tmp_path / "region.pt2"
    exported = torch.export.export(Region(), (torch.ones(2, 4),))
    torch.export.save(exported, file, extra_files={"notes.txt": "any text"})
    program = capture(file)
    assert program.output_names == ("output_0", "output_1")
    assert all(node.op != "get_attr" for node in program.exported.graph.nodes)


class Odd(nn.Module):
    """Names with spaces and dashes, string arguments, a message with quotes."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a b": nn.Linear(4, 4), "x-y": nn.GELU("tanh")})
        self.weighed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear").mean((2, 3))
        x = self.weighed(self.parts["x-y"](self.parts["a b"](x)))
        torch._assert(x.shape[0] == 1, 'it\'s "one"')  # type: ignore[no-untyped-call]
        return torch.einsum("bi,bj->bij", x, torch.div(x, 2, rounding_mode="floor"))


@pytest.mark.parametrize("strict", [False, True])
def test_odd_but_honest_programs_load(tmp_path: Path, *, strict: bool) -> None:
    torch.manual_seed(0)
    module, image = Odd().eval(), torch.randn(1, 4, 8, 8)
    torch.export.save(torch.export.export(module, (image,), strict=strict), tmp_path / "odd.pt2")
    program = capture(tmp_path / "odd.pt2")
    assert "parts.a b.weight" in program.exported.state_dict
    torch.testing.assert_close(program.module()(image), module(image))


def test_without_sample_inputs_the_example_is_made_from_the_shapes(tmp_path: Path, members: Members) -> None:
    program = capture(write(tmp_path / "bare.pt2", {**members, SAMPLES: b""}))
    assert program.example_inputs["x"].shape == (2, 3, 4)
    assert program.example_inputs["x"].dtype == torch.float32


def test_outputs_of_transformers_classes_load(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.BertModel(config).eval()
    ids = torch.ones(1, 8, dtype=torch.long)
    with torch.no_grad():
        exported = torch.export.export(model, (), {"input_ids": ids, "attention_mask": ids})
    torch.export.save(exported, tmp_path / "bert.pt2")
    program = capture(tmp_path / "bert.pt2")
    assert program.output_names == ("last_hidden_state", "pooler_output")
    assert program.input_names == ("input_ids", "attention_mask")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("data/aotinductor/model/lib.so", "compiled library"),
        ("data/weights/wrapper.so", "unknown kind"),
        ("executorch/program.pte", "ExecuTorch"),
        ("code/forward.py", "TorchScript"),
        ("data.pkl", "TorchScript"),
        ("models/other.json", "2 programs"),
        ("data/weights/other_weights_config.json", "no program"),
        ("anything", "unknown kind"),
        ("models/../model.json", "plain relative path"),
        ("/etc/passwd", "plain relative path"),
        ("models\\evil.json", "plain relative path"),
        ("data/weights/weight_99", "does not list"),
        ("MODELS/MODEL.json", "occurs twice"),
    ],
)
def test_members_that_do_not_belong_are_refused(name: str, reason: str, members: Members, tmp_path: Path) -> None:
    file = write(tmp_path / "crafted.pt2", {**members, name: b"{}"})
    with pytest.raises(CaptureError) as raised:
        capture(file)
    assert raised.value.code in ("capture.pt2-unsafe", "capture.pt2-invalid")
    assert reason in str(raised.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_occurs_twice_is_refused(members: Members, tmp_path: Path) -> None:
    file = write(tmp_path / "twice.pt2", members)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"archive/{MODEL}", members[MODEL])
    with pytest.raises(CaptureError, match="occurs twice"):
        capture(file)


def test_compressed_members_are_refused(members: Members, tmp_path: Path) -> None:
    file = write(tmp_path / "bomb.pt2", members, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CaptureError, match="compressed"):
        capture(file)


def test_members_larger_than_the_file_are_refused(members: Members, tmp_path: Path) -> None:
    """Many entries of the central directory over one piece of data, each uncompressed: an overlap bomb."""
    file = write(tmp_path / "overlap.pt2", {**members, "extra/a": b"x" * 4000, "extra/b": b"y"})
    data = bytearray(file.read_bytes())
    entries = zipfile.ZipFile(file).infolist()
    first = next(info for info in entries if info.filename.endswith("extra/a"))
    at = data.rindex(b"archive/extra/b") - 46
    data[at + 20 : at + 28] = first.file_size.to_bytes(4, "little") * 2
    data[at + 42 : at + 46] = first.header_offset.to_bytes(4, "little")
    file.write_bytes(bytes(data))
    with pytest.raises(CaptureError) as raised:
        capture(file)
    assert raised.value.code in ("capture.pt2-unsafe", "capture.pt2-invalid")


def test_a_deep_document_is_refused(members: Members, tmp_path: Path) -> None:
    file = write(tmp_path / "deep.pt2", {**members, MODEL: b"[" * 200_000 + b"]" * 200_000})
    with pytest.raises(CaptureError) as raised:
        capture(file)
    assert raised.value.code in ("capture.pt2-unsafe", "capture.pt2-invalid")


@pytest.mark.parametrize("cut", [0, 10, 2000, -1])
def test_a_cut_file_is_refused(cut: int, saved: bytes, tmp_path: Path) -> None:
    file = tmp_path / "cut.pt2"
    file.write_bytes(saved[:cut])
    with pytest.raises(CaptureError) as raised:
        capture(file)
    assert raised.value.code == "capture.pt2-invalid"


def test_weights_that_were_not_saved_are_refused(members: Members, tmp_path: Path) -> None:
    file = write(tmp_path / "empty.pt2", {**members, "data/weights/weight_0": b""})
    with pytest.raises(CaptureError, match="without its weights"):
        capture(file)


def test_a_payload_smaller_than_its_tensor_is_refused(members: Members, tmp_path: Path) -> None:
    file = write(tmp_path / "short.pt2", {**members, "data/weights/weight_0": b"\0" * 8})
    with pytest.raises(CaptureError) as raised:
        capture(file)
    assert raised.value.code == "capture.pt2-invalid"


def test_another_format_version_is_refused(members: Members, tmp_path: Path) -> None:
    file = write(tmp_path / "newer.pt2", {**members, "archive_version": b"7"})
    with pytest.raises(CaptureError) as raised:
        capture(file)
    assert raised.value.code == "capture.pt2-invalid"


# --- what is no danger, but cannot be compiled -----------------------------------------------------------------------


def test_symbolic_shapes_are_refused(tmp_path: Path) -> None:
    exported = torch.export.export(
        Small().eval(), (torch.ones(2, 3, 4),), dynamic_shapes=({0: torch.export.Dim("batch", max=8)},)
    )
    torch.export.save(exported, tmp_path / "dynamic.pt2")
    with pytest.raises(CaptureError) as raised:
        capture(tmp_path / "dynamic.pt2")
    assert raised.value.code == "capture.dynamic-shapes"


def test_inputs_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: int) -> Tensor:
            return x * factor

    torch.export.save(torch.export.export(Scaled(), (torch.ones(2), 3)), tmp_path / "scaled.pt2")
    with pytest.raises(CaptureError) as raised:
        capture(tmp_path / "scaled.pt2")
    assert raised.value.code == "capture.non-tensor"


def test_options_that_would_change_the_program_are_refused(tmp_path: Path, saved: bytes) -> None:
    (tmp_path / "small.pt2").write_bytes(saved)
    with pytest.raises(UsageError) as raised:
        capture(tmp_path / "small.pt2", seq_len=8)
    assert raised.value.code == "capture.option-without-effect"


def _saved(folder: Path, **changes: object) -> Path:
    """Save a small program whose metadata has some entries changed."""
    program = capture(nn.Linear(4, 2), example_inputs=(torch.ones(3, 4),))
    metadata = {"schema_version": 1, "output_names": ["logits"], "task": "causal-lm", "tokenizer": None, **changes}
    torch.export.save(program.exported, folder / "named.pt2", extra_files={METADATA: json.dumps(metadata)})
    return folder / "named.pt2"


def test_a_saved_program_keeps_names_task_and_tokenizer(tmp_path: Path) -> None:
    program = capture(_saved(tmp_path, model="Head", tokenizer="somewhere/model"))
    program.save(tmp_path / "again.pt2")
    again = capture(tmp_path / "again.pt2")
    for found in (program, again):
        assert found.output_names == ("logits",)
        assert (found.source.task, found.source.model) == ("causal-lm", "Head")
        assert found.source.tokenizer_reference() == "somewhere/model"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"output_names": ["logits", "more"]}, "the program has 1"),
        ({"output_names": ["../logits"]}, "pattern"),
        ({"output_names": "logits"}, "valid"),
        ({"task": "speech"}, "causal-lm"),
        ({"schema_version": 2}, "1"),
        ({"surprise": 1}, "not permitted"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, object], word: str) -> None:
    file = _saved(tmp_path, **changes)
    with pytest.raises(CaptureError) as raised:
        capture(file)
    assert raised.value.code == "capture.pt2-invalid"
    assert raised.value.exit_code == 3
    assert METADATA in str(raised.value.got)
    assert word in str(raised.value.got)


def test_one_name_for_two_outputs_is_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x + 2

    exported = torch.export.export(Two(), (torch.ones(2),))
    metadata = json.dumps({"output_names": ["y", "y"]})
    torch.export.save(exported, tmp_path / "two.pt2", extra_files={METADATA: metadata})
    with pytest.raises(CaptureError) as raised:
        capture(tmp_path / "two.pt2")
    assert raised.value.code == "capture.pt2-invalid"
