"""The CUDA provider's kernels as far as they go without a GPU: choosing a cubin, and launching it.

No kernel runs here. The launch is recorded by a stand-in for the driver (fake_driver.cpp), in a session of ONNX Runtime
whose CPU provider was given the CUDA provider's kernels (cuda_probe.cpp).
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

import depthwire
from depthwire.runtime.native import custom_ops_library
from depthwire.runtime.triton.bundle import HEADER, INDEX, Entry, write_bundle
from tests.cli.models import tiny_llama
from tests.conftest import ROOT
from tests.runtime.native.cuda_session import INDEX as ROW
from tests.runtime.native.cuda_session import QUERIES, spec_of

NODES = {
    "AttnResAddUnitReadNorm_3": "1 3 100 101 102 7 out0 out1 null null",
    "AttnResInter_2": "2 100 101 out0 out1 null null",
    # The kernel finds its row of the inter-block result itself: it gets the tensors' beginning.
    "AttnResAddMergeNorm_2": "1 3 10 20 100 101 7 out0 out1 null null",
    "AttnResMerge_0": "1 10 20 out0 null null",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Entry]]:
    """The kernels of four nodes for two GPUs."""
    folder = tmp_path_factory.mktemp("bundle") / "kernels"
    return folder, write_bundle([spec_of(op_type, 64) for op_type in NODES], ["8.6", "sm_90"], folder)


def session(library: Path, folder: Path, op_type: str, *, width: int = 64, **environment: str) -> Any:
    """Run a node in a process of its own."""
    command = [sys.executable, "-m", "tests.runtime.native.cuda_session", str(library), str(folder)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PROBE_OPS": op_type, **environment}
    command += [op_type, str(width)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("op_type", NODES)
def test_a_launch_gets_the_nodes_inputs_and_outputs(
    op_type: str, probe: Path, bundle: tuple[Path, list[Entry]], tmp_path: Path
) -> None:
    folder, entries = bundle
    spec = spec_of(op_type, 64)
    (entry,) = (entry for entry in entries if entry.key == spec.key and entry.capability == 86)
    found = session(
        probe / "probe.so",
        folder,
        op_type,
        LD_LIBRARY_PATH=str(probe),
        PROBE_CC="89",
        PROBE_LOG=str(tmp_path / "log"),
        PROBE_PARAMETERS=str(entry.parameters),
        PROBE_OUTPUTS=str(len(spec.outputs)),
    )
    blocks = 2 * 3 * entry.programs
    launch = f"{entry.symbol} {blocks} 1 1 {entry.threads} {entry.shared} {NODES[op_type]}\n"
    assert (tmp_path / "log").read_text() == launch
    assert found["first"] == [42.0, 43.0][: len(spec.outputs)]
    shapes = {"out": [2, 3, 64], "sum": [2, 3, 64]}
    if spec.kind == "inter":
        shapes = {"out": [QUERIES, 2, 3, 64], "lse": [QUERIES, 2, 3]}
    assert found["shapes"] == [shapes[name] for name in spec.outputs]
    assert spec.kind != "merge" or f"-i{ROW}-" in spec.key


@pytest.mark.parametrize(
    ("capability", "width", "text"),
    [
        ("100", 64, "was compiled for SM86, SM90, and this GPU is SM100"),
        ("75", 64, "was compiled for SM86, SM90, and this GPU is SM75"),
        ("87", 65, "no folder of kernels has 'AttnResInter_2-d65-fp32-fp32-"),
    ],
)
def test_without_a_cubin_that_fits_the_call_is_refused(
    capability: str, width: int, text: str, probe: Path, bundle: tuple[Path, list[Entry]]
) -> None:
    found = session(
        probe / "probe.so", bundle[0], "AttnResInter_2", width=width, LD_LIBRARY_PATH=str(probe), PROBE_CC=capability
    )
    assert text in found["error"]
    assert "depthwire AttnResInter_2: " in found["error"]


def test_without_a_driver_the_call_is_refused(probe: Path, bundle: tuple[Path, list[Entry]]) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert (
            "there is no CUDA driver: libcuda.so.1" in session(probe / "probe.so", bundle[0], "AttnResMerge_0")["error"]
        )
    else:
        pytest.skip("this machine has a CUDA driver")


def test_a_damaged_cubin_is_refused_by_the_driver(
    probe: Path, bundle: tuple[Path, list[Entry]], tmp_path: Path
) -> None:
    for file in bundle[0].iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content if file.name == INDEX else b"X" + content)
    found = session(probe / "probe.so", tmp_path, "AttnResMerge_0", LD_LIBRARY_PATH=str(probe), PROBE_CC="90")
    assert "cannot load" in found["error"]
    assert "refused by the fake driver (200)" in found["error"]


def test_every_operator_of_an_artefact_is_launched(probe: Path, tmp_path: Path) -> None:
    """The kernels that Python names after the file are those that the library looks for at run time."""
    artifact = depthwire.export(tiny_llama(layers=6), tmp_path / "out", attn_res="block:3", seq_len=8)
    depthwire.kernels(artifact.root, compute_capabilities=["SM89"])
    graph = onnx.load(str(artifact.model), load_external_data=False).graph
    nodes = [node.op_type for node in graph.node if node.domain == "depthwire"]
    assert {name.partition("_")[0] for name in nodes} == {"AttnResReadNorm", "AttnResAddReadNorm"}
    environment = {"LD_LIBRARY_PATH": str(probe), "PROBE_OPS": ",".join(sorted(set(nodes))), "PROBE_CC": "89"}
    environment |= {"PROBE_LOG": str(tmp_path / "log"), "PROBE_PARAMETERS": "0", "PROBE_OUTPUTS": "0"}
    command = [sys.executable, "-m", "tests.runtime.native.cuda_session", str(probe / "probe.so"), str(artifact.root)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "{}"), done.stderr
    assert len((tmp_path / "log").read_text().splitlines()) == len(nodes)


def select(folder: Path, key: str, major: int, minor: int) -> tuple[int, str]:
    """Ask the library that is shipped which cubin a device gets."""
    library = ctypes.CDLL(custom_ops_library())
    if not hasattr(library, "DepthwireSelectCubin"):
        pytest.skip("the library was built without cuda.h, and so without kernels for the CUDA provider")
    text = ctypes.create_string_buffer(1024)
    code = library.DepthwireSelectCubin(str(folder).encode(), key.encode(), major, minor, text, len(text))
    return code, text.value.decode()


@pytest.mark.parametrize(
    ("device", "file"),
    [((8, 6), "sm86"), ((8, 7), None), ((8, 9), "sm86"), ((9, 0), "sm90"), ((8, 0), None), ((12, 0), None)],
)
def test_a_device_gets_a_cubin_that_it_can_run(
    device: tuple[int, int], file: str | None, bundle: tuple[Path, list[Entry]]
) -> None:
    folder, entries = bundle
    code, text = select(folder, entries[0].key, *device)
    assert code == (file is None)
    assert text.endswith(f"{entries[0].key}-{file}.cubin" if file else f"this GPU is SM{device[0]}{device[1]}")


def test_a_cpu_session_is_served_as_before_where_cubins_are_named(bundle: tuple[Path, list[Entry]]) -> None:
    select(bundle[0], "key", 8, 6)  # skips where the library has no kernels for the CUDA provider
    found = session(Path(custom_ops_library()), bundle[0], "AttnResMerge_0")
    assert found == {"first": [10.0 + ROW], "shapes": [[2, 3, 64]]}


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (None, "holds no kernels.tsv"),
        ("", "holds no kernels.tsv"),
        ("depthwire-kernels 9\n", "wanted 'depthwire-kernels 1'"),
        (f"{HEADER}\nkey\t86\n", "damaged line: 'key\t86'"),
        (f"{HEADER}\nkey\t86\t../up\thash\tsymbol\t128\t0\t1\t5\n", "damaged line"),
        (f"{HEADER}\nkey\t86\tf\thash\tsymbol\tmany\t0\t1\t5\n", "damaged line"),
        (f"{HEADER}\nkey\t86\tf\thash\tsymbol\t2048\t0\t1\t5\n", "damaged line"),
    ],
)
def test_a_folder_that_is_no_bundle_is_refused_when_the_session_is_made(
    index: str | None, text: str, tmp_path: Path
) -> None:
    select(tmp_path, "key", 8, 6)  # skips where the library has no kernels for the CUDA provider
    if index is not None:
        (tmp_path / INDEX).write_text(index)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("depthwire.kernels", str(tmp_path))
    with pytest.raises(InvalidArgument) as caught:
        options.register_custom_ops_library(custom_ops_library())
    assert "session configuration entry 'depthwire.kernels': " in str(caught.value)
    assert text in str(caught.value)
