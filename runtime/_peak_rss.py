"""The largest resident set of this process; standard library only, for the builder's child process."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """Return the largest resident set this process has had, in bytes.

    On Linux it is read from ``VmHWM``, not from ``getrusage``: the latter's ``ru_maxrss`` survives ``exec``, so a small
    child of a large parent would report the parent's memory as its own (``proc(5)``, ``getrusage(2)``).
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
