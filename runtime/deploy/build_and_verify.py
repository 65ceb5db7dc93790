#!/usr/bin/env python3
"""Build the engine of this bundle on the device it lies on, compare it with the goldens, and measure it.

    python3 build_and_verify.py            # see README.md beside this file, or --help

Needs Python 3.10 or later, numpy, polygraphy, and tensorrt (or tensorrt_rtx); neither PyTorch nor Depthwire. The
modules under ``lib/`` are part of the bundle.
"""

import sys
from pathlib import Path


def main() -> int:
    """Run, with the modules of the bundle itself whatever else is installed."""
    if sys.version_info < (3, 10):  # noqa: UP036 - the device's Python is not ours to choose
        sys.stderr.write("Python 3.10 or later is needed; this is " + sys.version.split()[0] + "\n")
        return 8
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here / "lib"))
    from depthwire.runtime.deploy.main import main as run

    return run(sys.argv[1:], here)


if __name__ == "__main__":
    sys.exit(main())
