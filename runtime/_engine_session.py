"""A TensorRT-RTX engine in a GPU's memory: kernels compiled once and kept, weights put back, inputs and outputs copied.

Written against the bindings of TensorRT-RTX 1.7.1 and not run: that takes a GPU. A test holds every name that is used
here against the installed bindings.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from depthwire.errors import BuildError, UsageError
from depthwire.runtime._route_network import network_model
from depthwire.runtime._turing import TURING
from depthwire.runtime.deploy.cuda import CudaError, Driver
from depthwire.runtime.engine import require_valid

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray
    from typing_extensions import Self

    from depthwire.artifact import Artifact, EngineInfo

CacheState = Literal["none", "absent", "loaded", "rejected"]
_PROFILE = 0


@dataclass
class EngineSession:
    """A loaded engine; ``engine.load_engine`` makes it.

    Attributes:
        trt: The module ``tensorrt_rtx``.
        driver: The GPU's driver.
        runtime: What the engine was loaded by, which has to outlive it.
        engine: The engine; ``None`` once closed.
        context: Its execution context, compiled for the GPU; ``None`` once closed.
        kept: What was compiled; ``None`` without a cache file.
        cache: Where that is kept.
        cache_state: ``none`` without a cache file, ``absent`` where it did not exist yet, ``loaded``, or ``rejected``
            where it belongs to another GPU, driver or version.
    """

    trt: Any
    driver: Driver
    runtime: Any
    engine: Any
    context: Any
    kept: Any
    cache: Path | None
    cache_state: CacheState

    @classmethod
    def open(
        cls, trt: Any, artifact: Artifact, info: EngineInfo, *, cache: Path | None, cuda_graphs: bool
    ) -> EngineSession:
        """Deserialise the engine, put its weights back if it has none, and compile it for the GPU.

        Raises:
            BuildError: ``engine.refused``, ``engine.refit-failed``, or as ``engine.require_valid``.
        """
        path = artifact.path(info.file)
        log = _logger(trt)
        driver = Driver()
        driver.use_primary_context()  # the runtime cache is checked against the current context
        runtime = trt.Runtime(log)
        blob = path.read_bytes()
        validity, diagnostics = runtime.get_engine_validity(blob)
        require_valid(trt, path, validity, int(diagnostics), "; ".join(log.errors))
        engine = runtime.deserialize_cuda_engine(blob)
        if engine is None:
            raise _refused(path, log.errors)
        if info.stripped:
            _refit(trt, engine, log, artifact, info)
        config = engine.create_runtime_config()
        if cuda_graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        kept, state = _runtime_cache(config, cache)
        context = engine.create_execution_context(config)
        if context is None:
            raise _refused(path, log.errors)
        return cls(trt, driver, runtime, engine, context, kept, cache, state)

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Write the cache file, whole or not at all, and let go of the GPU's memory."""
        kept, cache = self.kept, self.cache
        if self.context is not None and kept is not None and cache is not None:
            temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
            try:
                cache.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(memoryview(kept.serialize()))
                temporary.replace(cache)
            finally:
                temporary.unlink(missing_ok=True)
        self.context = self.engine = self.kept = self.runtime = None

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once; see ``engine.run_engine``."""
        import numpy as np

        engine, context = self.engine, self.context
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        given = [name for name in names if engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT]
        arrays = self._checked(inputs, given)
        for name, array in arrays.items():
            context.set_input_shape(name, array.shape)
        if unknown := context.infer_shapes():
            raise _bad_input(f"shapes of {', '.join(unknown)} that follow from the inputs", "shapes that do not fit")
        results = {
            name: np.empty(tuple(context.get_tensor_shape(name)), self._dtype(name))
            for name in names
            if name not in given
        }
        try:
            with contextlib.ExitStack() as stack:
                stream = stack.enter_context(self.driver.stream())
                addresses = {}
                for name, array in {**arrays, **results}.items():
                    addresses[name] = stack.enter_context(self.driver.device_memory(array.nbytes))
                    context.set_tensor_address(name, addresses[name])
                for name, array in arrays.items():
                    self.driver.call("cuMemcpyHtoDAsync_v2", addresses[name], array.ctypes.data, array.nbytes, stream)
                if not context.execute_async_v3(stream):
                    raise _failed("execute_async_v3 returned false")
                for name, array in results.items():
                    self.driver.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, addresses[name], array.nbytes, stream)
                self.driver.call("cuStreamSynchronize", stream)
        except CudaError as error:
            raise _failed(str(error)) from error
        return results

    def _checked(self, inputs: Mapping[str, NDArray[Any]], given: list[str]) -> dict[str, NDArray[Any]]:
        """Return the inputs, contiguous, in the engine's order."""
        import numpy as np

        if set(inputs) != set(given):
            raise _bad_input(f"the inputs {', '.join(given)}", ", ".join(inputs) or "nothing")
        arrays = {}
        for name in given:
            array = np.ascontiguousarray(inputs[name])
            least, _, most = (tuple(shape) for shape in self.engine.get_tensor_profile_shape(name, _PROFILE))
            fits = len(array.shape) == len(least) and all(
                low <= size <= high for low, size, high in zip(least, array.shape, most, strict=True)
            )
            if array.dtype != self._dtype(name) or not fits:
                raise _bad_input(
                    f"{name} of {self._dtype(name)}, {list(least)} to {list(most)}",
                    f"{array.dtype} {list(array.shape)}",
                )
            arrays[name] = array
        return arrays

    def _dtype(self, name: str) -> Any:
        import ml_dtypes
        import numpy as np

        kind = self.engine.get_tensor_dtype(name).name
        return np.dtype(ml_dtypes.bfloat16 if kind == "BF16" else _NUMPY[kind])


