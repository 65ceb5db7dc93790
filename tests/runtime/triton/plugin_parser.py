"""Parses ONNX files with TensorRT-RTX's parser, with a creator of plugins for one operator; one JSON object a file.

The parser is of TensorRT's family, and asks for plugins as TensorRT's does; the process is one of its own because
TensorRT-RTX ends it if it gets one. So the creator notes what it is asked for, and creates nothing::

    python -m tests.runtime.triton.plugin_parser OPERATOR FILE...
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tensorrt_rtx as trt


class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
    """A creator of a plugin with the one field that ours have."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.plugin_namespace, self.plugin_version = name, "depthwire", "1"
        field = trt.PluginField("variant", np.array([], np.int32), trt.PluginFieldType.INT32)
        self.field_names = trt.PluginFieldCollection([field])
        self.asked: list[Any] = []

    def create_plugin(self, name: str, fields: Any, phase: Any) -> None:
        """Note a node and its fields."""
        found = {field.name: [str(field.data.dtype), field.data.tolist()] for field in fields}
        self.asked.append([name, found, phase.name])


def main() -> None:
    """Parse the files, one after the other."""
    creator = Creator(sys.argv[1])
    trt.get_plugin_registry().register_creator(creator, "depthwire")
    logger = trt.Logger(trt.Logger.ERROR)
    for path in sys.argv[2:]:
        creator.asked = []
        network = trt.Builder(logger).create_network(0)
        parser = trt.OnnxParser(network, logger)
        parsed = parser.parse_from_file(path)
        sys.stdout.write(json.dumps({"parsed": parsed, "asked": creator.asked, "layers": network.num_layers}) + "\n")


if __name__ == "__main__":
    main()
