"""The kernels of token routing: which function each computes, its parameters, and the launch that follows.

Unlike the reads, these take the number of tokens T and of slots K as two int32 parameters behind their pointers: one
cubin serves every batch, every K, and every T that its name covers. Constants are what the code's shape depends on.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Final, Literal

from depthwire.errors import UsageError

RoutingKind = Literal[
    "select", "budget", "gather", "scatter", "sums", "rank", "surprise", "attention", "slot_attention"
]

LARGEST_BLOCK: Final = 16384
"""Tokens of a row, or of a window, that top-k holds in the registers of one thread block."""
BUDGET_BLOCK: Final = 2048
"""Tokens that the running budget takes at a time; of rows there is no longest."""
LARGEST_HEAD: Final = 128

_FLOATS: Final = {"float32": ("fp32", 4), "float16": ("fp16", 2), "bfloat16": ("bf16", 2)}
_OPERANDS: Final[dict[RoutingKind, tuple[str, str]]] = {
    "select": ("score valid", "index taken"),
    "budget": ("score valid threshold budget state", "index taken state_out"),
    "gather": ("x index", "out"),
    "scatter": ("base index taken rows", "out"),
    "sums": ("delta prior valid", "sums"),
    "rank": ("sums criteria valid", "rank"),
    "surprise": ("delta prior criteria valid", "rank"),
    "attention": ("query key value index kept", "out"),
    "slot_attention": ("query key value kept", "out"),
}
_EXACT: Final = {
    "score": "float32",
    "threshold": "float32",
    "sums": "float32",
    "rank": "float32",
    "index": "int64",
    "budget": "int64",
    "state": "int64",
    "state_out": "int64",
    "valid": "int8",
    "taken": "int8",
    "kept": "int8",
}


@dataclass(frozen=True)
class RoutingLaunch:
    """How a kernel divides its work.

    Attributes:
        tile: Slots or tokens (attention: pairs of slot and head of a group) of a program; 0 where one has a whole row.
        columns: Elements of a token that are loaded together, and other inner tiles.
        warps: Warps of a thread block.
        stages: Loads of a loop that are under way at once.
    """

    tile: int
    columns: int
    warps: int
    stages: int = 1

    @property
    def programs(self) -> int:
        """Slots or tokens of a block; 1 where a block has a row. A launcher divides by it."""
        return max(1, self.tile)


@dataclass(frozen=True)
class RoutingSpec:
    """One kernel of the routing operators, or of the attention in a routed block.

    Attributes:
        kind: ``sums`` and ``rank`` are the two launches of ``SurpriseScore``, ``surprise`` is all of it in one;
            ``attention`` has K queries over T keys, ``slot_attention`` over the K slots.
        block: Of ``select``: the power of two that holds the row, or with windows the window. Of ``budget``: that which
            holds the row, or 0 where ``steps`` go over it.
        window: Tokens of a window (``select``; 0 for none) or of the moving average (``rank``, ``surprise``).
        row_bytes: Of ``gather`` and ``scatter``: bytes of a token.
        width: Of ``sums`` and ``surprise``: d; of attention: elements of a head.
        dtype: Of scores (fp32 alone), of ``delta`` and ``prior``, of ``criteria``, or of query, key, value and output.
        criteria: Of ``surprise``: dtype of ``criteria``.
        kv_heads: Heads of keys and values.
        group: Query heads for each of them.
        scale: Factor on the logits.
        steps: Of ``budget`` with block 0: tokens taken at a time.
        tensor_cores: Of attention: tiles for matrix instructions, or for multiply-adds, which is all that triton makes
            for 7.5.

    Raises:
        UsageError: ``triton.bad-spec``.
    """

    kind: RoutingKind
    block: int = 0
    window: int = 0
    row_bytes: int = 0
    width: int = 0
    dtype: str = "float32"
    criteria: str = "float32"
    kv_heads: int = 0
    group: int = 0
    scale: float = 1.0
    steps: int = BUDGET_BLOCK
    tensor_cores: bool = True

    def __post_init__(self) -> None:
        """Refuse what no kernel computes."""
        selects, moves = self.kind in ("select", "budget"), self.kind in ("gather", "scatter")
        power = self.block & (self.block - 1) == 0
        largest = LARGEST_BLOCK if self.kind == "select" else BUDGET_BLOCK
        streams = self.kind == "budget" and self.block == 0
        if selects and not streams and not (power and 32 <= self.block <= largest):
            raise self._refused("block", f"a power of two from 32 to {largest}, of at least the row or window")
        if self.window < (self.kind in ("rank", "surprise")) or (self.kind == "select" and self.window > self.block):
            raise self._refused("window", "a window that the block holds" if selects else "at least 1 token")
        if self.window >= 1 << 31:
            raise self._refused("window", "fewer than 2^31 tokens")
        if moves and self.row_bytes < 1:
            raise self._refused("row_bytes", "at least 1 byte")
        if self.kind in ("sums", "surprise") and self.width < 1:
            raise self._refused("width", "at least 1")
        if self.attends and not 1 <= self.width <= LARGEST_HEAD:
            raise self._refused("width", f"heads of 1 to {LARGEST_HEAD} elements")
        if self.attends and min(self.kv_heads, self.group) < 1:
            raise self._refused("kv_heads" if self.kv_heads < 1 else "group", "at least 1")
        dtypes = ("float32",) if selects else tuple(_FLOATS)
        if self.dtype not in dtypes:
            raise self._refused("dtype", f"one of {', '.join(dtypes)}")
        if self.criteria not in _FLOATS:
            raise self._refused("criteria", f"one of {', '.join(_FLOATS)}")

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
    def attends(self) -> bool:
        """Whether this is an attention."""
        return self.kind in ("attention", "slot_attention")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The kernel's input pointers in their order."""
        return tuple(_OPERANDS[self.kind][0].split())

    @property
    def outputs(self) -> tuple[str, ...]:
        """The kernel's output pointers in their order; ``sums`` is a scratch of the operator."""
        return tuple(_OPERANDS[self.kind][1].split())

    @property
    def scalars(self) -> tuple[str, ...]:
        """The int32 parameters behind the pointers."""
        return ("tokens",) if self.kind in ("sums", "rank", "surprise") else ("tokens", "slots")

    @property
    def word(self) -> int:
        """Bytes that a token is moved by."""
        return next(size for size in (4, 2, 1) if self.row_bytes % size == 0)

    def dtype_of(self, parameter: str) -> str:
        """Return the dtype that a pointer points to; bits are bytes, and what is moved are words."""
        if self.kind in ("gather", "scatter") and parameter in ("x", "base", "rows", "out"):
            return f"int{8 * self.word}"
        if self.kind == "surprise" and parameter == "criteria":
            return self.criteria
        return _EXACT.get(parameter, self.dtype)

    @property
    def launch(self) -> RoutingLaunch:
        """The launch; the limits were chosen from the registers that the compiler reports (docs/triton.md)."""
        if self.kind in ("select", "budget"):
            each, most = (8, 16) if self.kind == "select" else (4, 16)
            return RoutingLaunch(0, 0, min(most, max(1, (self.block or self.steps) // (32 * each))))
        if self.kind in ("gather", "scatter"):
            columns = min(_power(self.row_bytes // self.word), 1024 if self.kind == "gather" else 128)
            least = 1 if self.kind == "gather" else 16
            return RoutingLaunch(min(64, max(least, 2048 // columns)), columns, 4)
        if self.kind == "sums":
            columns = min(_power(self.width), 1024)
            return RoutingLaunch(max(1, 1024 // columns), columns, 4)
        if self.kind == "rank":
            return RoutingLaunch(64, min(16, _power(self.window)), 4)
        if self.kind == "surprise":
            return RoutingLaunch(64, min(_power(self.width), 256), 4)
        matrices = self.tensor_cores and self.dtype != "float32"
        return RoutingLaunch(64, 32, 4, stages=2) if matrices else RoutingLaunch(16, 16, 4)

    def on(self, capability: str) -> RoutingSpec:
        """Return the kernel for a compute capability (``SM87``): attention is tiled otherwise for 7.5."""
        return replace(self, tensor_cores=False) if self.attends and capability == "SM75" else self

    @property
    def key(self) -> str:
        """Name of the kernel, the same wherever it is computed from a node (``runtime/native/cuda`` does)."""
        dtype = _FLOATS[self.dtype][0]
        match self.kind:
            case "select":
                return f"SelectTokens-b{self.block}-w{self.window}"
            case "budget":
                return f"SelectTokensBudget-b{self.block}"
            case "gather" | "scatter":
                return f"{self.kind.capitalize()}Tokens-r{self.row_bytes}"
            case "sums" | "rank" | "surprise":
                part = {"sums": f"sums-d{self.width}", "rank": f"rank-w{self.window}"}
                whole = f"d{self.width}-w{self.window}-{_FLOATS[self.criteria][0]}"
                return f"SurpriseScore-{part.get(self.kind, whole)}-{dtype}"
        name = "RoutedAttention" if self.kind == "attention" else "SlotAttention"
        suffix = "" if self.tensor_cores else "-fma"
        return f"{name}-h{self.kv_heads}x{self.group}-d{self.width}-{dtype}-{_bits(self.scale)}{suffix}"


def select_block(levels: int, window: int = 0) -> int:
    """Return the block of a top-k: L of the operator's name says how many tokens a row may have."""
    return max(32, _power(window) if window else 1 << levels)


def budget_block(levels: int) -> int:
    """Return the block of a running budget."""
    return max(32, 1 << levels) if 1 << levels <= BUDGET_BLOCK else 0


def item_bytes(dtype: str) -> int:
    """Return the bytes of one element."""
    return _FLOATS[dtype][1]


def _bits(value: float) -> str:
    return f"{struct.unpack('<I', struct.pack('<f', value))[0]:08x}"


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