def _runtime_cache(config: Any, cache: Path | None) -> tuple[Any, CacheState]:
    """Return what keeps the compiled kernels, filled from its file, and what became of the file."""
    if cache is None:
        return None, "none"
    kept = config.create_runtime_cache()
    state: CacheState = "absent"
    if cache.is_file():
        state = "loaded" if kept.deserialize(cache.read_bytes()) else "rejected"
    config.set_runtime_cache(kept)
    return kept, state


_NUMPY = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def _refit(trt: Any, engine: Any, log: Any, artifact: Artifact, info: EngineInfo) -> None:
    """Put the weights of the graph that the engine was built from back into it."""
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    network = network_model(
        artifact,
        route_inputs=info.route_inputs,
        all_capacities=info.all_capacities,
        max_batch=info.max_batch,
        turing=TURING in info.compute_capabilities,
    )
    with network as (model, _):
        # The weights are read from the mapped file when refit_cuda_engine runs: both while the graph lies beside it.
        done = parser.refit_from_file(str(model)) and refitter.refit_cuda_engine()
    missing = refitter.get_missing_weights()
    if not done or missing:
        raise BuildError(
            "engine.refit-failed",
            "The engine did not get its weights back",
            at=str(artifact.path(info.file)),
            want=f"the weights of {artifact.model.name}, which it was built from",
            got="; ".join([*(f"no {name}" for name in missing[:4]), *log.errors]) or "no message",
            todo="Build the engine again from this artefact.",
        )


def _logger(trt: Any) -> Any:
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in {severity.ERROR, severity.INTERNAL_ERROR}:
                self.errors.append(message)

    return Logger()


def _refused(path: Path, errors: list[str]) -> BuildError:
    return BuildError(
        "engine.refused",
        "TensorRT-RTX cannot load the engine",
        at=str(path),
        want="an engine in the GPU's memory, compiled for it",
        got="; ".join(errors) or "no message",
        todo="Free GPU memory if it ran out; else build the engine again with the installed TensorRT-RTX.",
    )


def _bad_input(want: str, got: str) -> UsageError:
    return UsageError(
        "engine.bad-input",
        "The inputs are not those of the engine",
        at="run_engine",
        want=want,
        got=got,
        todo="The manifest lists the inputs, and under the engine's profile the sizes that are open.",
    )


def _failed(got: str) -> BuildError:
    return BuildError(
        "engine.run",
        "The engine failed while it ran",
        at="run_engine",
        want="an inference with the given inputs",
        got=got,
        todo="Free GPU memory if it ran out; else report it with the engine's build.log.",
    )
