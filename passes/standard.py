"""The standard sequence of passes, from a captured program to one that a target can take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from depthwire.passes._pipeline import Pipeline
from depthwire.passes.canonicalize_constants import CanonicalizeConstants
from depthwire.passes.canonicalize_views import CanonicalizeViews
from depthwire.passes.fuse_attention import FuseAttention
from depthwire.passes.fuse_norm import FuseNorm
from depthwire.passes.fuse_read_add import FuseReadAdd
from depthwire.passes.fuse_read_norm import FuseReadNorm
from depthwire.passes.fuse_rotary import FuseRotary
from depthwire.passes.legalize_attention import LegalizeAttention
from depthwire.passes.legalize_experts import LegalizeExperts
from depthwire.passes.legalize_writes import LegalizeWrites
from depthwire.passes.lift_attn_res import LiftAttnRes
from depthwire.passes.partition import Partition
from depthwire.passes.recognize_attn_res import RecognizeAttnRes
from depthwire.passes.recognize_routing import RecognizeRouting
from depthwire.passes.recognize_triangular_inverse import RecognizeTriangularInverse
from depthwire.passes.remove_noops import RemoveNoops
from depthwire.passes.remove_trivial_reads import RemoveTrivialReads
from depthwire.passes.remove_zero_queries import RemoveZeroQueries
from depthwire.passes.route_tokens import RouteTokens
from depthwire.passes.schedule_two_phase import ScheduleTwoPhase

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire.passes._base import Pass
    from depthwire.passes.schedule_two_phase import Policy
    from depthwire.route_parts import RouteParts


def canonical_pipeline(*, verify: bool = True) -> Pipeline:
    """Return the passes that change no structure: what ``inspect`` looks at."""
    passes = (RemoveNoops(), CanonicalizeViews(), CanonicalizeConstants(), RecognizeTriangularInverse(), FuseNorm())
    return Pipeline(passes, verify)


def standard_pipeline(
    *,
    attn_res: str | None,
    correction: Literal["eps", "scale"] = "eps",
    queries: Path | None = None,
    attention: Literal["op", "decomposed"] = "decomposed",
    collapse: bool = False,
    route: RouteParts | None = None,
    schedule: Policy | None = None,
) -> Pipeline:
    """Return the passes of ``depthwire convert``.

    Args:
        attn_res: ``full``, ``block:N``, ``block-layers:K``, or ``None`` to keep the residual stream as it is.
        correction: How a zero-query read is made to preserve the function.
        queries: Trained queries.
        attention: Whether the target takes attention as one operator.
        collapse: Turn reads whose query is zero back into a plain residual stream.
        route: Which layers compute which tokens, and the routers; ``None`` computes all.
        schedule: How reads are executed (fused, and in two phases where it pays); ``None`` leaves them single
            operators, and attention and rotary positions as the model wrote them, for training.

    Raises:
        UsageError: ``attn_res`` cannot be read.
    """
    passes: list[Pass] = [*canonical_pipeline().passes, RecognizeRouting(), RecognizeAttnRes()]
    if attn_res is not None:
        passes.append(LiftAttnRes(Partition.parse(attn_res), correction, queries))
    passes.append(RemoveTrivialReads())
    if collapse:
        passes.append(RemoveZeroQueries())
    if route is not None:
        # Rotary tables that are gathered for the selected tokens are no constants any more, which the fusion needs.
        passes += [FuseRotary(), RouteTokens(route)] if schedule is not None else [RouteTokens(route)]
    if schedule is not None:
        passes += [ScheduleTwoPhase(schedule), FuseReadNorm(), FuseReadAdd(), FuseAttention(), FuseRotary()]
    passes += [LegalizeExperts(), LegalizeWrites()]
    if attention == "decomposed":
        passes.append(LegalizeAttention())
    return Pipeline(tuple(passes))
