"""``state.json``: which engines are finished, so that a run after a kill or a reboot builds only what is missing."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from depthwire._hash import sha256_file

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire.runtime.deploy.manifest import Bundle, Model
    from depthwire.runtime.deploy.probe import Device

STATE = "state.json"
_SCHEMA_VERSION = 1


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that after a power cut there is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def build_inputs(bundle_sha256: str, bundle: Bundle, model: Model, device: Device) -> str:
    """Return one hash over everything that an engine depends on: bundle, model, TensorRT, GPU, driver."""
    gpu = None if device.gpu is None else device.gpu.as_dict()
    parts = [bundle_sha256, bundle.files[model.file].sha256, model.file, device.package, device.tensorrt, gpu]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class State:
    """The finished engines of a work directory."""

    def __init__(self, work: Path, bundle_sha256: str) -> None:
        """Read ``state.json``; one of another bundle, or one that was damaged, counts as none."""
        self._path = work / STATE
        self._work = work
        self._bundle = bundle_sha256
        self._engines: dict[str, dict[str, Any]] = {}
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        head = (raw.get("schema_version"), raw.get("bundle_sha256")) if isinstance(raw, dict) else None
        if head == (_SCHEMA_VERSION, bundle_sha256) and isinstance(raw.get("engines"), dict):
            self._engines = raw["engines"]

    def finished(self, model: Model, inputs: str) -> dict[str, Any] | None:
        """Return the facts of a finished engine whose inputs and bytes are still the same, else ``None``."""
        entry = self._engines.get(model.file)
        path = self._work / model.engine
        if entry is None or entry.get("inputs") != inputs or not path.is_file():
            return None
        facts: dict[str, Any] = entry.get("facts", {})
        same = path.stat().st_size == facts.get("bytes") and sha256_file(path) == facts.get("sha256")
        return facts if same else None

    def finish(self, model: Model, inputs: str, facts: dict[str, Any]) -> None:
        """Record a finished engine."""
        self._engines[model.file] = {"inputs": inputs, "facts": facts}
        content = {"schema_version": _SCHEMA_VERSION, "bundle_sha256": self._bundle, "engines": self._engines}
        write_atomically(self._path, json.dumps(content, indent=2) + "\n")
