"""A bundle whose script follows the contract of ``build_and_verify.py`` and does what a plan says, in no time."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from depthwire.errors import DepthwireError
from depthwire.runtime.remote import Patience, drive
from depthwire.stages import Stages

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from depthwire.runtime.remote import Device, RemoteResult
    from depthwire.stages import Stage

QUICK = Patience(attempts=8, first_seconds=0.1, longest_seconds=0.5)
WEIGHTS = "model.onnx.data"
SCRIPT = """\
import argparse, json, os, pathlib, sys, time

parser = argparse.ArgumentParser()
parser.add_argument("--work", type=pathlib.Path, required=True)
parser.add_argument("--skip-latency", action="store_true")
arguments = parser.parse_args()
plan = json.loads((pathlib.Path(__file__).parent / "plan.json").read_text())
work = arguments.work
with (work / "starts").open("a") as file:
    file.write("x")
starts = len((work / "starts").read_text())
for step in range(plan["steps"]):
    print("step", step, flush=True)
    time.sleep(plan["seconds"])
    if (work / "enough").exists():
        break
if starts <= plan["kills"]:
    print("about to be killed", flush=True)
    os.kill(os.getpid(), 9)
engine = bytes(range(256)) * plan["engine_kib"] * 4
for name, data in (("model.engine", engine), ("timing.cache", b"cache"), ("build.log", b"log")):
    (work / name).write_bytes(data)
(work / "state.json").write_text("{}")
(work / "result.json").write_text(json.dumps({"starts": starts, "arguments": sys.argv[1:]}))
sys.exit(plan["code"])
"""


def make_bundle(root: Path, *, weights: int = 1000, **plan: float) -> Path:
    """Write a bundle with so many bytes of weights; the plan's keys are those that the script reads."""
    root.mkdir(parents=True)
    whole = {"steps": 0, "seconds": 0.0, "kills": 0, "engine_kib": 8, "code": 9, **plan}
    (root / WEIGHTS).write_bytes((b"%07d " * (weights // 8 + 1) % tuple(range(weights // 8 + 1)))[:weights])
    (root / "goldens").mkdir()
    (root / "goldens" / "input 0 'x'.npy").write_bytes(b"values")
    (root / "build_and_verify.py").write_text(SCRIPT)
    (root / "plan.json").write_text(json.dumps(whole))
    list_files(root)
    return root


def list_files(root: Path) -> None:
    """Write ``bundle.json`` for what lies in the folder."""
    files = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != "bundle.json"):
        data = path.read_bytes()
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files[str(path.relative_to(root))] = entry
    (root / "bundle.json").write_text(json.dumps({"schema_version": 1, "target": "rtx", "files": files}))


def size(bundle: Path) -> int:
    """Bytes of all of its files."""
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())


def result(out: Path) -> dict[str, Any]:
    """What the script wrote, as it was fetched."""
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


class Once:
    """A reporter that does something the first time that a stage has come so far."""

    def __init__(self, stage: str, act: Callable[[], object], *, fraction: float = 0.0, text: str = "") -> None:
        self.acted = False
        self.notes: list[str] = []
        self._stage, self._act, self._fraction, self._text = stage, act, fraction, text

    def started(self, stage: Stage) -> None:
        pass

    def progressed(
        self,
        stage: Stage,
        text: str,
        fraction: float | None,
        eta_seconds: float | None,  # noqa: ARG002 - the protocol's
    ) -> None:
        far = stage.name == self._stage and (fraction or 0.0) >= self._fraction and self._text in text
        if far and not self.acted:
            self.acted = True
            self._act()

    def noted(self, stage: Stage, text: str) -> None:  # noqa: ARG002 - the protocol's
        self.notes.append(text)

    def ended(self, stage: Stage) -> None:
        pass


def run(
    bundle: Path,
    device: Device,
    there: Path,
    reporter: Once | None = None,
    *,
    arguments: tuple[str, ...] = (),
    keep: bool = False,
) -> RemoteResult:
    """Run a bundle on a device, with little patience; what came of it lies in ``out`` beside the bundle."""
    return drive(
        bundle,
        device,
        bundle.parent / "out",
        folder=str(there),
        arguments=arguments,
        keep=keep,
        stages=Stages(reporter),
        patience=QUICK,
    )


def refusal(code: str, call: Callable[[], object]) -> DepthwireError:
    """Return the error that a call ends with, of this code."""
    with pytest.raises(DepthwireError) as caught:
        call()
    assert caught.value.code == code
    return caught.value
