"""Stages: what is measured, what is shown, and where."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from depthwire.errors import PassError
from depthwire.reporters import LiveReporter, PlainReporter, marks, megabytes, stage_table
from depthwire.stages import Stages

MEBI = 1 << 20


def test_a_stage_knows_its_seconds_and_result() -> None:
    stages = Stages()
    with stages.stage("export", "opset 18") as stage:
        time.sleep(0.05)
        stage.bytes = 7
        stage.note("two files")
    record = stages.as_list()[0]
    assert record["ok"] is True
    assert 0.05 <= record["seconds"] < 5
    assert (record["bytes"], record["notes"], record["error"]) == (7, ["two files"], None)
    assert stages.seconds == pytest.approx(record["seconds"], abs=1e-3)


def test_a_failed_stage_is_marked_and_the_error_goes_on() -> None:
    stages = Stages()
    with pytest.raises(PassError), stages.stage("rewrite"):
        raise PassError("pass.reason", "no")
    with pytest.raises(KeyboardInterrupt), stages.stage("verify"):
        raise KeyboardInterrupt
    assert [(s.ok, s.error) for s in stages.records] == [(False, "pass.reason"), (False, "KeyboardInterrupt")]


_PEAKS = """
import json, time
import numpy as np
from depthwire.stages import Stages

def touch(mebibytes):
    block = np.ones(mebibytes << 20, dtype=np.uint8)
    time.sleep(0.2)
    assert int(block[-1]) == 1

stages = Stages()
for name, mebibytes in (("large", 200), ("small", 20), ("again", 150)):
    with stages.stage(name):
        touch(mebibytes)
print(json.dumps([[stage.peak_rss_bytes for stage in stages.records], stages.peak_rss_bytes]))
"""


def test_the_peak_belongs_to_the_stage_that_had_it() -> None:
    # In a process of its own: the kernel moves pages of one that has run thousands of tests in and out meanwhile.
    done = subprocess.run([sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=True)
    (large, small, again), peak = json.loads(done.stdout)
    assert large - small > 120 * MEBI
    assert again - small > 80 * MEBI
    assert peak == large


def test_a_child_process_counts_for_its_stage() -> None:
    stages = Stages()
    with stages.stage("build") as stage:
        stage.child_peak(1 << 50)
    assert stages.records[0].peak_rss_bytes == 1 << 50


def _two_stages(stages: Stages) -> None:
    with stages.stage("capture", "tiny [model]") as stage:
        stage.progress("half way", 0.5, 3.0)
        stage.bytes = 12_000_000
        stage.note("tied weights")
    with pytest.raises(ValueError, match="bad"), stages.stage("export"):
        raise ValueError("bad")


def test_plain_lines_are_one_per_stage() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    _two_stages(Stages(PlainReporter(stream)))
    stream.seek(0)
    note, first, second = stream.read().splitlines()
    assert note == "    capture: tied weights"
    assert first.startswith("✓  capture ")
    assert first.endswith("12 MB  tiny [model]")
    assert " s  " in first
    assert " peak" in first
    assert second.startswith("✗  export ")
    assert second.endswith("[ValueError]")


def test_plain_lines_fit_streams_without_check_marks() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    _two_stages(Stages(PlainReporter(stream)))
    stream.seek(0)
    assert stream.read().splitlines()[1].startswith("ok  capture")
    assert marks("ascii") == ("ok", "FAILED")
    assert marks(None) == ("ok", "FAILED")


def test_a_terminal_sees_progress_and_keeps_the_lines() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, legacy_windows=False)
    stages = Stages(LiveReporter(console))
    with stages.stage("build", "rtx") as stage:
        stage.progress("tactics", 0.25, 42.0)
        time.sleep(0.5)
    text = screen.getvalue()
    assert "25%" in text
    assert "about 42 s left" in text
    assert "✓" in text.splitlines()[-1]
    assert "rtx" in text.splitlines()[-1]


def test_without_a_reporter_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    _two_stages(Stages())
    assert capsys.readouterr() == ("", "")


def test_the_table_has_every_stage_and_the_total() -> None:
    stages = Stages()
    _two_stages(stages)
    screen = io.StringIO()
    Console(file=screen, width=100).print(stage_table(stages))
    text = screen.getvalue()
    assert "peak RSS MB" in text
    assert all(word in text for word in ("✓", "✗", "capture", "export", "12.0", "all", "tiny [model]; tied weights"))


def test_megabytes_are_decimal() -> None:
    assert megabytes(12_345) == "12.3 kB"
    assert megabytes(400_000) == "0.4 MB"
    assert megabytes(1_234_567_890) == "1,235 MB"


@pytest.mark.skipif(sys.platform == "win32", reason="the system keeps no high-water mark that Python can read")
def test_the_high_water_mark_catches_what_sampling_misses() -> None:
    stages = Stages()
    with stages.stage("spike"):
        np.ones(900 * MEBI, dtype=np.uint8)  # gone before the next sample
    assert stages.records[0].peak_rss_bytes > 900 * MEBI
