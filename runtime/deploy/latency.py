"""Latency of an engine, by a protocol that states everything it depends on.

Each variant is warmed up, then run ``runs`` times, one run after the other has ended. A run is timed twice: on the GPU
by a pair of CUDA events around it, and on the host from before its first call to after its synchronisation. Variants
are all four of: as a CUDA graph or not; with the transfers of inputs and outputs (pinned host memory) or without.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthwire.runtime.deploy.cuda import CAPTURE_THREAD_LOCAL, CudaError, Driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class _Buffer:
    """An input or output in device memory, and its twin in pinned host memory; sizes in bytes."""

    name: str
    device: int
    host: int
    bytes: int
    is_input: bool


def measure(trt: Any, engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Measure every variant.

    Args:
        trt: The runtime's module.
        engine: A deserialised engine.
        request: ``goldens`` (folder; window 0 is the input), ``inputs`` (names), and the fields of
            ``manifest.LatencyProtocol``.

    Returns:
        ``variants``, each with its statistics in milliseconds, or the reason why it could not be measured.
    """
    driver = Driver()
    driver.use_primary_context()
    variants = []
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(driver.stream())
        context = engine.create_execution_context()
        buffers = _allocate(driver, stack, trt, context, request)
        free = driver.free_bytes()
        for graph in (False, True):
            for transfers in (False, True):
                variant: dict[str, Any] = {"cuda_graph": graph, "transfers": transfers}
                enqueue = _enqueue(driver, context, stream, buffers, transfers=transfers)
                try:
                    with _launcher(driver, stream, enqueue, graph=graph) as launch:
                        variant |= _time(driver, stream, launch, request)
                except CudaError as error:
                    variant["not_measured"] = str(error)
                variants.append(variant)
    return {"variants": variants, "gpu_free_bytes": free}


def _allocate(
    driver: Driver, stack: contextlib.ExitStack, trt: Any, context: Any, request: dict[str, Any]
) -> list[_Buffer]:
    import ctypes

    import numpy as np

    engine, buffers = context.engine, []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        array = None
        if is_input:
            stored = np.load(Path(request["goldens"]) / f"input.{name}.npy", mmap_mode="r")
            array = np.ascontiguousarray(stored[0])
            context.set_input_shape(name, array.shape)
            size = array.nbytes
        else:
            size = math.prod(context.get_tensor_shape(name)) * engine.get_tensor_dtype(name).itemsize
        device = stack.enter_context(driver.device_memory(size))
        host = stack.enter_context(driver.pinned_memory(size))
        if array is not None:
            ctypes.memmove(host, array.ctypes.data, size)
        context.set_tensor_address(name, device)
        buffers.append(_Buffer(name, device, host, size, is_input))
    return buffers


def _enqueue(
    driver: Driver, context: Any, stream: int, buffers: Sequence[_Buffer], *, transfers: bool
) -> Callable[[], None]:
    def enqueue() -> None:
        if transfers:
            for buffer in buffers:
                if buffer.is_input:
                    driver.call("cuMemcpyHtoDAsync_v2", buffer.device, buffer.host, buffer.bytes, stream)
        if not context.execute_async_v3(stream):
            raise CudaError("the engine could not be enqueued")
        if transfers:
            for buffer in buffers:
                if not buffer.is_input:
                    driver.call("cuMemcpyDtoHAsync_v2", buffer.host, buffer.device, buffer.bytes, stream)

    # Inputs must lie on the device for the variants without transfers, too.
    for buffer in buffers:
        if buffer.is_input:
            driver.call("cuMemcpyHtoDAsync_v2", buffer.device, buffer.host, buffer.bytes, stream)
    return enqueue


@contextlib.contextmanager
def _launcher(driver: Driver, stream: int, enqueue: Callable[[], None], *, graph: bool) -> Iterator[Callable[[], None]]:
    """Give a function that starts one run: the calls themselves, or a CUDA graph recorded from them."""
    from ctypes import byref, c_void_p

    if not graph:
        yield enqueue
        return
    # The first run allocates and compiles, which cannot be recorded.
    enqueue()
    driver.call("cuStreamSynchronize", stream)
    recorded, executable = c_void_p(), c_void_p()
    driver.call("cuStreamBeginCapture_v2", stream, CAPTURE_THREAD_LOCAL)
    try:
        enqueue()
    finally:
        driver.call("cuStreamEndCapture", stream, byref(recorded))
    try:
        driver.call("cuGraphInstantiateWithFlags", byref(executable), recorded, 0)
        try:
            yield lambda: driver.call("cuGraphLaunch", executable, stream)
        finally:
            driver.call("cuGraphExecDestroy", executable)
    finally:
        driver.call("cuGraphDestroy", recorded)


def _time(driver: Driver, stream: int, launch: Callable[[], None], request: dict[str, Any]) -> dict[str, Any]:
    began, warmup = time.perf_counter(), 0
    while warmup < request["warmup_runs"] or time.perf_counter() - began < request["warmup_seconds"]:
        launch()
        driver.call("cuStreamSynchronize", stream)
        warmup += 1
    gpu, host = [], []
    with driver.events() as (first, last):
        for _ in range(request["runs"]):
            start = time.perf_counter()
            driver.call("cuEventRecord", first, stream)
            launch()
            driver.call("cuEventRecord", last, stream)
            driver.call("cuStreamSynchronize", stream)
            host.append((time.perf_counter() - start) * 1e3)
            gpu.append(driver.milliseconds(first, last))
    return {"warmup_runs": warmup, "gpu_ms": summary(gpu), "host_ms": summary(host)}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return count, mean, standard deviation, least, greatest, and percentiles (nearest rank) of some times."""
    ordered = sorted(values)
    count = len(ordered)
    mean = math.fsum(ordered) / count
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / count)
    ranks = {f"p{share}": ordered[math.ceil(share / 100 * count) - 1] for share in _PERCENTILES}
    return {"count": count, "mean": mean, "std": spread, "min": ordered[0], "max": ordered[-1], **ranks}
