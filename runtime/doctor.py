"""What of Depthwire's surroundings is there, what is missing, and the exact command that mends it.

Reads package metadata and the file system; nothing heavy is imported here. With ``deep=True`` each package is really
imported, in a child process of its own, so that a broken or hanging one costs a line and not the report.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from depthwire.errors import BuildError
from depthwire.runtime import native
from depthwire.runtime.memory import available_bytes, gigabytes

Status = Literal["present", "missing", "broken", "not-applicable"]

_IMPORT_SECONDS = 120
_SMI_SECONDS = 15
_LOW_DISK_BYTES = 2 * 10**9
_NVIDIA_PROC = Path("/proc/driver/nvidia/version")
_SMI_REMEDY = "sudo modprobe nvidia && nvidia-smi"
_RTX_LINE = "pip install 'depthwire[rtx]'"
_TENSORRT_LINE = "pip install 'depthwire[tensorrt]' --extra-index-url https://pypi.nvidia.com"
_TRITON_LINE = "pip install 'depthwire[triton]'"
_ORT_RTX_LINE = "pip install 'depthwire[ort-rtx]'"
_ORT_TENSORRT_LINE = "pip install 'tensorrt>={0},<{1}' --extra-index-url https://pypi.nvidia.com"
_NVINFER = re.compile(rb"libnvinfer\.so\.(\d+)")
_HF_LINE = "pip install 'depthwire[hf]'"
_ONE_ORT_LINE = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        status: ``present``, ``missing``, ``broken``, or ``not-applicable`` where its absence hinders nothing here.
        version: Its version, where it has one.
        detail: What it is needed for, or what was found.
        remedy: The exact command that mends it, or ``None`` where there is nothing to mend.
    """

    name: str
    status: Status
    version: str | None
    detail: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """Return the finding as a JSON-ready mapping."""
        return asdict(self)


@dataclass(frozen=True)
class Package:
    """A Python package that is looked for.

    Attributes:
        distribution: Name on the package index.
        module: Name it is imported by.
        purpose: What it is needed for.
        remedy: Command that installs it.
        minimum: Lowest version that works.
        below: First version that is not supported, ``""`` for none.
    """

    distribution: str
    module: str
    purpose: str
    remedy: str
    minimum: str = "0"
    below: str = ""


# Ranges as in pyproject.toml; a test holds the two together.
PACKAGES = (
    Package("torch", "torch", "captures models", "pip install 'torch>=2.13,<2.14'", "2.13", "2.14"),
    Package("onnx", "onnx", "writes and checks ONNX files", "pip install 'onnx>=1.20'", "1.20"),
    Package("onnxscript", "onnxscript", "translates torch operators to ONNX", "pip install 'onnxscript>=0.7'", "0.7"),
    Package("onnx-ir", "onnx_ir", "edits ONNX graphs", "pip install 'onnx-ir>=1.0'", "1.0"),
    Package("polygraphy", "polygraphy", "compares back ends", "pip install 'polygraphy>=0.49'", "0.49"),
    Package("transformers", "transformers", "loads Hugging Face models", _HF_LINE, "5"),
    Package("accelerate", "accelerate", "loads large Hugging Face models", _HF_LINE, "1"),
    Package("gguf", "gguf", "reads GGUF files", _HF_LINE, "0.17"),
    Package("tensorrt-rtx", "tensorrt_rtx", "builds engines for target rtx, on any machine", _RTX_LINE, "1.7"),
    Package("tensorrt", "tensorrt", "builds TensorRT engines, on a machine with a GPU", _TENSORRT_LINE, "10.3"),
    Package(
        "onnxruntime-ep-nv-tensorrt-rtx",
        "onnxruntime_ep_nv_tensorrt_rtx",
        "runs ONNX models by TensorRT-RTX in ONNX Runtime, on an RTX GPU",
        _ORT_RTX_LINE,
        "0.5",
    ),
    Package("triton", "triton", "compiles GPU kernels of the operators, on Linux", _TRITON_LINE, "3.9"),
)


