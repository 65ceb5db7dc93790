"""Memory: what a process used at most, what is left on this machine, and what a builder will need.

**Prediction.** An engine builder takes several times the weights' size in memory, and a machine that runs out of it
kills the process without a word. So the peak is predicted first::

    predicted = margin * (base + per_weight_byte * weight_bytes + per_product * products + per_node * nodes)

and ``per_open_node * nodes`` more inside the brackets where a size of the graph is open. ``nodes`` counts the ONNX
nodes with every function body expanded, ``products`` the matrix products outside function bodies (each becomes a
kernel, whereas element-wise nodes share one). The coefficients of ``targets/rtx.toml`` are fitted, by least squares of
the relative error, to TensorRT-RTX 1.7.1.116 building transformers with no GPU on Linux x86-64: RMSNorm, attention,
SwiGLU, random weights, length 128; "reads" are AttnRes reads as function bodies over all earlier sublayers. Peak
resident set of the building process (``VmHWM``) in MiB:

======================================  =====  ========  ========  ===============  ======  =====
model (float32 unless said)             nodes  products   weights  peak, 1/2/3 GPUs  fitted  ratio
======================================  =====  ========  ========  ===============  ======  =====
1 norm, 1 product                           6         1     0.004              193     198   1.03
4 layers x 384                            114        37      73.9      439 / - / 440   448   1.02
24 layers x 256                           674       217      82.0              614     624   1.02
60 layers x 128                          1682       541      39.6      772 / - / 706   775   1.00
12 layers x 768                           338       109     371.0   1379 / 1398 / -   1385   0.99
24 layers x 768, float16                  674       217     347.5             1380    1408   1.02
30 layers x 576, tied embedding           843       271     563.8             2069    2092   1.01
24 layers x 1024, float16                 674       217     619.4             2196    2210   1.01
30 layers x 576                           842       271     671.8             2393    2410   1.01
24 layers x 1024                          674       217    1238.7  4084/4057/4084     4037   0.99
4 layers x 256, reads (stacked body)      269        37      28.7              333     326   0.98
4 layers x 256, reads                     539        37      28.7              345     347   1.01
12 layers x 256, reads (stacked body)     965       109      54.7              536     501   0.93
12 layers x 256, reads                   3115       109      54.7              634     668   1.05
30 layers x 256, reads                  16399       271     113.3             1794    1970   1.10
SmolLM2-135M, 8 AttnRes blocks, 512      4573       271     513.6             2264    2236   0.99
12 layers x 768, MLP of 3072                326       109     525.9             1849    1842   1.00
the same, float16                           326       109     262.9             1056    1065   1.01
the same, bfloat16                          326       109     262.9             1057    1065   1.01
the same, int8 (Q/DQ), rest float16         506       109     155.2              742     762   1.03
the same, int4 weights, rest float16        410       109     107.7              608     614   1.01
SmolLM2-135M, 8 blocks, 128, batch 1-4     2831       271     513.4             2388    2314   0.97
the same, float16                          3648       271     256.8             1663    1682   1.01
the same, bfloat16                         3648       271     256.8             1599    1682   1.05
======================================  =====  ========  ========  ===============  ======  =====

The last rows are no part of the fit, which serves narrow dtypes as it is (``python -m benchmarks.build_memory``). Where
a size is open (``--max-batch``), each node costs ``per_open_node`` more: without it the ratios of the last three rows
would be 0.84 to 0.88.
The number of GPUs compiled for and the optimisation level make no difference. The worst measurement lies 7 % above the
line and repeated runs differ by up to 9 %, so the margin is 15 %. About a quarter of the peak is the mapped weights
file, which the kernel can drop: the prediction is on the safe side.
"""

from __future__ import annotations

from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field

from depthwire.errors import BuildError
from depthwire.runtime._peak_rss import peak_rss_bytes

__all__ = [
    "MemoryModel",
    "available_bytes",
    "cgroup_available_bytes",
    "gigabytes",
    "peak_rss_bytes",
    "process_rss_bytes",
    "require_memory",
]

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


