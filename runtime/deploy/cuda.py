"""The few calls of the CUDA driver that finding a GPU and timing an engine take, through ctypes.

``libcuda`` comes with every NVIDIA driver, so nothing has to be installed for it. Device memory is that of the primary
context, which TensorRT and Polygraphy use as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# Each as in cuda.h, by the name that the header's macros give it. Handles are pointers, a CUdeviceptr has 64 bits.
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, ctypes.c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}

# CUdevice_attribute, CUstream_flags and CUstreamCaptureMode of cuda.h.
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR, INTEGRATED = 75, 76, 18
NON_BLOCKING = 1
CAPTURE_THREAD_LOCAL = 1


class CudaError(RuntimeError):
    """The driver is absent, or a call of it failed."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver describes it.

    Attributes:
        name: Its name.
        capability: Compute capability, as ``SM87``.
        memory_bytes: All of its memory; the machine's on an integrated GPU.
        integrated: Whether it shares the machine's memory.
        driver: CUDA version of the driver, ``12.6``.
    """

    name: str
    capability: str
    memory_bytes: int
    integrated: bool
    driver: str

    def as_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)


class Driver:
    """The driver's library with typed functions; every call that fails raises."""

    def __init__(self) -> None:
        """Load and initialise it.

        Raises:
            CudaError: There is no driver, or no GPU that it can use.
        """
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise CudaError(f"no NVIDIA driver: {error}") from error
        for name, arguments in PROTOTYPES.items():
            try:
                function = getattr(self._library, name)
            except AttributeError as error:
                raise CudaError(f"the NVIDIA driver is too old: it has no {name}") from error
            function.argtypes, function.restype = arguments, c_int
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call one function of ``PROTOTYPES``."""
        status = getattr(self._library, name)(*arguments)
        if status:
            text = c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")

    def gpu(self) -> Gpu:
        """Return the first GPU, the one that TensorRT uses unless told otherwise."""
        count, device, version = c_int(), c_int(), c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise CudaError("the NVIDIA driver finds no GPU")
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDriverGetVersion", ctypes.byref(version))
        name, memory = ctypes.create_string_buffer(256), c_size_t()
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        major, minor, integrated = (
            self._attribute(device, which) for which in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR, INTEGRATED)
        )
        driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return Gpu(name.value.decode(), f"SM{major}{minor}", memory.value, bool(integrated), driver)

    def _attribute(self, device: c_int, which: int) -> int:
        value = c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def use_primary_context(self) -> None:
        """Make the primary context of the first GPU this thread's own."""
        device, context = c_int(), c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def free_bytes(self) -> int:
        """Return the free bytes of the GPU's memory; needs a context."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    @contextlib.contextmanager
    def device_memory(self, count: int) -> Iterator[int]:
        """Give ``count`` bytes of device memory, by address."""
        address = c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), max(count, 1))
        try:
            yield address.value
        finally:
            self.call("cuMemFree_v2", address)

    @contextlib.contextmanager
    def pinned_memory(self, count: int) -> Iterator[int]:
        """Give ``count`` bytes of host memory that the GPU can copy from and to, by address."""
        address = c_void_p()
        self.call("cuMemHostAlloc", ctypes.byref(address), max(count, 1), 0)
        try:
            yield address.value or 0
        finally:
            self.call("cuMemFreeHost", address)

    @contextlib.contextmanager
    def stream(self) -> Iterator[int]:
        """Give a stream of its own, by handle."""
        handle = c_void_p()
        self.call("cuStreamCreate", ctypes.byref(handle), NON_BLOCKING)
        try:
            yield handle.value or 0
        finally:
            self.call("cuStreamDestroy_v2", handle)

    @contextlib.contextmanager
    def events(self) -> Iterator[tuple[int, int]]:
        """Give two events that record time, by handle."""
        first, last = c_void_p(), c_void_p()
        self.call("cuEventCreate", ctypes.byref(first), 0)
        self.call("cuEventCreate", ctypes.byref(last), 0)
        try:
            yield first.value or 0, last.value or 0
        finally:
            self.call("cuEventDestroy_v2", first)
            self.call("cuEventDestroy_v2", last)

    def milliseconds(self, first: int, last: int) -> float:
        """Return the time between two recorded events."""
        elapsed = c_float()
        self.call("cuEventElapsedTime", ctypes.byref(elapsed), first, last)
        return elapsed.value


def find_gpu() -> tuple[Gpu | None, str]:
    """Return the GPU and an empty text, or ``None`` and why there is none."""
    try:
        return Driver().gpu(), ""
    except CudaError as error:
        return None, str(error)
