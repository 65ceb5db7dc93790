"""Whether an engine is for this GPU and this TensorRT is told before anything is loaded."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from depthwire.artifact import Artifact
from depthwire.errors import BuildError, UsageError
from depthwire.runtime import _engine_session, engine
from depthwire.runtime._engine_session import EngineSession
from depthwire.runtime.deploy.cuda import Driver, Gpu, find_gpu
from depthwire.runtime.engine import PlanHeader, check_engine, load_engine, read_header, require_valid, run_engine
from depthwire.runtime.target import load_target
from depthwire.runtime.tensorrt_rtx import build
from tests.runtime import engine_models as models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="real engines are under test: pip install 'depthwire[rtx]'"
)

GPU = Gpu("NVIDIA GeForce RTX 4090", "SM89", 24 << 30, integrated=False, driver="13.0")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    models.tiny(folder)
    build(models.artifact_of(folder), load_target("rtx"), compute_capabilities=["SM86", "SM89"])
    return folder


def check(folder: Path, *, gpu: Gpu = GPU, version: str | None = None, target: str = "rtx") -> Any:
    made = Artifact.load(folder, check_hashes=False)
    found = version or made.manifest.engines["rtx"].version
    return check_engine(made, target, gpu=gpu, version=found)


def copy_of(folder: Path, to: Path) -> Path:
    for path in folder.rglob("*"):
        if path.is_file():
            (to / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(folder)).write_bytes(path.read_bytes())
    return to


def test_the_header_of_a_real_engine_names_its_builder_and_version(built: Path) -> None:
    import tensorrt_rtx

    assert read_header(built / "engine/rtx/model.engine") == PlanHeader("tensorrt-rtx", tensorrt_rtx.__version__)


def test_an_engine_for_this_gpu_and_version_passes(built: Path) -> None:
    assert check(built) == Artifact.load(built).manifest.engines["rtx"]
    release = ".".join(check(built).version.split(".")[:3])
    assert check(built, version=f"{release}.9999")  # another build of the same release


@pytest.mark.parametrize(
    ("call", "code", "got"),
    [
        (lambda f: check(f, gpu=dataclasses.replace(GPU, capability="SM120")), "engine.wrong-gpu", "SM120"),
        (lambda f: check(f, gpu=dataclasses.replace(GPU, capability="SM90")), "engine.wrong-gpu", "SM90"),
        (lambda f: check(f, version="1.6.0.27"), "engine.wrong-version", "1.6.0.27 installed"),
        (lambda f: check(f, version="11.4.1.2"), "engine.wrong-version", "11.4.1.2 installed"),
        (lambda f: check(f, target="jetson-thor-t5000"), "engine.none", "rtx"),
    ],
)
def test_an_engine_for_something_else_is_refused(built: Path, call: Callable[[Path], Any], code: str, got: str) -> None:
    with pytest.raises((BuildError, UsageError)) as caught:
        call(built)
    assert caught.value.code == code
    assert got in (caught.value.got or "")
    assert "depthwire build" in (caught.value.todo or "")


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def overwritten(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def of_another_release(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[25] += 1
    path.write_bytes(bytes(blob))


def of_tensorrt(path: Path) -> None:
    path.write_bytes(b"f" + path.read_bytes()[1:])


@pytest.mark.parametrize("damage", [shortened, emptied, overwritten, of_another_release, of_tensorrt])
def test_a_file_that_is_not_the_engine_of_the_manifest_is_damaged(
    built: Path, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = copy_of(built, tmp_path)
    damage(folder / "engine/rtx/model.engine")
    manifest = Artifact(folder, Artifact.load(built).manifest)
    with pytest.raises(BuildError) as caught:
        check_engine(manifest, "rtx", gpu=GPU, version=manifest.manifest.engines["rtx"].version)
    assert caught.value.code == "engine.damaged"


def test_a_missing_engine_is_said_to_be_missing(built: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        check_engine(Artifact(tmp_path, Artifact.load(built).manifest), "rtx", gpu=GPU, version="1.7.1")
    assert caught.value.code == "engine.missing"


@pytest.mark.skipif(find_gpu()[0] is not None, reason="this machine has a GPU")
def test_without_a_gpu_loading_is_one_error(built: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        load_engine(Artifact.load(built), cache=tmp_path / "runtime.cache")
    assert caught.value.code == "engine.no-gpu"
    assert "libcuda" in (caught.value.got or "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_gpu()[0] is not None, reason="this machine has a GPU")
def test_what_tensorrt_rtx_itself_says_of_a_file_is_an_error(built: Path) -> None:
    import tensorrt_rtx as trt

    path = built / "engine/rtx/model.engine"
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    for blob, code in ((path.read_bytes(), "engine.refused"), (b"x" * 4096, "engine.damaged")):
        validity, found = runtime.get_engine_validity(blob)
        with pytest.raises(BuildError) as caught:
            require_valid(trt, path, validity, found, "")
        assert caught.value.code == code  # a real engine is refused for want of a driver
    for validity in (trt.EngineValidity.VALID, trt.EngineValidity.SUBOPTIMAL):
        require_valid(trt, path, validity, 0, "")
    bits = trt.EngineInvalidityDiagnostics
    for bit, code in ((bits.UNSUPPORTED_CC, "engine.wrong-gpu"), (bits.VERSION_MISMATCH, "engine.wrong-version")):
        with pytest.raises(BuildError) as caught:
            require_valid(trt, path, trt.EngineValidity.INVALID, int(bit), "")
        assert caught.value.code == code


# Variables of the code that needs a GPU, by the class of the bindings that they hold.
HOLDS = {
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "config": "IRuntimeConfig",
    "kept": "IRuntimeCache",
    "refitter": "Refitter",
    "parser": "OnnxParserRefitter",
}


def test_every_name_of_the_bindings_that_is_used_exists() -> None:
    import tensorrt_rtx as trt

    used = set()
    for module in (engine, _engine_session):
        for node in ast.walk(ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            chain = re.split(r"[.(]", ast.unparse(node).removeprefix("self."))
            if chain[0] == "trt":
                used.add((trt, tuple(name for name in chain[1:] if name.isidentifier() and name != "self")))
            elif chain[0] in HOLDS:
                used.add((getattr(trt, HOLDS[chain[0]]), tuple(chain[1:2])))
    assert len(used) > 25
    for owner, names in used:
        found: Any = owner
        for name in names:
            assert hasattr(found, name), f"{owner}: {'.'.join(names)}"
            found = getattr(found, name)


class HostDriver(Driver):
    """Stands in for a GPU: its memory is the host's. What it cannot show is TensorRT-RTX itself."""

    def __init__(self) -> None:
        self.allocated = 0

    def call(self, name: str, *arguments: Any) -> None:
        if name.startswith("cuMemcpy"):
            ctypes.memmove(*arguments[:3])

    @contextlib.contextmanager
    def device_memory(self, count: int) -> Iterator[int]:
        buffer = ctypes.create_string_buffer(count)
        self.allocated += 1
        try:
            yield ctypes.addressof(buffer)
        finally:
            self.allocated -= 1

    @contextlib.contextmanager
    def stream(self) -> Iterator[int]:
        yield 1


