"""The stages of ``build_and_verify.py``: hashes, checks, build, comparison, latency, ``result.json``.

Exit codes: 0 verified; 2 usage; 6 a build or a run failed; 7 the engine computes something else; 8 the device is not
what the bundle was made for, or the bundle is damaged; 9 built, not verified: no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from depthwire._hash import sha256_file
from depthwire.runtime.deploy import manifest, steps
from depthwire.runtime.deploy.checks import Check, check_device, failures
from depthwire.runtime.deploy.probe import probe, read_power
from depthwire.runtime.deploy.state import State, build_inputs, write_atomically
from depthwire.runtime.deploy.supervise import WORKER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from depthwire.runtime.deploy.manifest import Bundle
    from depthwire.runtime.deploy.probe import Device

VERIFIED, USAGE, BUILD_FAILED, PARITY_FAILED, CHECK_FAILED, NOT_VERIFIED = 0, 2, 6, 7, 8, 9
INTERRUPTED = 130
VERDICTS = {
    USAGE: "usage",
    VERIFIED: "verified",
    BUILD_FAILED: "build-failed",
    PARITY_FAILED: "parity-failed",
    CHECK_FAILED: "check-failed",
    NOT_VERIFIED: "not-verified",
}
LOG = "build.log"


class StopRun(Exception):  # noqa: N818 - it ends a run in order; what went wrong is its text
    """The run ends here, with an exit code and one sentence."""

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Console:
    """Prints a line for each step, and keeps it in the log."""

    def __init__(self, *, as_json: bool) -> None:
        self._stream = sys.stderr if as_json else sys.stdout
        self.log: Any = None

    def close(self) -> None:
        """Log no more: the work directory is left."""
        self.log = None

    def say(self, mark: str, name: str, text: str = "") -> None:
        """Print one line: ``[ok] board: …``."""
        line = f"[{mark:>4}] {name}{': ' + text if text else ''}\n"
        self._stream.write(line)
        self._stream.flush()
        if self.log is not None:
            self.log.write(line.encode())
            self.log.flush()


def main(argv: Sequence[str], root: Path) -> int:
    """Run the script.

    Args:
        argv: Its arguments.
        root: The bundle.

    Returns:
        The exit code.
    """
    if list(argv) == [WORKER]:
        from depthwire.runtime.deploy.worker import main as worker

        worker()
        return 0
    options = _parser(root).parse_args(argv)
    console = Console(as_json=options.json)
    try:
        result = _Session(options, root, console).run()
    except KeyboardInterrupt:
        console.say("stop", "interrupted", "run the same command again: finished engines are kept")
        return INTERRUPTED
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return int(result["exit_code"])


def _parser(root: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=manifest.SCRIPT,
        description="Build this bundle's engines on this device, compare them with the goldens, and measure them.",
        epilog="Exit codes: 0 verified, 2 usage, 6 build failed, 7 the engine computes something else, 8 a check of "
        "device or bundle failed, 9 built but not verified because there is no GPU.",
    )
    parser.add_argument("--work", type=Path, default=root / "work", help="Where engines and results go (default: work)")
    parser.add_argument("--json", action="store_true", help="Print result.json on stdout; lines go to stderr.")
    parser.add_argument("--ignore-board", action="store_true", help="Go on with another board, memory size or L4T.")
    parser.add_argument("--skip-latency", action="store_true", help="Do not measure.")
    parser.add_argument("--dry-run", action="store_true", help="Check the bundle and the device, and stop there.")
    parser.add_argument("--sysroot", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    return parser


class _Session:
    """One run of the script: its options, and the result as it grows."""

    def __init__(self, options: argparse.Namespace, root: Path, console: Console) -> None:
        self.options, self.root, self.console = options, root, console
        self.work: Path | None = None
        self.result: dict[str, Any] = {
            "schema_version": manifest.SCHEMA_VERSION,
            "options": {"ignore_board": options.ignore_board, "skip_latency": options.skip_latency},
            "started": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
            "checks": [],
            "builds": [],
            "comparisons": [],
            "latency": [],
        }

    def run(self) -> dict[str, Any]:
        """Go through the stages; return the result, which is also written."""
        clock = time.monotonic()
        with contextlib.ExitStack() as stack:
            code, text = self._attempt(stack)
            verdict = "checked" if self.options.dry_run and code == VERIFIED else VERDICTS[code]
            ending = {"exit_code": code, "verdict": verdict, "reason": text}
            self.result |= {**ending, "seconds": round(time.monotonic() - clock, 3)}
            mark = {VERIFIED: "ok", NOT_VERIFIED: "note"}.get(code, "FAIL")
            self.console.say(mark, verdict, text)
            if self.work is not None:
                self._write(self.work / manifest.RESULT)
        return self.result

    def _attempt(self, stack: contextlib.ExitStack) -> tuple[int, str]:
        """Return exit code and reason; a work directory that was entered stays so until the stack is left."""
        try:
            bundle = self._read()
            if self.options.dry_run:
                self._check(bundle, _nearest(self.options.work), None)
                return VERIFIED, "every check passed; nothing was built"
            self.work = stack.enter_context(_workplace(self.options.work, self.console))
            self._stages(bundle, self.work)
        except StopRun as stop:
            return stop.exit_code, str(stop)
        except OSError as error:
            return CHECK_FAILED, f"a file cannot be read or written: {error}"
        return VERIFIED, "the engine computes what the goldens say"

    def _write(self, path: Path) -> None:
        try:
            write_atomically(path, json.dumps(self.result, indent=2) + "\n")
        except OSError as error:
            self.console.say("FAIL", manifest.RESULT, str(error))
            self.result["exit_code"] = self.result["exit_code"] or CHECK_FAILED
        else:
            self.console.say("ok", manifest.RESULT, str(path))

    def _read(self) -> Bundle:
        try:
            bundle = manifest.read_bundle(self.root)
        except manifest.BundleError as error:
            raise StopRun(CHECK_FAILED, str(error)) from error
        self.result |= {
            "depthwire": bundle.depthwire,
            "bundle_sha256": sha256_file(self.root / manifest.BUNDLE),
            "artifact": dataclasses.asdict(bundle.artifact),
            "target": bundle.target,
            "form": bundle.form,
            "precision": bundle.precision,
            "package": bundle.platform.package,
        }
        return bundle

    def _stages(self, bundle: Bundle, work: Path) -> None:
        result, system = self.result, self.options.sysroot
        state = State(work, result["bundle_sha256"])
        device = self._check(bundle, work, state)
        result["power_before"] = read_power(system)
        script = self.root / manifest.SCRIPT
        run = steps.Run(self.root, work, bundle, device, system, self.console.say, self.console.log, script)
        for model in bundle.models:
            built = steps.build(run, model, state, build_inputs(result["bundle_sha256"], bundle, model, device))
            result["builds"].append(built)
            if "problem" in built:
                raise StopRun(BUILD_FAILED, f"{model.engine}: {built['problem']}; the log is {work / LOG}")
        if device.gpu is None:
            raise StopRun(NOT_VERIFIED, f"built, not verified: no GPU ({device.no_gpu})")
        for model in bundle.models:
            compared = steps.compare(run, model)
            result["comparisons"].append(compared)
            if "problem" in compared:
                raise StopRun(BUILD_FAILED, f"{model.engine} cannot be run: {compared['problem']}")
        if not self.options.skip_latency:
            result["latency"] = [steps.latency(run, model) for model in bundle.models]
        result["power_after"] = read_power(system)
        differing = [compared for compared in result["comparisons"] if not compared["passed"]]
        if differing:
            raise StopRun(PARITY_FAILED, steps.explain(differing[0]))
        unmeasured = [measured for measured in result["latency"] if "problem" in measured]
        if unmeasured:
            raise StopRun(BUILD_FAILED, f"{unmeasured[0]['engine']} cannot be measured: {unmeasured[0]['problem']}")

    def _check(self, bundle: Bundle, work: Path, state: State | None) -> Device:
        wrong = manifest.wrong_files(self.root, bundle)
        count, size = len(bundle.files), sum(entry.bytes for entry in bundle.files.values())
        found = "; ".join(wrong) or f"{count} files, {size / 1e6:.1f} MB"
        hashes = Check("hashes", not wrong, f"{count} files as bundled", found, "Copy the bundle again, whole.")
        device = probe(self.options.sysroot, bundle.platform.package, work)
        self.result["environment"] = device.as_dict()
        pending = []
        for model in () if wrong else bundle.models:
            inputs = build_inputs(self.result["bundle_sha256"], bundle, model, device)
            if state is None or state.finished(model, inputs) is None:
                pending.append(model.file)
        checks = [hashes, *check_device(bundle, device, ignore_board=self.options.ignore_board, pending=pending)]
        self.result["checks"] = [check.as_dict() for check in checks]
        for check in checks:
            self._show(check)
        failed = failures(checks)
        if failed:
            raise StopRun(CHECK_FAILED, f"{failed[0].name}: wanted {failed[0].want}; found {failed[0].got}")
        return device

    def _show(self, check: Check) -> None:
        if check.passed:
            self.console.say("ok", check.name, check.got)
            return
        self.console.say("skip" if check.ignored else "FAIL", check.name, f"wanted {check.want}; found {check.got}")
        if not check.ignored and check.todo:
            self.console.say("do", check.name, check.todo)


def _nearest(path: Path) -> Path:
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


@contextlib.contextmanager
def _workplace(work: Path, console: Console) -> Iterator[Path]:
    """Give the work directory to this run alone, with the log open."""
    work = work.absolute()
    with contextlib.ExitStack() as stack:
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((work / ".lock").open("wb"))
            console.log = stack.enter_context((work / LOG).open("ab"))
        except OSError as error:
            raise StopRun(
                CHECK_FAILED, f"the work directory cannot be used: {error}; choose one with --work"
            ) from error
        stack.callback(console.close)
        _lock(lock, work)
        for partial in work.glob(".*.partial"):
            partial.unlink()
        yield work


def _lock(file: BinaryIO, work: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows, where no Jetson is
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise StopRun(USAGE, f"another run is at work in {work}") from error
