"""Run models that lie in a folder, with the library that is named: what test_sanitizers.py starts under a sanitizer.

Imports neither torch nor Depthwire, whose libraries the sanitizer would have to follow too.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(library: str, folder: Path) -> None:
    # Fails unless the sanitizer's runtime came first, that is, unless it watches this process.
    ctypes.CDLL(None).__asan_init  # noqa: B018
    for model in sorted(folder.glob("*.onnx")):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 2
        names = model.with_suffix(".ops").read_text(encoding="utf-8")
        options.add_session_config_entry("depthwire.ops", names)
        options.register_custom_ops_library(library)
        failure = model.with_suffix(".error")
        try:
            session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
            with np.load(model.with_suffix(".npz")) as feeds:
                found = session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})
        except Exception as error:  # noqa: BLE001 - a refusal is a result here
            failure.write_text(str(error), encoding="utf-8")
            continue
        np.savez(model.with_suffix(".out.npz"), *found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
