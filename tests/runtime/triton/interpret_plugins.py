"""Runs plugins' kernels through their launch parameters in Triton's interpreter; one JSON object a launch.

A process of its own, because triton decides at import whether kernels are compiled or interpreted::

    TRITON_INTERPRET=1 python -m tests.runtime.triton.interpret_plugins table
    TRITON_INTERPRET=1 python -m tests.runtime.triton.interpret_plugins model.onnx plugins goldens.safetensors

``table`` takes the shared case tables. With a model, the folder of its plugins and its goldens (an artefact's file or a
bundle's folder ``goldens/model``), the graph is evaluated on the goldens' inputs with a launch in place of every custom
operator, for the model's own shapes; ``every=N`` launches every N-th node of a name only. The last lines compare the
outputs of the graph with the goldens.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

from depthwire import ops
from depthwire.runtime.tolerances import tolerance
from depthwire.runtime.triton.plugin_operators import (
    Operator,
    depth_operator,
    operator_of,
    plugin_operators,
    variants_of,
)
from depthwire.runtime.triton.spec import KernelSpec
from tests import routing_cases as cases
from tests.attn_res_cases import CASES, TWO_PHASE_CASES, Case, allowed, operands, two_phase_operands
from tests.runtime.triton.interpret import difference, dtype, judge, read_inputs, read_spec, write
from tests.runtime.triton.interpret_routing import MOVE, SURPRISE, RoutingMachine, same
from tests.runtime.triton.plugin_launcher import launch_of, read_index, run
from tests.runtime.triton.plugin_models import ELEMENTS, node

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

READS = [case for case in CASES if case.rows * case.sources * case.width <= 30_000][::3]
TWO_PHASES = [group for group in TWO_PHASE_CASES if group.queries * group.bank * group.width <= 30_000][::3]
SELECT = [*cases.SELECT_CASES[:108:9], *cases.SELECT_CASES[135::2]]
WINDOWS = [case for case in cases.WINDOW_CASES[::4] if case.tokens // case.window < 8]


def index_of(operator: Operator) -> dict[str, Any]:
    """Return an index of one operator, as ``write_plugins`` writes it but for the compiled code."""
    from depthwire.runtime.triton.plugin import operator_json

    spec = operator.spec
    kernel = {
        "parameters": list(operator.parameters),
        "threads": 32 * spec.launch.warps,
        "spec": {"class": type(spec).__name__, **dataclasses.asdict(spec)},
    }
    return {"operators": {operator.op_type: operator_json([[operator]])}, "kernels": {spec.key: kernel}}


def launched(operator: Operator, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run an operator on its inputs."""
    shapes = [tuple(tensor.shape) for tensor in inputs]
    return run(launch_of(index_of(operator), operator.op_type, 0, shapes), inputs)


def routed(op_type: str, inputs: Sequence[Tensor], **attributes: Any) -> tuple[Tensor, ...]:
    """Run a routing operator on its inputs, through a node of an ONNX file."""
    names = [f"i{place}" for place in range(len(inputs))]
    elements = {torch.bool: 9, torch.int64: 7, torch.float64: 11}
    elements |= {getattr(torch, name): int(element) for name, element in ELEMENTS.items()}
    types = {name: (elements[each.dtype], tuple(each.shape)) for name, each in zip(names, inputs, strict=True)}
    return launched(operator_of(node(op_type, " ".join(names), "o0 o1 o2", **attributes), types), inputs)


