"""Function bodies of the token selections, written in ONNX's text format.

Runtimes break ties of TopK as they like, so a body uses its *values* alone: what is above the k-th value is selected,
and what equals it by its place, up to what is left. Places are prefix sums. CumSum becomes a loop in TensorRT and TopK
takes no more than 3840 there, so prefixes are unrolled, ``log2`` of T shifted additions, and the slots are filled by
scattering each token to its place.
"""

from __future__ import annotations

from depthwire.export.ops._base import function_text

# IEEE single's largest and smallest normal magnitudes.
_FLT_MAX = 3.4028234663852886e38
_FLT_MIN = 1.1754943508222875e-38
_LARGE = 1 << 30  # above every count, and far from the end of int32
_FLOAT, _INT32, _INT64, _DOUBLE = 1, 6, 7, 11  # of TensorProto; Cast's `to` is written as a number


def steps(tokens: int) -> int:
    """Return L, the number of doublings that reach over T tokens; at least one."""
    return max(1, (tokens - 1).bit_length())


def top_k_body(count: int, *, opset: int, double: bool = False) -> str:
    """Return the body of ``SelectTokens_L``.

    Args:
        count: L.
        opset: Opset of the operators used; 18 or newer.
        double: The scores are fp64.
    """
    lines = [
        *_sizes(),
        *_canonical(double=double, valid="valid"),
        # The window's width is T where the attribute is 0.
        "window_value = Constant<value_ints = [0]>()",
        "window_scalar = Constant<value_int: int = @window>()",
        "window_size = Add(window_value, window_scalar)",
        "some = Min(window_size, one)",
        "none = Sub(one, some)",
        "fallback = Mul(none, tokens)",
        "width = Add(window_size, fallback)",
        "product = Mul(slot_count, width)",
        "share = Div(product, tokens)",
        "windows_shape = Concat<axis = 0>(batch, last, width)",
        "ranked = Reshape(canonical, windows_shape)",
        "ranked_valid = Reshape(valid, windows_shape)",
        "values, order = TopK<axis = -1>(ranked, share)",
        "kth = Slice(values, last, far, last)",
        "above = Greater(ranked, kth)",
        "at_kth = Equal(ranked, kth)",
        "equal = And(at_kth, ranked_valid)",
        f"above_count = Cast<to = {_INT32}>(above)",
        "above_total = ReduceSum<keepdims = 1>(above_count, last)",
        f"narrow_share = Cast<to = {_INT32}>(share)",
        "left = Sub(narrow_share, above_total)",
        f"equal_windows = Cast<to = {_INT32}>(equal)",
        "equal_flat = Reshape(equal_windows, shape)",
        *_prefix("equal_flat", "equal_through", count, "Add", 0),
        # Places among the equals of a window: less what stands before the window.
        "equal_places = Reshape(equal_through, windows_shape)",
        "place_0 = Slice(equal_places, zero, one, two)",
        "equal_0 = Slice(equal_windows, zero, one, two)",
        "before = Sub(place_0, equal_0)",
        "place = Sub(equal_places, before)",
        "fits = LessOrEqual(place, left)",
        "equal_taken = And(equal, fits)",
        "chosen = Or(above, equal_taken)",
        "selected = Reshape(chosen, shape)",
        f"ones = Cast<to = {_INT32}>(selected)",
        *_prefix("ones", "through", count, "Add", 0),
        *_pack("selected", "through"),
    ]
    return function_text(f"SelectTokens_{count} <window>(score, valid, slots) => (index, taken)", lines, opset)


def budget_body(count: int, *, opset: int, double: bool = False) -> str:
    """Return the body of ``SelectTokensBudget_L``; arguments as in ``top_k_body``."""
    lines = [
        *_sizes(),
        *_canonical(double=double, valid=None),
        "reaches = GreaterOrEqual(canonical, threshold)",
        "asks = And(valid, reaches)",
        f"asks_count = Cast<to = {_INT32}>(asks)",
        *_prefix("asks_count", "asked", count, "Add", 0),
        f"valid_count = Cast<to = {_INT32}>(valid)",
        *_prefix("valid_count", "valid_through", count, "Add", 0),
        # The budget's products may exceed 32 bits; room, counted from this chunk's start and no more than K, does not.
        f"wide_through = Cast<to = {_INT64}>(valid_through)",
        "seen = Slice(state, zero, one, one)",
        "taken_before = Slice(state, one, two, one)",
        "position = Add(wide_through, seen)",
        "numerator, denominator, margin = Split<axis = 0, num_outputs = 3>(budget)",
        "scaled = Mul(position, numerator)",
        "granted = Div(scaled, denominator)",
        "cap = Add(granted, margin)",
        "wide_room = Sub(cap, taken_before)",
        "some_room = Max(wide_room, zero)",
        "slot_room = Min(some_room, slot_count)",
        f"room = Cast<to = {_INT32}>(slot_room)",
        "slack = Sub(room, asked)",
        *_prefix("slack", "least", count, "Min", _LARGE),
        "short = Min(least, nought)",
        "through = Add(asked, short)",
        *_shift("through", "through_before", 1, "nought"),
        "selected = Greater(through, through_before)",
        *_pack("selected", "through"),
        "seen_after = Slice(position, last, far, one)",
        f"wide_total = Cast<to = {_INT64}>(total)",
        "taken_after = Add(taken_before, wide_total)",
        "state_out = Concat<axis = 1>(seen_after, taken_after)",
    ]
    inputs = "score, valid, threshold, budget, state, slots"
    return function_text(f"SelectTokensBudget_{count} ({inputs}) => (index, taken, state_out)", lines, opset)


