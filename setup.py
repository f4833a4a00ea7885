"""Builds the native CPU kernels with the package; everything else is in pyproject.toml.

The kernels are a plain shared library that ctypes loads, compiled by `qlora_kernels/cpu/build.py`. They are optional:
without a C++ compiler the installation goes on and the PyTorch reference runs (`qlora doctor` says so).
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from qlora_kernels.cpu import build

FOLDER = "kernels/qlora_kernels/cpu/csrc"


class BuildKernels(build_ext):
    """`build_ext` that leaves compiling and linking to `build.py`."""

    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        try:
            self.built = build.build(target=target)
        except build.BuildError as error:
            self.built = None
            print(f"The native CPU kernels are left out, the PyTorch reference will run: {error}", file=sys.stderr)

    def copy_extensions_to_source(self):  # in an editable installation
        if self.built:
            super().copy_extensions_to_source()

    def get_output_mapping(self):
        return super().get_output_mapping() if self.built else {}


native = Extension(
    "qlora_kernels.cpu._native",
    sources=[f"{FOLDER}/{name}" for name in build.sources(platform.machine())],
    depends=[f"{FOLDER}/{name}" for name in build.HEADERS],
    optional=True,
)
setup(ext_modules=[native], cmdclass={"build_ext": BuildKernels})