class Doubling:
    """An engine and its context at once: y = 2x for x of [1..4, 3]."""

    num_io_tensors = 2

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.works = True

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> Any:
        import tensorrt_rtx as trt

        return trt.TensorIOMode.INPUT if name == "x" else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:  # noqa: ARG002
        import tensorrt_rtx as trt

        return trt.DataType.FLOAT

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, int]]:  # noqa: ARG002
        return [(1, 3), (4, 3), (4, 3)]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:  # noqa: ARG002
        self.shape = shape

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:  # noqa: ARG002
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:  # noqa: ARG002
        count = int(np.prod(self.shape))
        x, y = (
            np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[name])) for name in ("x", "y")
        )
        y[:] = 2 * x
        return self.works


class Kept:
    """A runtime cache that has compiled something."""

    def serialize(self) -> bytes:
        return b"kernels"


def test_inputs_and_outputs_go_to_the_engine_and_back(tmp_path: Path) -> None:
    import tensorrt_rtx as trt

    driver, doubling, cache = HostDriver(), Doubling(), tmp_path / "caches/runtime.cache"
    with EngineSession(trt, driver, None, doubling, doubling, Kept(), cache, "absent") as session:
        for batch in (1, 4):
            x = np.arange(3 * batch, dtype=np.float32).reshape(3, batch).T  # not contiguous
            np.testing.assert_array_equal(run_engine(session, {"x": x})["y"], 2 * x)
        wrong: list[dict[str, Any]] = [
            {},
            {"x": np.zeros((5, 3), np.float32)},
            {"x": np.zeros((1, 3), np.float64)},
            {"x": np.zeros(3, np.float32)},
            {"x": np.zeros((1, 3), np.float32), "z": np.zeros(1)},
        ]
        for inputs in wrong:
            with pytest.raises(UsageError) as caught:
                run_engine(session, inputs)
            assert caught.value.code == "engine.bad-input"
        doubling.works = False
        with pytest.raises(BuildError) as failed:
            run_engine(session, {"x": np.zeros((1, 3), np.float32)})
        assert failed.value.code == "engine.run"
    assert driver.allocated == 0
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    assert cache.read_bytes() == b"kernels"
    session.close()  # a second time does nothing
