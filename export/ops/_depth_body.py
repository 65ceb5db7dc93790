"""Function bodies of the depth-attention operators, written in ONNX's text format.

A body works source by source and never concatenates them, so each is read where it lies; statistics, softmax and sum
are fp32. ``AttnResInter`` alone stacks its sources: S queries then share two matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

from depthwire.export.ops._base import function_text


@dataclass(frozen=True)
class ReadForm:
    """Which of the reads an operator is; the parts of its name in their order.

    Attributes:
        arity: n, the number of sources (m of a merge).
        add: The last source is a sum made on the way.
        unit: The normalised sources are mixed.
        merge: Phase 1's mean is one more source.
        norm: The RMSNorm that follows is part of it.
    """

    arity: int
    add: bool = False
    unit: bool = False
    merge: bool = False
    norm: bool = False

    @property
    def name(self) -> str:
        """Such as ``AttnResAddReadNorm_9``."""
        kind = ("Add" if self.add else "") + ("Unit" if self.unit else "") + ("Merge" if self.merge else "Read")
        return f"AttnRes{kind}{'Norm' if self.norm else ''}_{self.arity}"

    @property
    def vectors(self) -> tuple[str, ...]:
        """The inputs of any floating dtype."""
        return ("query", "norm_weight") if self.norm else ("query",)

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(f"source_{i}" for i in range(self.arity))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The inputs behind the vectors."""
        inter = ("inter_out", "inter_lse") if self.merge else ()
        return (*inter, *self.sources, *(("delta",) if self.add else ()))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The results."""
        return ("out", "sum") if self.add else ("out",)

    @property
    def floats(self) -> tuple[str, ...]:
        """The float attributes."""
        return ("eps", "scale", "last_bias", "norm_eps") if self.norm else ("eps", "scale", "last_bias")

    @property
    def ints(self) -> tuple[str, ...]:
        """The integer attributes."""
        return ("index",) if self.merge else ()


def read_body(form: ReadForm, *, opset: int, widen: bool) -> str:
    """Return the body of a read or a merge.

    Args:
        form: Which one.
        opset: Opset of the operators used; 23 or newer with ``norm``, else 18.
        widen: Cast everything to fp32 first, and the result back.
    """
    raw = list(form.sources)
    lines = ["last = Constant<value_ints = [-1]>()"]
    if form.add:
        # Added in fp32 and rounded: runtimes lack additions in the narrow types.
        casts = [f"wide_last = Cast<to = 1>({raw[-1]})", "wide_delta = Cast<to = 1>(delta)"]
        wide_sum = [*casts, "total = Add(wide_last, wide_delta)", "sum = CastLike(total, delta)"]
        lines += wide_sum if widen else [f"sum = Add({raw[-1]}, delta)"]
        raw[-1] = "sum"
    like = "inter_out" if form.merge else "source_0"
    if form.merge:
        lines += [
            "row = Constant<value_int: int = @index>()",
            "inter_row = Gather<axis = 0>(inter_out, row)",
            "lse_row = Gather<axis = 0>(inter_lse, row)",
            f"lse_value = {'Cast<to = 1>' if widen else 'Identity'}(lse_row)",
            "logit_inter = Unsqueeze(lse_value, last)",
        ]
    wide = {name: f"wide_{name}" if widen else name for name in (*form.vectors, *raw, "inter_row")}
    if widen:
        # Cast's `to` is written as the number of TensorProto.FLOAT.
        inter = ("inter_row",) if form.merge else ()
        lines += [f"{wide[name]} = Cast<to = 1>({name})" for name in (*form.vectors, *raw, *inter)]
    values = [wide[name] for name in raw]
    lines += _logits(values, wide["query"])
    biased = [*(f"scaled_{i}" for i in range(form.arity))]
    if biased:
        lines.append(f"biased = Add({biased[-1]}, last_bias_value)")
        biased[-1] = "biased"
    if form.merge:
        values, biased = [wide["inter_row"], *values], ["logit_inter", *biased]
    mixed = _mix(lines, values, biased, unit=form.unit)
    if form.norm:
        weight = wide["norm_weight"]
        lines.append(f"normed = RMSNormalization<axis = -1, epsilon: float = @norm_eps>({mixed}, {weight})")
        mixed = "normed"
    lines.append(f"out = CastLike({mixed}, {like})" if widen else f"out = Identity({mixed})")
    attributes = ", ".join((*form.floats, *form.ints))
    inputs, outputs = ", ".join((*form.vectors, *form.tensors)), ", ".join(form.outputs)
    return function_text(f"{form.name} <{attributes}>({inputs}) => ({outputs})", lines, opset)


def inter_body(arity: int, *, opset: int, widen: bool, double: bool = False) -> str:
    """Return the body of ``AttnResInter_n``: out ``[S, ..., d]`` and lse ``[S, ...]`` for queries ``[S, d]``.

    Args:
        arity: n.
        opset: Opset of the operators used; 18 or newer.
        widen: Cast to fp32 first, and the means back.
        double: The sources are fp64, and so is lse by type.
    """
    names = [f"source_{i}" for i in range(arity)]
    lines = [
        "one = Constant<value_ints = [1]>()",
        "last = Constant<value_ints = [-1]>()",
        "zero = Constant<value_ints = [0]>()",
        "eps_value = Constant<value_float: float = @eps>()",
        "scale_value = Constant<value_float: float = @scale>()",
        f"wide_queries = {'Cast<to = 1>' if widen else 'Identity'}(queries)",
        "columns = Transpose<perm = [1, 0]>(wide_queries)",
    ]
    for i, name in enumerate(names):  # any number of leading axes becomes one, R
        lines += [f"flat_{i} = Flatten<axis = -1>({name})", f"row_{i} = Unsqueeze(flat_{i}, one)"]
    lines += [
        f"stack = Concat<axis = 1>({', '.join(f'row_{i}' for i in range(arity))})",  # [R, n, d]
        f"bank = {'Cast<to = 1>' if widen else 'Identity'}(stack)",
        "square = Mul(bank, bank)",
        "mean_square = ReduceMean<keepdims = 1>(square, last)",
        "shifted = Add(mean_square, eps_value)",
        "rms = Sqrt(shifted)",
        "dot = MatMul(bank, columns)",  # [R, n, S]
        "normed = Div(dot, rms)",
        "scaled = Mul(normed, scale_value)",
        "logits = Transpose<perm = [0, 2, 1]>(scaled)",  # [R, S, n]
        "weights = Softmax<axis = -1>(logits)",
        "mean = MatMul(weights, bank)",  # [R, S, d]
        "turned = Transpose<perm = [1, 0, 2]>(mean)",
        "log_sum = ReduceLogSumExp<keepdims = 0>(logits, last)",  # [R, S]
        "turned_log_sum = Transpose<perm = [1, 0]>(log_sum)",
        "queries_shape = Shape(queries)",
        "count = Slice(queries_shape, zero, one)",
        "source_shape = Shape(source_0)",
        "out_shape = Concat<axis = 0>(count, source_shape)",
        "lse_shape = Slice(out_shape, zero, last)",
        "shaped = Reshape(turned, out_shape)",
        "shaped_lse = Reshape(turned_log_sum, lse_shape)",
        f"lse = {'Cast<to = 11>' if double else 'Identity'}(shaped_lse)",  # TensorProto.DOUBLE
        "out = CastLike(shaped, source_0)" if widen else "out = Identity(shaped)",
    ]
    return function_text(f"AttnResInter_{arity} <eps, scale>(queries, {', '.join(names)}) => (out, lse)", lines, opset)


def _logits(values: list[str], query: str) -> list[str]:
    """Return the lines that define ``scaled_i``, the logit of each source times the scale, and ``rms_i``."""
    if not values:
        return []
    lines = [
        "eps_value = Constant<value_float: float = @eps>()",
        "scale_value = Constant<value_float: float = @scale>()",
        "last_bias_value = Constant<value_float: float = @last_bias>()",
        f"plain_column = Unsqueeze({query}, last)",
        "column = Mul(plain_column, scale_value)",
    ]
    for i, source in enumerate(values):
        lines += [
            f"square_{i} = Mul({source}, {source})",
            f"mean_square_{i} = ReduceMean<keepdims = 1>(square_{i}, last)",
            f"shifted_{i} = Add(mean_square_{i}, eps_value)",
            f"rms_{i} = Sqrt(shifted_{i})",
            f"dot_{i} = MatMul({source}, column)",
            f"scaled_{i} = Div(dot_{i}, rms_{i})",
        ]
    return lines


def _mix(lines: list[str], values: list[str], logits: list[str], *, unit: bool) -> str:
    """Append softmax and weighted sum; return the name of the mixed value."""
    count = len(values)
    lines += [f"logits = Concat<axis = -1>({', '.join(logits)})", "weights = Softmax<axis = -1>(logits)"]
    lines.append(f"{', '.join(f'weight_{i}' for i in range(count))} = Split<axis = -1, num_outputs = {count}>(weights)")
    for i, value in enumerate(values):
        weight = f"weight_{i}"
        if unit:
            lines.append(f"unit_{i} = Div({weight}, rms_{i})")
            weight = f"unit_{i}"
        lines.append(f"term_{i} = Mul({weight}, {value})")
    total = "term_0"
    for i in range(1, count):
        lines.append(f"sum_{i} = Add({total}, term_{i})")
        total = f"sum_{i}"
    return total
