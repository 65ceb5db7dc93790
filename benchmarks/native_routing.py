"""What one routing operator costs in ONNX Runtime's CPU provider: kernel, function body, and a row of plain operators.

A model holds eight equal nodes over tensors of one shape; its time is divided by their number. Prints for each operator
``kernel_time`` and, beside it, ``body_time`` (the function body that travels in the file) and ``plain_time``: what an
exporter writes for the same, TopK twice, GatherND, ScatterND, or ReduceMean, AveragePool and Softplus. ScatterTokens is
measured with a base that something else still reads (``kept``) and with one that dies there (``dies``), less the time
of what makes it. ``attention_ratio`` is the time of attention over K selected tokens, or of K queries over the keys of
all T, in plain operators (MatMul, Softmax), over that of all T; beside it stands the ratio of their operations.

Times are those that the process spends on the CPU, on one thread: other work on the machine leaves them alone.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
from onnx import TensorProto, helper

import depthwire
from benchmarks._report import common_arguments, report
from depthwire.export.ops._token_body import budget_body, steps, top_k_body
from depthwire.export.ops.move_tokens import gather_body, scatter_body
from depthwire.export.ops.surprise_score import surprise_body
from depthwire.runtime.native import OPS_ENTRY, instruction_set, ops_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

_NODES = 8
_ATTENTIONS = 4
_WIDTH = 576
_WINDOW = 100
_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


@dataclass(frozen=True)
class Figure:
    """One operator at one size, and the same in plain operators, as ONNX text over its inputs' names."""

    name: str
    op_type: str
    feeds: dict[str, NDArray[Any]]
    outputs: tuple[str, ...]
    body: str
    plain: str | None
    attributes: dict[str, int] = field(default_factory=dict)
    owned: bool = False


def figures(tokens: int, slots: int) -> list[Figure]:
    """Return every operator at B = 1."""
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((1, tokens, _WIDTH)).astype(np.float32)
    rows = generator.standard_normal((1, slots, _WIDTH)).astype(np.float32)
    index = np.sort(generator.permutation(tokens)[:slots])[None]
    select: dict[str, NDArray[Any]] = {
        "score": generator.standard_normal((1, tokens)).astype(np.float32),
        "valid": np.ones((1, tokens), np.bool_),
        "slots": np.arange(slots),
    }
    budget: dict[str, NDArray[Any]] = {
        "score": select["score"],
        "valid": select["valid"],
        "threshold": np.float32(-0.3).reshape(1),
        "budget": np.array([1, 2, 1]),
        "state": np.zeros((1, 2), np.int64),
        "slots": select["slots"],
    }
    moved: dict[str, NDArray[Any]] = {
        "base": hidden,
        "index": index,
        "taken": np.ones((1, slots), np.bool_),
        "rows": rows,
    }
    surprise: dict[str, NDArray[Any]] = {
        "delta": hidden,
        "prior": hidden * np.float32(0.5),
        "criteria": np.array([0.0247, 1.1, 0.554, 0.437], np.float32),
        "valid": select["valid"],
    }
    level = steps(tokens)
    column = "axis = Constant<value_ints = [-1]>() column = Unsqueeze(index, axis)"
    scatter = f"{column} zero = Sub(column, column) place = Concat<axis = -1>(zero, column) "
    scatter += "out = ScatterND(base, place, rows)"
    selects, budgets = ("index", "taken"), ("index", "taken", "state_out")
    body = scatter_body(opset=23, widen=False)
    return [
        Figure(
            "SelectTokens",
            f"SelectTokens_{level}",
            select,
            selects,
            top_k_body(level, opset=23),
            f"k = Constant<value_ints = [{slots}]>() best, places = TopK(score, k) "
            "index, order = TopK<largest = 0>(places, k) taken = GatherElements<axis = 1>(valid, index)",
            {"window": 0},
        ),
        Figure(
            "SelectTokensBudget", f"SelectTokensBudget_{level}", budget, budgets, budget_body(level, opset=23), None
        ),
        Figure(
            "GatherTokens",
            "GatherTokens",
            {"x": hidden, "index": index},
            ("out",),
            gather_body(opset=23),
            f"{column} out = GatherND<batch_dims = 1>(x, column)",
        ),
        Figure("ScatterTokens, base kept", "ScatterTokens", moved, ("out",), body, scatter),
        Figure("ScatterTokens, base dies", "ScatterTokens", moved, ("out",), body, scatter, owned=True),
        Figure(
            "SurpriseScore",
            "SurpriseScore",
            surprise,
            ("rank",),
            surprise_body(opset=23),
            "last = Constant<value_ints = [-1]>() pads = Constant<value_ints = [0, 0, 99, 0, 0, 0]>() "
            "offset, m, ce, cu = Split<axis = 0, num_outputs = 4>(criteria) "
            "square = Mul(delta, delta) still = ReduceMean<keepdims = 0>(square, last) "
            "miss = Sub(delta, prior) miss2 = Mul(miss, miss) change = ReduceMean<keepdims = 0>(miss2, last) "
            "one = Constant<value_ints = [1]>() deep = Unsqueeze(still, one) "
            'long = Pad<mode = "edge">(deep, pads) mean3 = AveragePool<kernel_shape = [100]>(long) '
            "mean = Squeeze(mean3, one) surplus = Sub(change, offset) ec = Sub(still, surplus) usual = Mul(m, mean) "
            "uc = Sub(still, usual) a = Mul(ce, ec) b = Mul(cu, uc) sa = Softplus(a) sb = Softplus(b) "
            "rank = Add(sa, sb)",
            {"window": _WINDOW},
        ),
    ]


