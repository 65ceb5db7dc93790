"""Whether the device is what the bundle was made for: judged from what was read, one line a check."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from depthwire.runtime.deploy.manifest import Bundle
    from depthwire.runtime.deploy.probe import Device

# Reserved by firmware and kernel: a "64 GB" board shows somewhat less. Far less is another board.
_LEAST_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: What was looked at.
        passed: Whether it holds.
        want: What was wanted.
        got: What was found.
        todo: What to do about it.
        ignored: Whether the user asked to go on regardless.
    """

    name: str
    passed: bool
    want: str
    got: str
    todo: str = ""
    ignored: bool = False

    def __bool__(self) -> bool:
        return self.passed or self.ignored

    def as_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)


def check_device(bundle: Bundle, device: Device, *, ignore_board: bool, pending: Iterable[str]) -> list[Check]:
    """Judge the device.

    Args:
        bundle: What is wanted.
        device: What is there.
        ignore_board: Go on with another board or L4T release.
        pending: Files of the models that are not built yet; finished ones need no memory for building.
    """
    return [
        _board(bundle, device, ignore=ignore_board),
        _l4t(bundle, device, ignore=ignore_board),
        _tensorrt(bundle, device),
        _polygraphy(device),
        _gpu(bundle, device),
        _memory(bundle, device, ignore=ignore_board),
        _free_memory(bundle, device, set(pending)),
        _disk(bundle, device),
    ]


def _board(bundle: Bundle, device: Device, *, ignore: bool) -> Check:
    want, jetson = bundle.platform.boards, bundle.platform.l4t is not None
    names = f"{device.board or ''} {device.compatible or ''}".lower()
    if not jetson and "jetson" in names:
        return Check("board", False, "no Jetson", str(device.board), _other("Jetson"), ignore)  # noqa: FBT003
    if not want:
        return Check("board", passed=True, want="any", got=device.board or "no Jetson")
    if jetson:
        got = f"{device.board} ({device.compatible})" if device.board else "no device tree"
        words = re.split(r"[^a-z0-9-]+", (device.compatible or "").lower())
    else:
        got = device.gpu.name if device.gpu else "no GPU"
        words = re.split(r"[^a-z0-9]+", got.lower())
    passed = not set(want).isdisjoint(words)
    text = f"{bundle.title} ({' or '.join(want)})"
    return Check("board", passed, text, got, _other("board"), not passed and ignore)


def _other(what: str) -> str:
    return f"Make a bundle for this {what} ('depthwire targets'), or go on regardless with --ignore-board."


def _l4t(bundle: Bundle, device: Device, *, ignore: bool) -> Check:
    platform = bundle.platform
    if platform.l4t is None:
        return Check("L4T", passed=True, want="any", got=device.l4t or "no Jetson Linux")
    want, got = version(platform.l4t), version(device.l4t or "")
    passed = bool(got) and got[0] == want[0] and got >= want
    text = f"{platform.l4t} or a later {want[0]}.x (JetPack {platform.jetpack})"
    todo = "Make a bundle for this JetPack (--jetpack), or install the wanted one."
    return Check("L4T", passed, text, device.l4t or "no /etc/nv_tegra_release", todo, not passed and ignore)


def _tensorrt(bundle: Bundle, device: Device) -> Check:
    platform = bundle.platform
    text = f"{platform.package} {platform.tensorrt_at_least} or later, below {platform.tensorrt_below}"
    if device.tensorrt is None:
        jetson = "Use the python3 that JetPack installed tensorrt for: /usr/bin/python3."
        todo = jetson if platform.l4t else f"python3 -m pip install {platform.package.replace('_', '-')}"
        return Check("TensorRT", passed=False, want=text, got=device.no_tensorrt, todo=todo)
    found = version(device.tensorrt)
    passed = version(platform.tensorrt_at_least) <= found < version(platform.tensorrt_below)
    todo = "Make a bundle for this TensorRT ('depthwire bundle --jetpack ...'), or install the wanted version."
    return Check("TensorRT", passed, text, f"{platform.package} {device.tensorrt}", todo)