def _sizes() -> list[str]:
    """Return the lines for what shapes say: all of it folds, and K alone may be dynamic."""
    return [
        "zero = Constant<value_ints = [0]>()",
        "one = Constant<value_ints = [1]>()",
        "two = Constant<value_ints = [2]>()",
        "last = Constant<value_ints = [-1]>()",
        "far = Constant<value_ints = [2147483647]>()",
        f"nought = Cast<to = {_INT32}>(zero)",
        "shape = Shape(score)",
        "batch = Slice(shape, zero, one)",
        "tokens = Slice(shape, one, two)",
        "slot_count = Shape(slots)",
        "from_scalar = Constant<value_int = 0>()",
        "step_scalar = Constant<value_int = 1>()",
        "tokens_scalar = Squeeze(tokens)",
        "wide_iota = Range(from_scalar, tokens_scalar, step_scalar)",
        f"iota = Cast<to = {_INT32}>(wide_iota)",
    ]


def _canonical(*, double: bool, valid: str | None) -> list[str]:
    """Return the lines for ``canonical``: no NaN, -inf or denormal; padding counts as the lowest score."""
    cast = f"Cast<to = {_DOUBLE if double else _FLOAT}>"
    return [
        f"lowest_value = Constant<value_float = {-_FLT_MAX!r}>()",
        f"lowest = {cast}(lowest_value)",
        f"tiny_value = Constant<value_float = {_FLT_MIN!r}>()",
        f"tiny = {cast}(tiny_value)",
        "null_value = Constant<value_float = 0.0>()",
        f"null = {cast}(null_value)",
        "ordered = Greater(score, lowest)",
        f"usable = And(ordered, {valid})" if valid else "usable = Identity(ordered)",
        "finite = Where(usable, score, lowest)",
        "magnitude = Abs(finite)",
        "vanishing = Less(magnitude, tiny)",
        "canonical = Where(vanishing, null, finite)",
    ]


def _prefix(source: str, result: str, count: int, combine: str, fill: int) -> list[str]:
    """Return the lines for the inclusive prefix (sum or minimum) of an int32 ``[B, T]``."""
    fill_name = f"{result}_fill"
    lines = [f"{fill_name}_wide = Constant<value_ints = [{fill}]>()"]
    lines.append(f"{fill_name} = Cast<to = {_INT32}>({fill_name}_wide)")
    through = source
    for i in range(count):
        following = result if i == count - 1 else f"{result}_{i}"
        lines += _shift(through, f"{result}_shifted_{i}", 1 << i, fill_name)
        lines.append(f"{following} = {combine}({through}, {result}_shifted_{i})")
        through = following
    return lines


def _shift(source: str, result: str, distance: int, fill: str) -> list[str]:
    """Return the lines that move ``[B, T]`` to the right; no step is empty, even where the distance is T."""
    return [
        f"{result}_distance = Constant<value_ints = [{distance}]>()",
        f"{result}_end = Constant<value_ints = [{-distance}]>()",
        f"{result}_shape = Concat<axis = 0>(batch, {result}_distance)",
        f"{result}_head = Expand({fill}, {result}_shape)",
        f"{result}_long = Concat<axis = 1>({result}_head, {source})",
        f"{result} = Slice({result}_long, zero, {result}_end, one)",
    ]


def _pack(selected: str, through: str) -> list[str]:
    """Return the lines for ``index`` and ``taken``: each token scattered to its place, the selected ones in front."""
    return [
        f"total = Slice({through}, last, far, one)",
        "unit_value = Constant<value_ints = [1]>()",
        f"unit = Cast<to = {_INT32}>(unit_value)",
        f"front = Sub({through}, unit)",
        "shifted = Add(iota, total)",
        f"back = Sub(shifted, {through})",
        f"target = Where({selected}, front, back)",
        "grid = Expand(iota, shape)",
        "places = ScatterElements<axis = 1>(grid, target, grid)",  # a permutation: every place is written
        "slot_tokens = Slice(places, zero, slot_count, one)",
        f"index = Cast<to = {_INT64}>(slot_tokens)",
        "slot_iota = Slice(iota, zero, slot_count, zero)",
        "taken = Less(slot_iota, total)",
    ]