class MemoryModel(BaseModel):
    """Coefficients of a builder's peak memory; see the module's text for the formula.

    Attributes:
        base_bytes: The builder itself, with nothing to build.
        bytes_per_weight_byte: Factor on the bytes of all initialisers.
        bytes_per_product: Bytes for each matrix product outside function bodies.
        bytes_per_node: Bytes for each ONNX node, function bodies expanded.
        bytes_per_open_node: Further bytes for each of them where a size of the graph is open.
        margin: Factor that covers what the line does not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_bytes: int = Field(ge=0)
    bytes_per_weight_byte: float = Field(gt=0)
    bytes_per_product: int = Field(ge=0)
    bytes_per_node: int = Field(ge=0)
    bytes_per_open_node: int = Field(default=0, ge=0)
    margin: float = Field(ge=1)

    def predict(self, *, weight_bytes: int, products: int, nodes: int, open_sizes: bool = False) -> int:
        """Return the predicted peak resident set of the builder in bytes, margin included.

        Args:
            weight_bytes: Of all initialisers.
            products: Matrix products outside function bodies.
            nodes: ONNX nodes, function bodies expanded.
            open_sizes: Whether a size of the graph is open, such as the batch.
        """
        fitted = (
            self.base_bytes
            + self.bytes_per_weight_byte * weight_bytes
            + self.bytes_per_product * products
            + (self.bytes_per_node + self.bytes_per_open_node * open_sizes) * nodes
        )
        return round(self.margin * fitted)


def process_rss_bytes(pid: int) -> int:
    """Return the resident set of another process in bytes, 0 when it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def available_bytes() -> int:
    """Return the bytes this process can still take: the machine's, or its control group's where that is less."""
    machine = int(psutil.virtual_memory().available)
    group = cgroup_available_bytes()
    return machine if group is None else min(machine, group)


def cgroup_available_bytes(root: Path = _CGROUP_ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Return the bytes left under the tightest control-group limit (v1 or v2), or ``None`` without any limit.

    Cached file pages count as used there but are given back on demand, so inactive ones count as free.

    Args:
        root: Where the control-group file systems are mounted.
        membership: The process's list of groups, in the format of ``/proc/self/cgroup``.
    """
    if not membership.is_file():
        return None
    left: list[int] = []
    for line in membership.read_text(encoding="utf-8", errors="replace").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the listed path may be the host's; the mount's own root is then the group that counts.
        group = base / path.lstrip("/")
        while True:
            remaining = _remaining(group, *names)
            if remaining is not None:
                left.append(remaining)
            if group == base:
                break
            group = group.parent
    return min(left, default=None)


def _remaining(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    limit, usage, stat = group / limit_name, group / usage_name, group / "memory.stat"
    if not (limit.is_file() and usage.is_file()):
        return None
    text = limit.read_text(encoding="ascii").strip()
    # "max" is v2's unlimited; v1 writes a number near 2**63.
    if text == "max" or int(text) >= 1 << 60:
        return None
    cache = 0
    if stat.is_file():
        fields = dict(line.split(maxsplit=1) for line in stat.read_text(encoding="ascii").splitlines() if " " in line)
        cache = int(fields.get(cache_name, 0))
    return max(0, int(text) - int(usage.read_text(encoding="ascii")) + cache)


def require_memory(predicted: int, *, weight_bytes: int, at: str) -> None:
    """Refuse a build that will not fit into memory.

    Args:
        predicted: Predicted peak in bytes, from ``MemoryModel.predict``.
        weight_bytes: Bytes of the model's weights, for the message.
        at: The file to be built, for the message.

    Raises:
        BuildError: ``build.out-of-memory``.
    """
    available = available_bytes()
    if predicted <= available:
        return
    raise BuildError(
        "build.out-of-memory",
        f"The builder would need about {gigabytes(predicted)} of memory, more than is available",
        at=at,
        want=f"{gigabytes(predicted)} available (for {gigabytes(weight_bytes)} of weights)",
        got=f"{gigabytes(available)} available; {gigabytes(predicted - available)} are missing",
        todo=(
            "Close other programs, raise the container's memory limit, build on a larger machine, or convert in "
            "float16 (which halves the weights). --force-build tries all the same."
        ),
    )


def gigabytes(count: int) -> str:
    """Return a number of bytes in words, ``1.25 GB`` (10**9 bytes) or ``3 MB``."""
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.0f} MB"