def model_of(figure: Figure, form: str) -> onnx.ModelProto:
    """Return eight nodes; ``form`` is kernel, body, plain, or base (what makes a base that dies, alone)."""
    functions = [onnx.parser.parse_function(figure.body)] if form == "body" else []
    if form == "plain":
        signature = f"({', '.join(figure.feeds)}) => ({', '.join(figure.outputs)})"
        head = f'<domain: "depthwire", opset_import: ["" : 23]> {figure.op_type} <window>{signature}'
        functions = [onnx.parser.parse_function(f"{head} {{ {figure.plain} }}")]
    first, *shared = figure.feeds
    kinds = {name: (_TYPES[str(array.dtype)], array.shape) for name, array in figure.feeds.items()}
    inputs = [helper.make_tensor_value_info(name, *kinds[name]) for name in shared]
    nodes, outputs = [], []
    for number in range(_NODES):
        # Nodes over the same tensors would be found equal and run once.
        own = f"{first}_{number}"
        inputs.append(helper.make_tensor_value_info(own, *kinds[first]))
        if figure.owned:
            nodes.append(helper.make_node("Neg", [own], [f"made_{number}"]))
            own = f"made_{number}"
        made = [f"{name}_{number}" for name in figure.outputs]
        if form != "base":
            nodes.append(helper.make_node(figure.op_type, [own, *shared], made, domain="depthwire"))
            attributes = figure.attributes.items()
            nodes[-1].attribute.extend(helper.make_attribute(name, value) for name, value in attributes)
            own = made[0]
        # An output of the graph keeps memory of its own; what is measured is a value inside one.
        nodes.append(helper.make_node("Size", [own], [f"size_{number}"]))
        outputs.append(helper.make_tensor_value_info(f"size_{number}", TensorProto.INT64, []))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("depthwire", 1)]
    graph = helper.make_graph(nodes, "routing", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def attention_of(queries: int, keys: int) -> onnx.ModelProto:
    """Return four attentions of nine heads, 64 wide, with a mask that is added."""
    head, inputs, lines = 64, [], []
    for number in range(_ATTENTIONS):
        inputs.append(helper.make_tensor_value_info(f"q{number}", TensorProto.FLOAT, [1, 9, queries, head]))
        lines += [
            helper.make_node("MatMul", [f"q{number}", "k"], [f"scores{number}"]),
            helper.make_node("Mul", [f"scores{number}", "scale"], [f"scaled{number}"]),
            helper.make_node("Add", [f"scaled{number}", "mask"], [f"masked{number}"]),
            helper.make_node("Softmax", [f"masked{number}"], [f"shares{number}"], axis=-1),
            helper.make_node("MatMul", [f"shares{number}", "v"], [f"out{number}"]),
        ]
    shared = {"k": [1, 9, head, keys], "v": [1, 9, keys, head], "mask": [queries, keys]}
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shared.items()]
    outputs = [helper.make_tensor_value_info(f"out{n}", TensorProto.FLOAT, None) for n in range(_ATTENTIONS)]
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [head**-0.5])
    graph = helper.make_graph(lines, "attention", inputs, outputs, [scale])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def attention_feeds(queries: int, keys: int) -> dict[str, NDArray[Any]]:
    """Return the inputs of ``attention_of``; query j is token j * keys / queries and sees what is not behind it."""
    generator = np.random.default_rng(0)
    shapes = {"k": (1, 9, 64, keys), "v": (1, 9, keys, 64)} | dict.fromkeys(
        (f"q{n}" for n in range(_ATTENTIONS)), (1, 9, queries, 64)
    )
    feeds: dict[str, NDArray[Any]] = {
        name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    seen = np.arange(keys)[None] <= (np.arange(queries) * keys // queries)[:, None]
    feeds["mask"] = np.where(seen, 0, -1e30).astype(np.float32)
    return feeds


def call_of(model: onnx.ModelProto, feeds: dict[str, NDArray[Any]], *, kernels: bool = False) -> Callable[[], object]:
    """Open a model on one thread; return what runs it, inputs and outputs bound so that nothing is copied."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if kernels:
        options.add_session_config_entry(OPS_ENTRY, ops_entry(node.op_type for node in model.graph.node))
        options.register_custom_ops_library(depthwire.custom_ops_library())
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for item in session.get_inputs():
        value = feeds.get(item.name, feeds[next(iter(feeds))])  # one of the eight first inputs
        binding.bind_ortvalue_input(item.name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    for item in session.get_outputs():
        binding.bind_output(item.name)
    return partial(session.run_with_iobinding, binding)


def medians(calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Make every call once a round; return the median CPU seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(runs + 2):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if number >= 2:  # the first two rounds warm up
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def report_operators(tokens: int, runs: int) -> None:
    """Print the figures of every operator."""
    for figure in figures(tokens, tokens // 2):
        forms = ["kernel", "body", *(["plain"] if figure.plain else []), *(["base"] if figure.owned else [])]
        calls = {form: call_of(model_of(figure, form), figure.feeds, kernels=form == "kernel") for form in forms}
        seconds = medians(calls, runs)
        for form in (form for form in forms if form != "base"):
            own = seconds[form] - seconds.get("base", 0.0)
            how = f"{figure.name}, T {tokens}, K {tokens // 2}, d {_WIDTH}, fp32, 1 thread"
            what = f"{how}, {instruction_set()}" if form == "kernel" else how
            report(f"{form}_time", own / _NODES * 1e6, "us", what, runs)


def report_attention(tokens: int, runs: int) -> None:
    """Print the ratios of attention."""
    sizes = [(tokens, tokens)]
    sizes += [(tokens // part, keys) for part in (2, 4, 8) for keys in (tokens // part, tokens)]
    calls = {f"{q}x{k}": call_of(attention_of(q, k), attention_feeds(q, k)) for q, k in sizes}
    seconds = medians(calls, runs)
    for queries, keys in sizes[1:]:
        ratio = seconds[f"{queries}x{keys}"] / seconds[f"{tokens}x{tokens}"]
        operations = queries * keys / tokens**2
        what = f"{queries} queries, {keys} keys against {tokens}, 9 heads of 64; operations {operations:.4f}"
        report("attention_ratio", ratio, "ratio", what, runs)


def main() -> None:
    runs = common_arguments(__doc__, runs=50).parse_args().runs
    for tokens in (512, 2048):
        report_operators(tokens, runs)
        report_attention(tokens, runs if tokens < 1024 else max(3, runs // 5))


if __name__ == "__main__":
    main()