def _polygraphy(device: Device) -> Check:
    todo = "python3 -m pip install polygraphy numpy"
    missing = [name for name in ("numpy", "polygraphy") if getattr(device, name) is None]
    got = ", ".join(f"no {name}" for name in missing) or f"numpy {device.numpy}, polygraphy {device.polygraphy}"
    return Check("Python packages", not missing, "numpy and polygraphy", got, todo)


def _gpu(bundle: Bundle, device: Device) -> Check:
    want = bundle.platform.compute_capabilities
    text = f"a GPU of compute capability {' or '.join(want)}"
    if device.gpu is None:
        # TensorRT-RTX compiles ahead of time without one; TensorRT measures its kernels on it.
        passed = bundle.platform.package == "tensorrt_rtx"
        wanted = f"{text}, or none: then the engine is built and not verified" if passed else text
        return Check("GPU", passed, wanted, device.no_gpu, "Run this where the GPU and its driver are.")
    passed = device.gpu.capability in want
    got = f"{device.gpu.name}, {device.gpu.capability}, driver CUDA {device.gpu.driver}"
    return Check("GPU", passed, text, got, "Make a bundle for this GPU: an engine serves no other.")


def _memory(bundle: Bundle, device: Device, *, ignore: bool) -> Check:
    want, memory = bundle.platform.memory_bytes, device.memory
    if want is None or memory is None:
        return Check("memory of the board", passed=True, want="any", got=_size(memory.total if memory else None))
    passed = memory.total >= _LEAST_SHARE_OF_MEMORY * want
    text = f"a board of {_size(want)}"
    return Check("memory of the board", passed, text, _size(memory.total), _other("board"), not passed and ignore)


def _free_memory(bundle: Bundle, device: Device, pending: set[str]) -> Check:
    name = "free memory"
    predicted = [model.predicted_bytes for model in bundle.models if model.file in pending and model.predicted_bytes]
    floor = bundle.builder.floor_bytes
    if device.memory is None:
        return Check(
            name, passed=False, want="/proc/meminfo", got="cannot be read", todo="Run this on Linux or Windows."
        )
    if not pending:
        text = "nothing: every engine is built"
        return Check(name, passed=True, want=text, got=_size(device.memory.available))
    needed = max(predicted, default=0) + floor
    text = f"{_size(needed)} for the build ({_size(floor)} of it are left free)"
    got = f"{_size(device.memory.available)}, and {_size(device.memory.swap_free)} of swap"
    if device.memory.zram:
        got += f" ({_size(device.memory.zram)} zram: compressed memory, of little help for weights)"
    todo = (
        "Stop the desktop (sudo systemctl isolate multi-user.target) and other programs; disable zram and add swap on "
        "disk (sudo systemctl disable nvzramconfig; fallocate, mkswap, swapon); or bundle a smaller model: fp16, int8, "
        "a smaller workspace (--workspace)."
    )
    # Swap on disk counts: a build in it is slow and ends; zram does not.
    usable = device.memory.available + max(device.memory.swap_free - device.memory.zram, 0)
    return Check(name, usable >= needed, text, got, todo)


def _disk(bundle: Bundle, device: Device) -> Check:
    needed = bundle.builder.disk_bytes
    todo = "Free space, or choose another disk with --work."
    return Check("free disk", device.disk_free >= needed, _size(needed), _size(device.disk_free), todo)


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version; what follows the first part that is no number is left out."""
    match = re.match(r"\d+(\.\d+)*", text.lstrip("rRvV"))
    return () if match is None else tuple(int(part) for part in match[0].split("."))


def failures(checks: Sequence[Check]) -> list[Check]:
    """Return those that neither pass nor are ignored."""
    return [check for check in checks if not check]


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.0f} MB"
