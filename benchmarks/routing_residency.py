"""Memory of a routed model with all its capacities open at once, against the bytes of its weights file.

Converts the model unless ``--artifact`` names a converted one, opens every capacity in a fresh process and runs each
twice. Prints the growth of the process's proportional set size (PSS) over that before the first session, relative to
the weights: ``routing_resident_open`` after opening, ``routing_resident_run`` after the calls, and
``routing_resident_total``, the whole process with Python after the calls and after the C library has given back what it
holds for later (``malloc_trim``). Linux only.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks._report import common_arguments, report

if TYPE_CHECKING:
    from argparse import Namespace

CAPACITIES = "12.5%,25%,50%,75%,100%"


def pss_bytes() -> int:
    """Return the proportional set size of this process."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return 1024 * int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1])


def measure(root: Path, threads: int, *, kernels: bool | None) -> dict[str, float]:
    """Open and run every capacity in this process; return sizes relative to the weights."""
    import numpy as np
    import onnx  # noqa: F401 - counted with Python, not with the sessions
    import onnxruntime  # noqa: F401

    from depthwire.artifact import WEIGHTS, Artifact
    from depthwire.runtime.routed import RoutedModel

    artifact = Artifact.load(root, check_hashes=False)
    weights = artifact.path(WEIGHTS).stat().st_size
    before = pss_bytes()
    model = RoutedModel(artifact, threads=threads, kernels=kernels)
    opened = pss_bytes()
    ids = next(info for info in artifact.manifest.inputs if info.name == "input_ids")
    feed = {"input_ids": np.random.default_rng(0).integers(0, 256, ids.shape)}
    for capacity in model.capacities * 2:
        model.run(feed, capacity=capacity)
    ran = pss_bytes()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return {
        "open": (opened - before) / weights,
        "run": (ran - before) / weights,
        "total": pss_bytes() / weights,
        "weights": weights,
        "capacities": len(model.capacities),
    }


def convert(args: Namespace, out: Path) -> None:
    """Convert with every other layer routed."""
    import depthwire

    depthwire.convert(
        args.model,
        out,
        seq_len=args.seq_len,
        dtype="fp32",
        route_seed=0,
        route_layers="every:2",
        capacity=0.5,
        capacities=CAPACITIES,
        verify=False,
        build=False,
    )


def main() -> None:
    """Measure and print."""
    parser = common_arguments(__doc__, runs=1)
    parser.add_argument("--artifact", type=Path, help="a routed artefact with several capacities")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bodies", action="store_true", help="run the function bodies, not the library of kernels")
    parser.add_argument("--child", action="store_true", help="measure in this process and print raw sizes")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.artifact, args.threads, kernels=False if args.bodies else None)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.artifact is None:
            args.artifact = Path(folder) / "out"
            convert(args, args.artifact)
        command = [sys.executable, "-m", "benchmarks.routing_residency", "--child", "--artifact", str(args.artifact)]
        command += ["--threads", str(args.threads), *(["--bodies"] if args.bodies else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        sizes = json.loads(done.stdout.splitlines()[-1])
    against = f"{sizes['weights'] / 1e6:.0f} MB of weights, {sizes['capacities']} capacities"
    for name in ("open", "run", "total"):
        report(f"routing_resident_{name}", sizes[name], "ratio", against=against, n=1)


if __name__ == "__main__":
    main()
