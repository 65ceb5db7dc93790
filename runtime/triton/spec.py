"""Which function a kernel computes, and the launch that follows from it.

A kernel is compiled for one operator of an ONNX file: its arity, width, dtypes and attributes are constants of the
kernel, and its parameters are the node's inputs and outputs in their order, nothing else. So the same cubin is
launched by an ONNX Runtime kernel and by a TensorRT plugin with the pointers that either is given.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Literal

from depthwire.errors import UsageError

DType = Literal["float32", "float16", "bfloat16"]

ITEM_BYTES: Final[dict[DType, int]] = {"float32": 4, "float16": 2, "bfloat16": 2}
TRITON_DTYPE: Final[dict[str, str]] = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    **{f"int{bits}": f"i{bits}" for bits in (8, 16, 32, 64)},
}
LARGEST_COUNT: Final = 256
LARGEST_WIDTH: Final = 16384
"""A row lives in the registers of one thread block; up to 8192 no kernel spills."""

_OP_TYPE: Final = re.compile(
    r"AttnRes(?:(?P<add>Add)?(?P<unit>Unit)?Read(?P<norm>Norm)?|(?P<madd>Add)?Merge(?P<mnorm>Norm)?|Inter)_(?P<n>\d+)"
)


@dataclass(frozen=True)
class Launch:
    """How a kernel divides its work.

    Attributes:
        block: Lanes of a row, the power of two that holds the width.
        warps: Warps of a thread block; each thread holds ``block / (32 warps)`` elements of a row.
        tile: Sources that are loaded and reduced together; 1 in Inter.
        groups: Rows of the kernel's pointer table, a power of two that holds the tiles.
        share: Queries of one program; 1 but in Inter.
        programs: Programs a row.
        stages: Loads of a loop that are under way at once.
    """

    block: int
    warps: int
    tile: int
    groups: int
    share: int
    programs: int
    stages: int = 3


@dataclass(frozen=True)
class KernelSpec:
    """One operator at one width and dtype.

    Attributes:
        op_type: Name in the ONNX file, such as ``AttnResAddReadNorm_9``.
        width: d, elements of a row.
        dtype: Of the sources, ``delta``, ``inter_out`` and the outputs (``lse`` is float32).
        query_dtype: Of ``query``, ``queries`` and ``norm_weight``.
        eps: Added to a source's mean square.
        scale: Factor on the logits.
        last_bias: Added to the logit of the last source.
        norm_eps: Added to the mean square of the norm behind the read.
        index: Row of the inter-block result that a merge reads.
        queries: S, the queries of an Inter.
        warp_factor: On the warps of a thread block: 1, or 2 or 0.5 for other ways to divide the same work.
        scalars: Numbers among the parameters: none.

    Raises:
        UsageError: ``triton.bad-spec``.
    """

    op_type: str
    width: int
    dtype: DType
    query_dtype: DType = "float32"
    eps: float = 0.0
    scale: float = 1.0
    last_bias: float = 0.0
    norm_eps: float = 0.0
    index: int = 0
    queries: int = 1
    warp_factor: float = 1
    scalars: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Refuse what no kernel computes."""
        match = _OP_TYPE.fullmatch(self.op_type)
        least = 0 if match and self.kind == "merge" and not self.add else 1
        if match is None or not least <= self.count <= LARGEST_COUNT:
            raise self._refused("op_type", f"an operator of domain depthwire, {least} to {LARGEST_COUNT} sources")
        if not 1 <= self.width <= LARGEST_WIDTH:
            raise self._refused("width", f"1 to {LARGEST_WIDTH}")
        for name in ("dtype", "query_dtype"):
            if getattr(self, name) not in ITEM_BYTES:
                raise self._refused(name, f"one of {', '.join(ITEM_BYTES)}")
        if self.index < 0:
            raise self._refused("index", "0 or more")
        if self.queries < 1:
            raise self._refused("queries", "1 or more")
        if self.warp_factor not in (0.5, 1, 2):
            raise self._refused("warp_factor", "0.5, 1 or 2")

    def _refused(self, field: str, want: str) -> UsageError:
        return UsageError(
            "triton.bad-spec",
            "There is no GPU kernel for this operator",
            at=field,
            want=want,
            got=repr(getattr(self, field)),
            todo="Leave this node to its function body, which every execution provider runs.",
        )

    @property
    def kind(self) -> Literal["read", "merge", "inter"]:
        """Which of the three kernel sources computes it."""
        if "Merge" in self.op_type:
            return "merge"
        return "inter" if "Inter" in self.op_type else "read"

    @property
    def count(self) -> int:
        """Sources of its own, n or m."""
        return int(self.op_type.rpartition("_")[2])

    @property
    def add(self) -> bool:
        """Whether the last source is a sum made on the way."""
        return "Add" in self.op_type

    @property
    def unit(self) -> bool:
        """Whether the normalised sources are mixed."""
        return "Unit" in self.op_type

    @property
    def norm(self) -> bool:
        """Whether the RMSNorm behind the read is part of it."""
        return "Norm" in self.op_type

    @property
    def aligned(self) -> bool:
        """Whether every row starts on 16 bytes, so that its loads are vectors."""
        return self.width * ITEM_BYTES[self.dtype] % 16 == 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """The node's inputs in their order."""
        sources = tuple(f"source_{index}" for index in range(self.count))
        if self.kind == "inter":
            return ("queries", *sources)
        gain = ("norm_weight",) if self.norm else ()
        inter = ("inter_out", "inter_lse") if self.kind == "merge" else ()
        return ("query", *gain, *inter, *sources, *(("delta",) if self.add else ()))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The node's outputs in their order."""
        if self.kind == "inter":
            return ("out", "lse")
        return ("out", "sum") if self.add else ("out",)

    def dtype_of(self, parameter: str) -> DType:
        """Return the dtype of an input or output."""
        if parameter in ("inter_lse", "lse"):
            return "float32"
        return self.query_dtype if parameter in ("query", "queries", "norm_weight") else self.dtype

    @property
    def launch(self) -> Launch:
        """The launch; the limits were chosen from the registers that the compiler reports (docs/triton.md)."""
        block = max(32, _power(self.width))
        each = 8 if block <= 2048 else 16  # elements of a row that a thread holds, a few vectors of 16 bytes
        warps = min(16, max(1, block // (32 * each)))
        if self.kind == "inter" and block <= 8192:
            warps = min(8, warps)
        warps = min(16, block // 32, max(1, int(warps * self.warp_factor)))
        if self.kind == "inter":
            return self._inter(block, warps)
        each = block // (32 * warps)
        # With 16 warps a thread has at most 128 registers, and half as many elements leave room for the rest.
        rest = max(1, self.count - 1)
        tile = min(8, max(1, (32 if warps > 8 else 64) // each), _power(rest))
        return Launch(block, warps, tile, _power(-(-rest // tile)), 1, 1)

    @property
    def alternatives(self) -> tuple[KernelSpec, ...]:
        """The same kernel with the work divided in other ways, this one first; a GPU's own timing may choose.

        A thread has 4 to 32 elements of a row: fewer are no vector, and more leave no registers for the rest.
        """
        others = [replace(self, warp_factor=factor) for factor in (2, 0.5)]
        held = [(other, other.launch.block // (32 * other.launch.warps)) for other in others]
        return (self, *(other for other, each in held if 4 <= each <= 32 and other.launch != self.launch))

    def _inter(self, block: int, warps: int) -> Launch:
        """Return Inter's launch: a query costs a thread its own elements and those of its accumulator."""
        share = min(8, max(1, 64 * 32 * warps // block), _power(self.queries))
        if block > 8192:
            share = 1
        elif block > 2048 and not self.aligned:
            # Without vectors every element has an address of its own, which takes registers too.
            share = max(1, share // 2)
        return Launch(block, warps, 1, _power(self.count), share, -(-self.queries // share))

    @property
    def key(self) -> str:
        """Name of the kernel, the same wherever it is computed from a node (``runtime/native/cuda`` does).

        Floats are the hexadecimal bits of their fp32 values; what a form does not have is zero, or one query.
        """
        norm_eps, index = self.norm_eps * self.norm, self.index * (self.kind == "merge")
        last_bias, queries = (0.0, self.queries) if self.kind == "inter" else (self.last_bias, 1)
        floats = (self.eps, self.scale, last_bias, norm_eps)
        bits = "-".join(f"{struct.unpack('<I', struct.pack('<f', value))[0]:08x}" for value in floats)
        short = f"{TRITON_DTYPE[self.dtype]}-{TRITON_DTYPE[self.query_dtype]}"
        divided = "" if self.warp_factor == 1 else f"-w{self.launch.warps}"
        return f"{self.op_type}-d{self.width}-{short}-{bits}-i{index}-s{queries}{divided}"


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
