"""Device bundles for every target: what is in them, the form of their graphs, and what is refused."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from depthwire.errors import BuildError, DepthwireError, ParityError, UsageError
from depthwire.runtime import deploy
from depthwire.runtime._bundle_proxy import LABEL
from depthwire.runtime._bundle_script import script_modules
from depthwire.runtime.bundle import BundleOptions, check_bundle_out, write_bundle
from depthwire.runtime.deploy.manifest import BundleError, Platform, decode, encode, read_bundle, wrong_files
from depthwire.runtime.target import list_targets, load_target
from tests.routed_tiny import write_routed
from tests.runtime.bundles import write_reads

if TYPE_CHECKING:
    from depthwire.artifact import Artifact
    from depthwire.runtime.deploy.manifest import Bundle
    from depthwire.runtime.target import Target


BUILT = [target for target in list_targets() if target.builder != "onnxruntime"]
# Either model for every target; and one for every other JetPack of a board of each family (the rest differ in memory).
CASES: list[tuple[str, str | None, str]] = [
    (target.name, None, kind) for target in BUILT for kind in ("reads", "routed")
]
CASES += [
    (name, jetpack, "reads")
    for name in ("jetson-agx-orin-64", "jetson-thor-t5000")
    for jetpack in load_target(name).jetpacks[1:]
]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A tiny AttnRes and a tiny routed artefact; not to be changed."""
    folder = tmp_path_factory.mktemp("artefacts")
    return {"reads": write_reads(folder / "reads"), "routed": write_routed(folder / "routed", target="decomposed")}


def operators(model: onnx.ModelProto) -> set[str]:
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    return {node.op_type for node in nodes if node.domain == ""}


@pytest.mark.parametrize(("name", "jetpack", "kind"), CASES)
def test_every_target_has_its_bundle(
    artifacts: dict[str, Artifact], name: str, jetpack: str | None, kind: str, tmp_path: Path
) -> None:
    """Written, whole, equal to the goldens in ONNX Runtime, and parsed by TensorRT-RTX as a proxy for the target's."""
    artifact, target = artifacts[kind], load_target(name, jetpack)
    info = write_bundle(artifact, target, tmp_path / "bundle")
    bundle = read_bundle(info.root)
    assert bundle == info.bundle
    assert wrong_files(info.root, bundle) == []
    _check_platform(bundle, target)
    (model,) = bundle.models
    proto = onnx.load(str(info.root / model.file), load_external_data=False)
    assert operators(proto).isdisjoint(target.operators_missing)
    assert model.opset <= (target.parser_opset or model.opset)
    assert not (target.expand_functions and proto.functions)
    (proxy,) = bundle.proxies
    assert (proxy.label, proxy.passed) == (LABEL, True), proxy.detail
    assert "not by the target's TensorRT" in proxy.label
    assert model.predicted_bytes is not None
    assert (len(model.routing) == 2) == (kind == "routed")
    _check_plugins(info.root, bundle, target)


def _check_platform(bundle: Bundle, target: Target) -> None:
    platform = bundle.platform
    assert (bundle.target, platform.boards, platform.l4t, platform.jetpack) == (
        target.name,
        target.boards,
        target.l4t,
        target.jetpack,
    )
    assert platform.package == ("tensorrt_rtx" if target.name == "rtx" else "tensorrt")
    assert platform.compute_capabilities == target.default_compute_capabilities
    assert (platform.tensorrt_at_least, platform.tensorrt_below) == target.tensorrt_range
    assert bundle.builder.workspace_bytes == target.workspace_bytes
    assert not bundle.builder.tf32
    assert set(target.unconfirmed) <= set(bundle.notes)


def _check_plugins(root: Path, bundle: Bundle, target: Target) -> None:
    (model,) = bundle.models
    assert bundle.form == ("plugin" if target.custom_ops == "plugin" else "function")
    if bundle.form == "function":
        assert model.plugins is None
        assert not (root / "plugins").exists()
        return
    assert model.plugins == "plugins/model/depthwire_plugins.py"
    index = json.loads((root / "plugins/model/plugins.json").read_text(encoding="utf-8"))
    assert [index["compute_capability"]] == list(target.default_compute_capabilities)
    proto = onnx.load(str(root / model.file), load_external_data=False)
    custom = [node for node in proto.graph.node if node.domain == "depthwire"]
    assert len(custom) == index["nodes"] > 0
    assert all("plugin_namespace" in {attribute.name for attribute in node.attribute} for node in custom)
    assert {f"plugins/model/{kernel['file']}" for kernel in index["kernels"].values()} <= set(bundle.files)