def diagnose(*, deep: bool = False, folder: Path | None = None) -> list[Finding]:
    """Return one finding for each thing that a compilation, a build or a run may need.

    Args:
        deep: Import every package that is installed (some seconds each), instead of reading its metadata only.
        folder: Where free disk space is looked at; the working directory by default.
    """
    found = [_python()]
    found += [_package(package, deep=deep) for package in PACKAGES]
    found.insert(5, _onnxruntime(deep=deep))
    gpu = _gpu()
    found += [_kernels(), _polygraphy_command(), gpu, _tensorrt_provider(has_gpu=gpu.status == "present")]
    found += [_memory(), _disk(folder or Path.cwd())]
    return found


def _python() -> Finding:
    where = f"{platform.system()} {platform.machine()}, {sys.executable}"
    return Finding("python", "present", platform.python_version(), where)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    # Enough of PEP 440 for ranges: the release numbers, without local or pre-release parts.
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _package(package: Package, *, deep: bool) -> Finding:
    name, version = package.distribution, _version(package.distribution)
    if version is None:
        return Finding(name, "missing", None, f"{package.purpose}: not installed", package.remedy)
    reinstall = f"pip install --force-reinstall {name}=={version.partition('+')[0]}"
    if importlib.util.find_spec(package.module) is None:
        return Finding(name, "broken", version, f"installed, but there is no module {package.module}", reinstall)
    release = _numbers(version)
    if release < _numbers(package.minimum) or (package.below and release >= _numbers(package.below)):
        wanted = f">={package.minimum}" + (f",<{package.below}" if package.below else "")
        return Finding(name, "broken", version, f"{package.purpose}: needs {wanted}", package.remedy)
    if deep:
        failure = _import_failure(f"import {package.module}")
        if failure is not None:
            return Finding(name, "broken", version, f"import {package.module} fails: {failure}", reinstall)
    return Finding(name, "present", version, package.purpose + _build_flavour(name, version))


def _build_flavour(name: str, version: str) -> str:
    if name != "torch":
        return ""
    local = version.partition("+")[2]
    if not local:
        spec = importlib.util.find_spec("torch")
        root = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
        local = "cuda" if root is not None and any((root / "lib").glob("*torch_cuda*")) else "cpu"
    return f" ({'CPU' if local == 'cpu' else 'CUDA'} build)"


def _run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own code, run by the running interpreter
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=_IMPORT_SECONDS,
        check=False,
        # -c puts the working directory first on the path: one that holds no Python files.
        cwd=Path(sys.executable).parent,
    )


def _import_failure(code: str) -> str | None:
    try:
        done = _run_python(code)
    except subprocess.TimeoutExpired:
        return f"no end after {_IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _onnxruntime(*, deep: bool) -> Finding:
    name, purpose = "onnxruntime", "runs ONNX models"
    installed = {d: v for d in ("onnxruntime", "onnxruntime-gpu") if (v := _version(d)) is not None}
    if not installed:
        return Finding(name, "missing", None, f"{purpose}: not installed", "pip install 'onnxruntime-gpu>=1.24'")
    both = " and ".join(f"{distribution} {version}" for distribution, version in installed.items())
    if len(installed) == 2:
        return Finding(name, "broken", None, f"{both} are both installed and overwrite each other", _ONE_ORT_LINE)
    ((distribution, version),) = installed.items()
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return Finding(name, "broken", version, f"{both} is installed, but there is no module", _ONE_ORT_LINE)
    if _numbers(version) < (1, 24):
        return Finding(name, "broken", version, f"{purpose}: needs >=1.24", f"pip install '{distribution}>=1.24'")
    if deep:
        done = "import onnxruntime; print(onnxruntime.get_available_providers())"
        failure = _import_failure(done)
        if failure is not None:
            return Finding(name, "broken", version, f"import onnxruntime fails: {failure}", _ONE_ORT_LINE)
    libraries = Path(spec.origin).parent.glob("capi/*onnxruntime_providers_*")
    shipped = sorted({path.stem.rpartition("_")[2].split(".")[0] for path in libraries} - {"shared"})
    return Finding(
        name, "present", version, f"{purpose} ({distribution}; providers in it: {', '.join(['cpu', *shipped])})"
    )


