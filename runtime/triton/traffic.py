"""Bytes that a kernel moves, against the bound of touching every operand once.

Derived from the kernels' structure, not from a profiler; ``tests/runtime/triton`` counts the addresses that the
kernels really load and store in the interpreter and compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from depthwire.runtime.triton.spec import ITEM_BYTES

if TYPE_CHECKING:
    from depthwire.runtime.triton.spec import KernelSpec


@dataclass(frozen=True)
class Traffic:
    """Bytes of one row (token).

    Attributes:
        sources: Loads of sources, ``delta`` and the inter-block result.
        parameters: Loads of queries and norm weights, the same for every row and so served by a cache.
        stores: All outputs.
        bound: Sources, ``delta``, the inter-block result's row and the outputs, each touched once.
    """

    sources: int
    parameters: int
    stores: int
    bound: int

    @property
    def ratio(self) -> float:
        """Row-dependent bytes over the bound; 1 where every source is read once."""
        return (self.sources + self.stores) / self.bound


def traffic(spec: KernelSpec) -> Traffic:
    """Return the bytes a row that a kernel loads and stores."""
    row, query = spec.width * ITEM_BYTES[spec.dtype], spec.width * ITEM_BYTES[spec.query_dtype]
    if spec.kind == "inter":
        stores = spec.queries * (row + 4)
        once = spec.count * row
        return Traffic(spec.launch.programs * once, spec.queries * query, stores, once + stores)
    loads = (spec.count + spec.add) * row + (row + 4 if spec.kind == "merge" else 0)
    stores = (1 + spec.add) * row
    parameters = (spec.count > 0) * query + spec.norm * query
    return Traffic(loads, parameters, stores, loads + stores)
