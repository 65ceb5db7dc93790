"""Ways to make a .pt2 file run code; each makes a directory at the marker's path."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.export.pt2_files import CONSTANTS, MODEL, SAMPLES, WEIGHTS, Members, edit


class Payload:
    """Unpickling this makes a directory at the marker's path."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (self.marker,)


def torch_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def source_code(marker: Path) -> str:
    return f"__import__('os').mkdir('{marker}')"


Craft = Callable[[Members, Path], Members]


def pickled_sample_inputs(members: Members, marker: Path) -> Members:
    return {**members, SAMPLES: torch_pickle((((Payload(marker)),), {}))}


def pickled_weight(members: Members, marker: Path) -> Members:
    def change(document: Any) -> None:
        document["config"]["first.bias"] |= {"use_pickle": True, "path_name": "weight_9"}

    return {**edit(members, WEIGHTS, change), "data/weights/weight_9": torch_pickle(Payload(marker))}


def pickled_constant(members: Members, marker: Path) -> Members:
    def change(document: Any) -> None:
        document["config"]["offset"] |= {"use_pickle": True, "path_name": "tensor_9"}

    return {**edit(members, CONSTANTS, change), "data/constants/tensor_9": torch_pickle(Payload(marker))}


def opaque_object(members: Members, marker: Path) -> Members:
    def change(document: Any) -> None:
        document["config"]["thing"] = {
            "path_name": "opaque_obj_0",
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }

    return {**edit(members, CONSTANTS, change), "data/constants/opaque_obj_0": pickle.dumps(Payload(marker))}


def custom_object(members: Members, marker: Path) -> Members:
    def change(document: Any) -> None:
        document["config"]["thing"] = {
            "path_name": "custom_obj_0",
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }

    return {**edit(members, CONSTANTS, change), "data/constants/custom_obj_0": torch_pickle(Payload(marker))}


def legacy_weights(members: Members, marker: Path) -> Members:
    return {**members, "data/weights/model.pt": torch_pickle({"first.weight": Payload(marker)})}


def legacy_constants(members: Members, marker: Path) -> Members:
    return {**members, "data/constants/model.pt": torch_pickle({"offset": Payload(marker)})}


def symbolic_size(members: Members, marker: Path) -> Members:
    def change(document: Any) -> None:
        values = document["graph_module"]["graph"]["tensor_values"]
        values["x"]["sizes"][0] = {"as_expr": {"expr_str": source_code(marker), "hint": None}}

    return edit(members, MODEL, change)


def _everywhere(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {_everywhere(key, old, new): _everywhere(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_everywhere(item, old, new) for item in value]
    return new if value == old else value


def value_name(members: Members, marker: Path) -> Members:
    """A name of a value stands in generated source, where only torch's own clean-up keeps it harmless."""
    document = json.loads(members[MODEL])
    name = f"globals()[{source_code(marker)}]"
    return {**members, MODEL: json.dumps(_everywhere(document, "relu", name)).encode()}


def argument_names(members: Members, marker: Path) -> Members:
    def change(document: Any) -> None:
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        signature["forward_arg_names"] = [f"x={source_code(marker)}"]

    return edit(members, MODEL, change)


def guards(members: Members, marker: Path) -> Members:
    def change(document: Any) -> None:
        document["guards_code"] = [f"{source_code(marker)} is None"]

    return edit(members, MODEL, change)


def any_attribute_as_operator(members: Members, marker: Path) -> Members:
    def change(document: Any) -> None:
        node = next(node for node in document["graph_module"]["graph"]["nodes"] if node["name"] == "relu")
        node["target"] = "torch.os.mkdir"
        node["inputs"] = [{"name": "", "arg": {"as_string": str(marker)}, "kind": 1}]

    return edit(members, MODEL, change)


def file_operator(members: Members, marker: Path) -> Members:
    def change(document: Any) -> None:
        node = next(node for node in document["graph_module"]["graph"]["nodes"] if node["name"] == "relu")
        node["target"] = "torch.ops.aten.from_file.default"
        arguments: list[tuple[str, dict[str, Any]]] = [
            ("filename", {"as_string": str(marker)}),
            ("shared", {"as_bool": True}),
            ("size", {"as_int": 24}),
        ]
        node["inputs"] = [{"name": name, "arg": value, "kind": 1} for name, value in arguments]

    return edit(members, MODEL, change)


def torchscript_operator(members: Members, marker: Path) -> Members:
    def change(document: Any) -> None:
        node = next(node for node in document["graph_module"]["graph"]["nodes"] if node["name"] == "relu")
        node["target"] = "torch.ops.aten.save.default"
        node["inputs"] = [node["inputs"][0], {"name": "filename", "arg": {"as_string": str(marker)}, "kind": 1}]

    return edit(members, MODEL, change)


def weight_name(members: Members, marker: Path) -> Members:
    code = f"exec(bytes({list(source_code(marker).encode())}))"
    name = f'first.x", {code})#'
    edited = dict(members)
    for member in (MODEL, WEIGHTS):
        edited[member] = json.dumps(_everywhere(json.loads(members[member]), "first.bias", name)).encode()
    return edited


def imported_enumeration(members: Members, marker: Path) -> Members:
    """A tree spec's context imports the module it names; ours lies in the working directory."""
    Path("wicked_module.py").write_text(f"{source_code(marker)}\n", encoding="utf-8")
    context = json.dumps([{"__enum__": True, "fqn": "wicked_module:Thing", "name": "a"}, "pooled"])

    def change(document: Any) -> None:
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        version, tree = json.loads(signature["out_spec"])
        tree["context"] = context
        signature["out_spec"] = json.dumps([version, tree])

    return edit(members, MODEL, change)


def imported_factory(members: Members, marker: Path) -> Members:
    Path("wicked_module.py").write_text(f"{source_code(marker)}\n", encoding="utf-8")

    def change(document: Any) -> None:
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        version, tree = json.loads(signature["out_spec"])
        tree["type"] = "collections.defaultdict"
        tree["context"] = {
            "default_factory_module": "wicked_module",
            "default_factory_name": "Thing",
            "dict_context": ["hidden", "pooled"],
        }
        signature["out_spec"] = json.dumps([version, tree])

    return edit(members, MODEL, change)


def older_format(members: Members, marker: Path) -> Members:
    del members
    return {
        "../version": b"8.20",
        "../serialized_exported_program.json": b"{}",
        "../serialized_state_dict.pt": torch_pickle(Payload(marker)),
        "../serialized_constants.pt": torch_pickle({}),
        "../serialized_example_inputs.pt": torch_pickle(((), {})),
    }


RUNS_WHEN_LOADED: list[Craft] = [
    pickled_sample_inputs,
    pickled_weight,
    pickled_constant,
    opaque_object,
    legacy_weights,
    legacy_constants,
    symbolic_size,
    imported_enumeration,
    imported_factory,
]
RUNS_WHEN_USED: list[Craft] = [
    guards,
    file_operator,
    weight_name,
]
MIGHT_RUN: list[Craft] = [value_name, argument_names, any_attribute_as_operator, custom_object, torchscript_operator]