def _kernels() -> Finding:
    name, purpose = "kernels", "runs depth-attention operators in ONNX Runtime"
    try:
        instructions = native.instruction_set()
    except BuildError as error:
        return Finding(name, "broken", None, f"{error.what}: {error.got}", native.BUILD_COMMAND)
    if instructions is None:
        detail = f"{purpose}: not built, so the function bodies in the file run, which are slower"
        return Finding(name, "missing", None, detail, native.BUILD_COMMAND)
    return Finding(name, "present", str(native.ABI), f"{purpose} ({instructions}; {native.library_path()})")


def _polygraphy_command() -> Finding:
    name = "polygraphy command"
    beside = Path(sys.executable).with_name("polygraphy")
    path = shutil.which("polygraphy") or shutil.which(str(beside))
    if path is not None:
        return Finding(name, "present", _version("polygraphy"), path)
    return Finding(name, "missing", None, "reruns a comparison by hand: not on PATH", "pip install 'polygraphy>=0.49'")


def _gpu() -> Finding:
    name = "NVIDIA GPU"
    smi = shutil.which("nvidia-smi")
    if smi is None and not _NVIDIA_PROC.is_file():
        detail = "no NVIDIA driver: engines can be built ahead of time for rtx, not run; ONNX Runtime runs on the CPU"
        return Finding(name, "not-applicable", None, detail)
    if smi is None:
        driver = _NVIDIA_PROC.read_text(encoding="utf-8", errors="replace").splitlines()[0]
        return Finding(name, "present", None, f"{driver} (nvidia-smi is not on PATH, so the GPU is not known)")
    query = "--query-gpu=driver_version,name,compute_cap,memory.total"
    try:
        done = subprocess.run(  # noqa: S603 - the driver's own tool, with fixed arguments
            [smi, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=_SMI_SECONDS, check=False
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return Finding(name, "broken", None, f"nvidia-smi fails: {error}", _SMI_REMEDY)
    gpus = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode != 0 or not gpus:
        text = (done.stdout + done.stderr).strip() or f"exit status {done.returncode}"
        return Finding(name, "broken", None, f"nvidia-smi fails: {text.splitlines()[-1]}", _SMI_REMEDY)
    return Finding(name, "present", gpus[0].split(",")[0], "; ".join(gpu.partition(", ")[2] for gpu in gpus))


def _tensorrt_provider(*, has_gpu: bool) -> Finding:
    """Look for the TensorRT that ONNX Runtime's provider is linked against: another major version does not serve it."""
    name = "TensorRT provider"
    spec = importlib.util.find_spec("onnxruntime")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "capi"
    library = None if folder is None else next(folder.glob("libonnxruntime_providers_tensorrt.so"), None)
    match = None if library is None else _NVINFER.search(library.read_bytes())
    if match is None:
        return Finding(name, "not-applicable", None, "ONNX Runtime comes without a TensorRT provider")
    major = int(match[1])
    wanted = f"libnvinfer.so.{major}"
    purpose = f"runs ONNX models by TensorRT {major} in ONNX Runtime"
    where = _shared_library(wanted)
    if where is not None:
        return Finding(name, "present", str(major), f"{purpose} ({where})")
    if not has_gpu:
        return Finding(name, "not-applicable", None, f"{purpose}: no {wanted}, and no GPU for it")
    return Finding(
        name, "missing", None, f"{purpose}: {wanted} is not found", _ORT_TENSORRT_LINE.format(major, major + 1)
    )


def _shared_library(name: str) -> str | None:
    """Return where the dynamic linker, or the package tensorrt, has a shared library of exactly this name."""
    stem = name.partition(".")[0].removeprefix("lib")
    if ctypes.util.find_library(stem) == name:
        return name
    spec = importlib.util.find_spec("tensorrt_libs")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        if (Path(folder) / name).is_file():
            return str(Path(folder) / name)
    return None


def _memory() -> Finding:
    total = int(psutil.virtual_memory().total)
    return Finding("memory", "present", None, f"{gigabytes(available_bytes())} available of {gigabytes(total)}")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    detail = f"{gigabytes(free)} free in {folder}"
    if free < _LOW_DISK_BYTES:
        return Finding(
            "disk",
            "broken",
            None,
            f"{detail}: too little for a model and its engine",
            f"du -sh {shlex.quote(str(folder))}/*",
        )
    return Finding("disk", "present", None, detail)