def reads() -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads of every form, and both phases."""
    for case in READS:
        tensors = operands(case)
        for spec in read_spec(case).alternatives:
            name = str(case) if spec.warp_factor == 1 else f"{case} in {spec.launch.warps} warps"
            yield name, judge(case, tensors, launched(depth_operator(spec), read_inputs(case, tensors)))
    for group in TWO_PHASES:
        queries, tensors = two_phase_operands(group)
        attributes: dict[str, Any] = {"eps": group.eps, "scale": group.scale}
        attributes["queries"] = group.queries
        whole = KernelSpec(f"AttnResInter_{group.bank}", group.width, dtype(group.dtype), **attributes)
        for first in whole.alternatives[::-1]:
            out, lse = launched(depth_operator(first), [queries, *tensors.sources[: group.bank]])
            exact = exact_outputs(depth_operator(first), [queries, *tensors.sources[: group.bank]], {})
            name = f"{group} in {first.launch.warps} warps"
            yield f"inter {name}", judged(depth_operator(first), [out, lse], exact)
        del attributes["queries"]
        attributes |= {"norm_eps": group.eps, "index": group.index}
        second = KernelSpec(group.op_type, group.width, dtype(group.dtype), **attributes)
        gain, delta = [tensors.norm_weight] * group.norm, [tensors.delta] * group.add
        inputs = [tensors.query, *gain, out, lse, *tensors.sources[group.bank :], *delta]
        yield f"two {group}", judge(group.reads(), tensors, launched(depth_operator(second), inputs))


def routing() -> Iterator[tuple[str, dict[str, Any]]]:
    """Selection, moves and the surprise."""
    for case in (*SELECT, *WINDOWS):
        given = cases.select_operands(case)
        slots, levels = torch.arange(case.slots), max(1, (case.tokens - 1).bit_length())
        found = routed(f"SelectTokens_{levels}", [given.score, given.valid, slots], window=case.window)
        yield f"select {case}", same(found, cases.expected_top_k(given.score, given.valid, case.slots, case.window))
    for place, case in enumerate([*SELECT, *cases.BUDGET_CASES[-20:]]):
        given = cases.select_operands(case)
        slots, levels = torch.arange(case.slots), max(1, (case.tokens - 1).bit_length())
        inputs = [given.score, given.valid, given.threshold.float(), given.budget, given.state, slots]
        yield f"budget {place}", same(routed(f"SelectTokensBudget_{levels}", inputs), cases.expected_budget(given))
    for move in MOVE:
        if move.dtype == torch.float64:
            continue
        moved = cases.move_operands(move)
        gathered, scattered = cases.expected_moves(moved)
        index, taken = moved.index.contiguous(), moved.taken.contiguous()
        yield f"gather {move}", same(routed("GatherTokens", [moved.base, index]), (gathered,))
        yield f"scatter {move}", same(routed("ScatterTokens", [moved.base, index, taken, moved.rows]), (scattered,))
    for place, surprise in enumerate(SURPRISE):
        drawn = cases.surprise_operands(surprise)
        exact = cases.expected_surprise(surprise, drawn)
        # As for the other bodies: sums of d fp32 products, of which the rank is a smooth function.
        budget = 4 * surprise.width**0.5 * 2.0**-24 * float(exact.max())
        inputs = [drawn.delta, drawn.prior, drawn.criteria, drawn.valid]
        for name, window in (("surprise", surprise.window), ("wrong window", surprise.window + 1)):
            if name == "surprise" or surprise.tokens > surprise.window:
                (rank,) = routed("SurpriseScore", inputs, window=window)
                yield f"{name} {place}", {"error": difference(rank, exact), "allowed": budget}


def exact_outputs(operator: Operator, inputs: Sequence[Tensor], attributes: dict[str, Any]) -> list[Tensor]:
    """Return what an operator computes, in fp64 but for sums, which it rounds to its dtype, and for what is exact."""
    spec, named = operator.spec, dict(zip(operator.inputs, inputs, strict=True))
    if not isinstance(spec, KernelSpec):
        stem = operator.op_type.partition("_")[0]
        if stem == "SelectTokens":
            return list(ops.select_tokens(*inputs, attributes.get("window", 0)))
        if stem == "SelectTokensBudget":
            return list(ops.select_tokens_budget(*inputs))
        if stem == "SurpriseScore":
            wide = [tensor.double() for tensor in inputs[:3]]
            return [ops.surprise_score(*wide, inputs[3], attributes.get("window", 100))]
        return [ops.gather_tokens(*inputs) if stem == "GatherTokens" else ops.scatter_tokens(*inputs)]
    sources = [tensor for name, tensor in named.items() if name.startswith("source_")]
    total = [sources[-1] + named["delta"]] if spec.add else []
    wide = [tensor.double() for tensor in [*sources[: len(sources) - len(total)], *total]]
    if spec.kind == "inter":
        return list(ops.attn_res_inter(named["queries"].double(), wide, spec.eps, spec.scale))
    query = named["query"].double()
    if spec.kind == "merge":
        inter = [named["inter_out"].double(), named["inter_lse"].double()]
        read = ops.attn_res_merge(query, *inter, wide, spec.index, spec.eps, spec.scale, spec.last_bias)
    else:
        read = ops.attn_res_read(query, wide, spec.eps, spec.scale, spec.unit, spec.last_bias)
    if spec.norm:
        root = torch.rsqrt(read.square().mean(-1, keepdim=True) + spec.norm_eps)
        read = read * root * named["norm_weight"].double()
    return [read, *total]


def judged(operator: Operator, found: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, Any]:
    """Compare the outputs of a node: the largest error, and what a sound kernel may have."""
    spec = operator.spec
    if not isinstance(spec, KernelSpec):
        if spec.kind != "surprise":
            return same(tuple(found), tuple(exact))
        budget = 4 * spec.width**0.5 * 2.0**-24 * float(exact[0].max())
        return {"error": difference(found[0], exact[0]), "allowed": budget}
    case = Case(max(1, spec.count), spec.width, spec.dtype)
    result: dict[str, Any] = {"error": difference(found[0], exact[0]), "allowed": allowed(case, exact[0])}
    if spec.kind == "inter":
        result["lse_error"] = difference(found[1], exact[1])
        result["lse_allowed"] = max(32.0, 4 * spec.width**0.5) * 2.0**-24 * max(1.0, float(exact[1].abs().max()))
    elif spec.add:
        result["sum"] = torch.equal(found[1], exact[1])
    return result


def model_nodes(model: Path, folder: Path, goldens: Path, every: int = 1) -> Iterator[tuple[str, dict[str, Any]]]:
    """Evaluate a model's graph on its first golden window with a launch in place of every custom operator.

    Each launch is judged on its own inputs; what it computes goes on through the graph, whose outputs are compared with
    the goldens. With ``every``, the other nodes of a name are their exact results, rounded to their dtype.
    """
    import onnx
    from onnx import helper
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    index = read_index(folder)
    loaded = onnx.load(str(model))
    operators = {item.output[0]: operator for item, operator in plugin_operators(loaded)}
    variants = variants_of(list(operators.values()))
    assert index["nodes"] == len(operators)
    results: list[tuple[str, dict[str, Any]]] = []
    counts: Counter[str] = Counter()

    def computed(item: Any, arrays: Sequence[Any]) -> tuple[Any, ...]:
        operator, inputs = operators[item.output[0]], [to_torch(array) for array in arrays]
        attributes = {each.name: helper.get_attribute_value(each) for each in item.attribute}
        exact = exact_outputs(operator, inputs, attributes)
        counts[operator.op_type] += 1
        variant = [each.identity for each in variants[operator.op_type]].index(operator.identity)
        shapes = [tuple(tensor.shape) for tensor in inputs]
        launch = launch_of(index, operator.op_type, variant, shapes)
        if (counts[operator.op_type] - 1) % every:
            outputs = tuple(value.to(kind) for value, (_, kind) in zip(exact, launch.outputs, strict=True))
        else:
            # The last first: the graph goes on with what the first computes.
            tactics = index["operators"][operator.op_type]["variants"][variant]["tactics"]
            for tactic in range(len(tactics), 0, -1):
                launch = launch_of(index, operator.op_type, variant, shapes, tactic)
                outputs = run(launch, inputs)
                assert [tuple(tensor.shape) for tensor in outputs] == [tuple(tensor.shape) for tensor in exact]
                result = {"op_type": operator.op_type, "grid": launch.grid, **judged(operator, outputs, exact)}
                results.append((f"{operator.op_type} {item.output[0]} {tactic}", result))
        return tuple(to_numpy(tensor) for tensor in outputs)

    class Launched(OpRun):
        op_domain = "depthwire"

        def _run(self, *arrays: Any, **_: Any) -> tuple[Any, ...]:
            return computed(self.onnx_node, arrays)

    kinds = [type(name, (Launched,), {}) for name in sorted({each.op_type for each in operators.values()})]
    tensors = read_goldens(goldens)
    given = {item.name: to_numpy(tensors[f"input.{item.name}"]) for item in loaded.graph.input}
    found = ReferenceEvaluator(loaded, new_ops=kinds).run(None, given)
    yield from results
    for item, array in zip(loaded.graph.output, found, strict=True):
        wanted = tensors[f"output.{item.name}"]
        # Indices and bits are exact whatever the kind.
        budget = tolerance(str(wanted.dtype).removeprefix("torch."), "logits")
        allowance = budget.allowed(float(wanted.double().abs().max()))
        error = difference(to_torch(array).double(), wanted.double())
        yield f"golden {item.name}", {"error": error, "allowed": allowance}


def read_goldens(path: Path) -> dict[str, Tensor]:
    """Return the first window of an artefact's goldens, a file, or of a bundle's, a folder of arrays."""
    if path.is_dir():
        return {each.stem: to_torch(np.load(each)[0]) for each in sorted(path.glob("*.npy"))}
    from safetensors.torch import load_file

    return {name: tensor[0] for name, tensor in load_file(str(path)).items()}


def to_torch(array: Any) -> Tensor:
    """Return an array as a tensor of its own, bf16 too."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C"))


def to_numpy(tensor: Tensor) -> Any:
    """Return a tensor as an array, bf16 too."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def main() -> None:
    """Run everything."""
    torch.set_num_threads(1)
    RoutingMachine()
    if sys.argv[1] == "table":
        results = [reads(), routing()]
    else:
        model, folder, goldens, *rest = sys.argv[1:]
        every = int(rest[0].removeprefix("every=")) if rest else 1
        results = [model_nodes(Path(model), Path(folder), Path(goldens), every)]
    for part in results:
        for name, result in part:
            write(name, result)


if __name__ == "__main__":
    main()
