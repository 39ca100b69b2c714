"""Builds the packages of the three source roots and the C++ kernels; all other settings are in pyproject.toml.

The kernels are a plain shared object independent of the Python ABI (loaded with ctypes), so one wheel per platform
serves every Python version. If compilation fails, the installation still succeeds with a warning, and packed matrices
run on XLA. BITNET_KERNELS_PREBUILT=<_cpu.so of an earlier build> installs that file and compiles nothing.
"""

import importlib.util
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("kernels/csrc")
SOURCES, HEADERS = (sorted(str(path) for path in CSRC.glob(pattern)) for pattern in ("*.cc", "*.h"))
# No fused multiply-add: product and sum are rounded separately, as in XLA's code.
FLAGS = ["-O3", "-std=c++17", "-g0", "-ffp-contract=off", "-Wall", "-Wextra", "-fvisibility=hidden"]

NOT_BUILT = """
{line}
The C++ kernels were NOT built: {error}
bitnet_jax works without them on XLA, much slower and with more memory. To build them, install a C++17
compiler (Debian: apt install g++) and install again. `bitnet-jax doctor` shows what is in use.
{line}
"""


def ffi_headers() -> str:
    """Folder of XLA's FFI headers in the jaxlib of the build environment (pinned in pyproject.toml)."""
    jaxlib = importlib.util.find_spec("jaxlib")
    if jaxlib is None or not jaxlib.submodule_search_locations:
        raise FileNotFoundError("jaxlib is not installed; its FFI headers are required")
    return str(Path(jaxlib.submodule_search_locations[0]) / "include")


class BuildKernels(build_ext):
    """Builds a shared object without a Python tag; a failure is reported but not fatal."""

    def run(self) -> None:
        self.prebuilt = os.environ.get("BITNET_KERNELS_PREBUILT")
        if self.prebuilt:
            if not Path(self.prebuilt).is_file():
                raise FileNotFoundError(
                    f"BITNET_KERNELS_PREBUILT: got {self.prebuilt}, expected the _cpu.so of an earlier build"
                )
            super().run()
            return
        try:
            for extension in self.extensions:
                extension.extra_compile_args += ["-isystem", ffi_headers()]  # suppress their warnings
            super().run()
        except Exception as error:  # a missing compiler raises various exception types
            print(NOT_BUILT.format(error=error, line="*" * 100), file=sys.stderr)
            self.extensions = []  # nothing to install

    def build_extension(self, ext: Extension) -> None:
        if self.prebuilt:
            library = Path(self.get_ext_fullpath(ext.name))
            library.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.prebuilt, library)
            return

        def compile_source(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args,
                depends=ext.depends,
            )

        # setuptools compiles sources sequentially; here in parallel, slowest first to balance the load.
        slowest_first = sorted(
            ext.sources, key=lambda source: ("integer_matmul" not in source, -os.path.getsize(source))
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = [path for paths in pool.map(compile_source, slowest_first) for path in paths]
        # setuptools links only if something it knows of is newer than the library.
        ext.depends, ext.sources = [*ext.depends, *ext.sources], []
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols  # no PyInit_ symbol: not a Python module


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["bitnet_jax", "bitnet_jax.*"]),
        "bitnet_kernels",
        *find_packages("experiments"),
    ],
    package_dir={
        "bitnet_jax": "bitnet_jax",
        "bitnet_kernels": "kernels/bitnet_kernels",
        "bitnet_experiments": "experiments/bitnet_experiments",
    },
    ext_modules=[
        Extension(
            "bitnet_kernels._cpu",
            sources=SOURCES,
            depends=HEADERS,
            language="c++",
            extra_compile_args=FLAGS,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