def test_the_same_artefact_gives_the_same_bundle(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    orin = load_target("jetson-orin-nano-8")
    first, again = (write_bundle(artifacts["routed"], orin, tmp_path / name) for name in ("a", "b"))
    assert first.sha256 == again.sha256
    # Replaced as a whole; what was built beside it stays.
    (tmp_path / "a" / "work").mkdir()
    (tmp_path / "a" / "work" / "model.engine").write_bytes(b"engine")
    (tmp_path / "a" / "left-over").write_bytes(b"x")
    assert write_bundle(artifacts["routed"], orin, tmp_path / "a").sha256 == first.sha256
    assert (tmp_path / "a" / "work" / "model.engine").read_bytes() == b"engine"
    assert not (tmp_path / "a" / "left-over").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_script_needs_no_more_than_it_brings(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    """The modules below lib/ are these files, and import nothing but each other, numpy, TensorRT and Polygraphy."""
    modules = script_modules()
    assert "depthwire.runtime.compare" in modules
    assert "depthwire.runtime.tolerances" in modules
    assert len(modules) <= 20
    root = write_bundle(artifacts["reads"], load_target("rtx"), tmp_path / "bundle").root
    package = Path(deploy.__file__).parent.parent.parent
    for name in modules:
        inner = Path(*name.split(".")).with_suffix(".py")
        text = (root / "lib" / inner).read_bytes()
        assert text == package.parent.joinpath(inner).read_bytes()
        assert _foreign(ast.parse(text)) <= {"numpy", "polygraphy"}, name


def _foreign(tree: ast.Module) -> set[str]:
    import sys

    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found - set(sys.stdlib_module_names) - {"depthwire", "__future__"}


def test_capacities_are_models_of_one_bundle(tmp_path: Path) -> None:
    from fractions import Fraction

    artifact = write_routed(tmp_path / "routed", (Fraction(1, 4),), target="decomposed")
    target = load_target("jetson-thor")
    bundle = write_bundle(artifact, target, tmp_path / "all").bundle
    assert [(m.file, m.capacity, m.engine) for m in bundle.models] == [
        ("model.onnx", "1/2", "model.engine"),
        ("model.c25.onnx", "1/4", "model.c25.engine"),
    ]
    assert bundle.models[1].reference == "ONNX Runtime on the CPU"
    one = write_bundle(artifact, target, tmp_path / "one", BundleOptions(capacities=("25%",))).bundle
    assert [m.file for m in one.models] == ["model.c25.onnx"]
    with pytest.raises(UsageError) as caught:
        write_bundle(artifact, target, tmp_path / "none", BundleOptions(capacities=("75%",)))
    assert caught.value.code == "bundle.capacity"
    assert not (tmp_path / "none").exists()


def test_goldens_are_the_artefacts_own(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    from depthwire.runtime._goldens import Goldens

    artifact = artifacts["routed"]
    info = write_bundle(artifact, load_target("l4"), tmp_path / "bundle")
    folder = info.root / info.bundle.models[0].goldens
    goldens = Goldens(artifact)
    assert np.array_equal(np.load(folder / "output.logits.npy")[0], goldens.outputs(0)["logits"])
    assert np.array_equal(np.load(folder / "input.input_ids.npy")[0], goldens.inputs(0)["input_ids"])


def test_a_graph_that_computes_something_else_does_not_travel(
    artifacts: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewrite that goes wrong is found before the bundle is written: here one that loses a norm's square root."""
    from depthwire.runtime import _onnx_lower

    real = _onnx_lower.lower

    def wrong(*arguments: object, **options: object) -> object:
        lowered = real(*arguments, **options)  # type: ignore[arg-type]
        node = next(node for node in lowered.model.graph.node if node.op_type == "Sqrt")
        node.op_type = "Exp"
        return lowered

    monkeypatch.setattr("depthwire.runtime.bundle.lower", wrong)
    with pytest.raises(ParityError) as caught:
        write_bundle(artifacts["reads"], load_target("jetson-agx-orin"), tmp_path / "bundle")
    assert caught.value.code == "bundle.self-check"
    assert "logits max|d|" in str(caught.value.got)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "code"),
    [
        ("ort-cpu", {}, "bundle.nothing-to-build"),
        ("ort-cuda", {"flavour": "tensorrt"}, "bundle.nothing-to-build"),
        ("h100", {"flavour": "tensorrt_rtx"}, "bundle.flavour"),
        ("rtx", {"flavour": "tensorrt"}, "bundle.flavour"),
        ("rtx", {"form": "plugin"}, "target.plugin-unsupported"),
        ("jetson-orin-nx-16", {"form": "plugin"}, "target.plugin-unsupported"),
        ("a10", {"flavour": "tensorrt_rtx", "form": "plugin"}, "target.plugin-unsupported"),
        ("rtx", {"latency_runs": 0}, "bundle.latency-runs"),
        ("rtx", {"capacities": ("half",)}, "bundle.capacity"),
    ],
)
def test_what_cannot_be_meant(
    artifacts: dict[str, Artifact], name: str, options: dict[str, object], code: str, tmp_path: Path
) -> None:
    with pytest.raises(DepthwireError) as caught:
        write_bundle(artifacts["reads"], load_target(name), tmp_path / "bundle", BundleOptions(**options))  # type: ignore[arg-type]
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_has_both_builders(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    options = BundleOptions(flavour="tensorrt_rtx", workspace_bytes=1 << 20, optimization_level=2, latency_runs=7)
    bundle = write_bundle(artifacts["reads"], load_target("a10"), tmp_path / "bundle", options).bundle
    assert (bundle.target, bundle.form, bundle.platform.package) == ("a10", "function", "tensorrt_rtx")
    assert bundle.platform.boards == ("a10",)
    assert bundle.platform.compute_capabilities == bundle.builder.compute_capabilities == ("SM86",)
    assert (bundle.builder.workspace_bytes, bundle.builder.optimization_level, bundle.latency.runs) == (1 << 20, 2, 7)
    function = write_bundle(
        artifacts["reads"], load_target("a10"), tmp_path / "f", BundleOptions(form="function")
    ).bundle
    assert (function.form, function.models[0].plugins) == ("function", None)


def test_a_board_without_room_is_refused_with_the_numbers(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    small = load_target("jetson-orin-nano-4").model_copy(update={"memory_bytes": 1_900_000_000})
    with pytest.raises(BuildError) as caught:
        write_bundle(artifacts["reads"], small, tmp_path / "bundle")
    assert caught.value.code == "target.memory-limit"
    assert "1.90 GB" in str(caught.value.want)


def test_a_directory_of_somebody_else_is_not_replaced(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "empty").mkdir()
    check_bundle_out(tmp_path / "empty")
    check_bundle_out(tmp_path / "new")
    (tmp_path / "mine" / "bundle.json").write_text("{}", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "file").write_text("", encoding="utf-8")
    for name in ("mine", "link", "file"):
        with pytest.raises(UsageError) as caught:
            check_bundle_out(tmp_path / name)
        assert caught.value.code == "bundle.output-exists"
    check_bundle_out(write_bundle(artifacts["reads"], load_target("rtx"), tmp_path / "new").root)


def test_a_failure_leaves_nothing(
    artifacts: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        write_bundle(artifacts["reads"], load_target("rtx"), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_checked_field_by_field() -> None:
    platform = Platform(("p1",), None, None, ("SM87",), "tensorrt", "10.3", "11", None)
    raw = json.loads(encode(platform))
    assert decode(Platform, raw) == platform
    for change, words in (
        ({"boards": "p1"}, "boards: a list"),
        ({"boards": [1]}, r"boards\[0\]: str"),
        ({"memory_bytes": 1.5}, "memory_bytes: int"),
        ({"memory_bytes": True}, "memory_bytes: int"),
        ({"more": 1}, "'more' is unknown"),
    ):
        with pytest.raises(BundleError, match=words):
            decode(Platform, {**raw, **change})
    del raw["package"]
    with pytest.raises(BundleError, match="'package' is missing"):
        decode(Platform, raw)
    assert dataclasses.is_dataclass(platform)
