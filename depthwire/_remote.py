"""``bundle --on``: a bundle that is run on a device, and its result read back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthwire.errors import BuildError, DeviceError, RemoteError
from depthwire.runtime.deploy.manifest import RESULT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from depthwire.runtime.bundle import BundleInfo
    from depthwire.runtime.device_result import Judged
    from depthwire.runtime.remote import Device, RemoteResult
    from depthwire.stages import Stages

VERIFIED, BUILD_FAILED, PARITY_FAILED, CHECK_FAILED, NOT_VERIFIED = 0, 6, 7, 8, 9
DEVICE = "device"
"""Folder below ``engine/<target>`` with what a device built: never the engine that was built ahead of time here."""


@dataclass(frozen=True)
class DeviceRun:
    """A bundle that was run on a device.

    Attributes:
        bundle: The bundle.
        remote: What was copied, fetched, and how the script ended.
        judged: The result, matched with the artefact; ``None`` where the script wrote none.
    """

    bundle: BundleInfo
    remote: RemoteResult
    judged: Judged | None

    def as_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {
            "bundle": self.bundle.as_dict(),
            "device": {**dataclasses.asdict(self.remote), "out": str(self.remote.out)},
            **({} if self.judged is None else self.judged.as_dict()),
        }

    def require_built(self) -> None:
        """Refuse a run whose script failed; built without a GPU to verify on is no failure.

        Raises:
            BuildError: ``result.not-verified``, as the two below: exit code 6.
            DeviceError: Exit code 8.
            ParityError: Or ``result.parity``; exit code 7.
            RemoteError: ``remote.script``: the script ended in another way than its exit codes say.
        """
        code = self.remote.exit_code
        if self.judged is not None and code in {VERIFIED, PARITY_FAILED}:
            self.judged.require_passed()
        if code in {VERIFIED, NOT_VERIFIED} and self.judged is not None:
            return
        found = self.judged.result.reason if self.judged is not None else self.remote.tail.replace("\n", " | ")
        where = {
            "at": f"{self.remote.host}, target {self.bundle.bundle.target}",
            "want": "an engine that was built and compared with the goldens",
            "got": found,
        }
        if code in {BUILD_FAILED, CHECK_FAILED}:
            kind = BuildError if code == BUILD_FAILED else DeviceError
            what = "The device could not build the engine" if code == BUILD_FAILED else "The device fails a check"
            todo = f"Do what the reason says and run the same command again; the logs are in {self.remote.out}."
            raise kind("result.not-verified", what, **where, todo=todo)
        raise RemoteError(
            "remote.script",
            f"build_and_verify.py ended with exit code {code}",
            **where,
            todo=f"Read {self.remote.out / 'device.log'}; report it with that file.",
        )


def run_on_device(
    directory: Path,
    info: BundleInfo,
    device: Device,
    stages: Stages,
    *,
    folder: str | None = None,
    arguments: Sequence[str] = (),
    keep: bool = False,
) -> DeviceRun:
    """Run a bundle on a device, and enter the result into the artefact.

    Args:
        directory: The artefact.
        info: A bundle of it.
        device: Where to run it.
        stages: Told of the progress.
        folder: Folder on the device; one named after the bundle's content by default.
        arguments: Further arguments of ``build_and_verify.py``.
        keep: Leave the folder on the device.

    Raises:
        RemoteError: What ``runtime.remote.drive`` raises, or ``remote.engine``.
        ExportError: The result is not one of this artefact.
    """
    from depthwire.api import verify_result
    from depthwire.runtime.remote import drive

    out = directory / "engine" / info.bundle.target / DEVICE
    remote = drive(info.root, device, out, folder=folder, arguments=arguments, keep=keep, stages=stages)
    judged = None
    if RESULT in remote.files:
        judged = verify_result(directory, out / RESULT, stages=stages)
        check_engines(judged, remote)
    return DeviceRun(info, remote, judged)


def check_engines(judged: Judged, remote: RemoteResult) -> None:
    """Refuse an engine that is not the one the result speaks of.

    Raises:
        RemoteError: ``remote.engine``.
    """
    for row in judged.result.builds:
        fetched = remote.files.get(row.engine)
        if row.problem is None and (fetched is None or fetched.sha256 != row.sha256):
            raise RemoteError(
                "remote.engine",
                "The engine that was fetched is not the one that the result speaks of",
                at=str(remote.out / row.engine),
                want=f"sha256 {row.sha256}",
                got="no such file" if fetched is None else f"sha256 {fetched.sha256}",
                todo="Run the same command again; nothing else may write into the folder on the device.",
            )
