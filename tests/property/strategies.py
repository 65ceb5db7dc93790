"""Which transformers the property tests draw."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.zoo import HEADS, NORMS, ORDERS, WIDTH, Spec


def fixed(max_examples: int) -> settings:
    """Return settings under which every run draws the same examples."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def specs(draw: st.DrawFn, *, liftable: bool = False) -> Spec:
    """Draw a transformer; ``liftable`` ones have no break."""
    placements = ["pre", "sandwich"] if liftable else ["pre", "pre", "sandwich", "post", "inside"]
    placement = draw(st.sampled_from(placements))
    block = draw(st.sampled_from(["sequential", "sequential", "parallel-one", "parallel-two"]))
    order = draw(st.sampled_from(sorted(ORDERS)))
    norm = draw(st.sampled_from(NORMS))
    scaled = draw(st.booleans())
    skip_scale = draw(st.sampled_from([1.0, 0.5, -1.25])) if scaled else 1.0
    scales = ["none", "float", "vector"]
    if skip_scale == 1.0 and (block == "sequential" or order in ("x+(a+m)", "(m+a)+x")):
        scales.append("alpha")
    positions = draw(st.booleans())
    choices: dict[str, Any] = {
        "layers": draw(st.sampled_from([2, 2, 3])),
        "norm": norm,
        "weight": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-5, 1e-6, 0.1, *([None] if norm == "rms" else [])])),
        "placement": placement,
        "block": block,
        "order": order,
        "swapped": draw(st.booleans()),
        "branch_scale": draw(st.sampled_from(scales)),
        "skip_scale": skip_scale,
        "skip_by_alpha": draw(st.booleans()),
        "positions": positions,
        "multiplier": draw(st.sampled_from([None, 4.0])),
        "embedding_norm": draw(st.booleans()),
        "tied": draw(st.booleans()),
        "mlp": draw(st.sampled_from(["gelu", "gelu-spelled", "swiglu", "moe"])),
        "hidden": draw(st.sampled_from([WIDTH, 2 * WIDTH])),
        "attention": draw(st.sampled_from(["causal", "mask", "eager"])),
        "kv_heads": draw(st.sampled_from([1, HEADS])),
        "shared": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "flat_mlp": draw(st.booleans()) and block == "sequential",
        "cut": draw(st.sampled_from(["no", "norm", "stream"])),
        "extra_norm": draw(st.booleans()),
        "raw_reader": "none" if liftable or placement != "pre" else draw(st.sampled_from(["none", "probe", "output"])),
    }
    if placement in ("post", "inside"):
        # The breaks of these are what counts; a second kind of reader would only blur them.
        choices.update(extra_norm=False, flat_mlp=False, block="sequential", skip_scale=1.0)
    return Spec(**choices)
