from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from depthwire.errors import BuildError
from depthwire.runtime.memory import (
    MemoryModel,
    available_bytes,
    cgroup_available_bytes,
    gigabytes,
    peak_rss_bytes,
    process_rss_bytes,
    require_memory,
)

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
PEAK = "from depthwire.runtime._peak_rss import peak_rss_bytes; print(peak_rss_bytes())"


def test_peak_counts_what_was_freed_again() -> None:
    code = "x = bytearray(b'1' * (200 << 20)); del x; " + PEAK
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 200 * MIB < int(done.stdout) < 500 * MIB


def test_peak_of_a_child_is_not_its_parents() -> None:
    code = (
        f"import subprocess, sys; x = bytearray(b'1' * (300 << 20)); subprocess.run([sys.executable, '-c', {PEAK!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 * MIB


def test_own_peak_is_at_least_what_we_hold_now() -> None:
    assert peak_rss_bytes() >= psutil.Process().memory_info().rss * 0.9


def test_rss_of_a_process_and_of_none() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process_rss_bytes(child.pid) > 0
    child.communicate(b"\n")
    assert process_rss_bytes(child.pid) == 0


def write(folder: Path, **values: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in values.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="ascii")


def test_cgroup_v2_takes_the_tightest_level(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write(root / "a/b", memory__max="max\n", memory__current="500\n")
    write(root / "a", memory__max="1000\n", memory__current="600\n", memory__stat="anon 1\ninactive_file 50\n")
    write(tmp_path, membership="0::/a/b\n")
    assert cgroup_available_bytes(root, tmp_path / "membership") == 450


def test_cgroup_v1_in_a_container_reads_the_mounts_own_root(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write(
        root / "memory",
        memory__limit_in_bytes="2000\n",
        memory__usage_in_bytes="1500\n",
        memory__stat="total_inactive_file 100\n",
    )
    write(tmp_path, membership="5:cpu:/x\n4:memory:/host/only\n")
    assert cgroup_available_bytes(root, tmp_path / "membership") == 600


def test_no_limit_is_none(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write(root / "memory", memory__limit_in_bytes="9223372036854771712\n", memory__usage_in_bytes="1500\n")
    write(tmp_path, membership="4:memory:/\n")
    assert cgroup_available_bytes(root, tmp_path / "membership") is None
    assert cgroup_available_bytes(root, tmp_path / "absent") is None


def test_usage_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write(root, memory__max="100\n", memory__current="150\n")
    write(tmp_path, membership="0::/\n")
    assert cgroup_available_bytes(root, tmp_path / "membership") == 0


def test_available_is_no_more_than_the_machine_has() -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_prediction_is_the_stated_formula() -> None:
    model = MemoryModel(base_bytes=1000, bytes_per_weight_byte=3.0, bytes_per_product=5, bytes_per_node=10, margin=1.5)
    assert model.predict(weight_bytes=200, products=4, nodes=7) == round(1.5 * (1000 + 600 + 20 + 70))
    dearer = model.model_copy(update={"bytes_per_open_node": 100})
    assert dearer.predict(weight_bytes=200, products=4, nodes=7) == round(1.5 * (1000 + 600 + 20 + 70))
    opened = dearer.predict(weight_bytes=200, products=4, nodes=7, open_sizes=True)
    assert opened == round(1.5 * (1000 + 600 + 20 + 70 + 700))


def test_what_fits_passes_and_what_does_not_is_refused_with_numbers() -> None:
    require_memory(1, weight_bytes=1, at="model.onnx")
    wanted = available_bytes() + 50 * 10**9
    with pytest.raises(BuildError) as caught:
        require_memory(wanted, weight_bytes=20 * 10**9, at="model.onnx")
    error = caught.value
    assert error.code == "build.out-of-memory"
    assert gigabytes(wanted) in error.what
    assert "20.00 GB of weights" in (error.want or "")
    assert "are missing" in (error.got or "")
    assert "--force-build" in (error.todo or "")


@pytest.mark.parametrize(("count", "text"), [(3_400_000, "3 MB"), (1_250_000_000, "1.25 GB")])
def test_bytes_in_words(count: int, text: str) -> None:
    assert gigabytes(count) == text
