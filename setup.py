"""The platform of the wheel: this machine's where the library of kernels is in it (``make native``), else any."""

from __future__ import annotations

from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel

KERNELS = Path(__file__).resolve().parent / "depthwire/runtime/native/lib/libdepthwire_ort.so"


class WithKernels(Distribution):
    """A distribution whose files depend on the platform if the library is one of them."""

    def has_ext_modules(self) -> bool:
        """Tell whether it is."""
        return KERNELS.is_file()


class Wheel(bdist_wheel):
    """A wheel for any Python: ONNX Runtime loads the library, and nothing in it links Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag."""
        return ("py3", "none", super().get_tag()[2])


setup(distclass=WithKernels, cmdclass={"bdist_wheel": Wheel})
