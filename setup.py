"""Builds the compiled backend into the wheel where that is possible; everything else is in pyproject.toml.

``SLOPE_BUILD_EXTENSION``: ``auto`` (default) builds it where nvcc, torch and cuSPARSELt's headers are and says in one line
why not otherwise; ``1`` makes that line an error; ``0`` leaves it out. The headers come from the environment, so build with
``pip wheel . --no-build-isolation``.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = Path("slope_pl") / "ops" / "slope_cuda.so"


def load_build():
    """``extensions/build.py`` as a module."""
    spec = importlib.util.spec_from_file_location("slope_build", ROOT / "extensions" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Also compiles the kernels, into the build folder."""

    def run(self) -> None:
        """Python files first."""
        super().run()
        wanted = os.environ.get("SLOPE_BUILD_EXTENSION", "auto")
        if wanted not in ("auto", "0", "1"):
            sys.exit(f"SLOPE_BUILD_EXTENSION={wanted!r}: expected auto, 0 or 1")
        target = ROOT / self.build_lib / LIBRARY
        if wanted == "0":
            target.unlink(missing_ok=True)
            return
        if self.editable_mode:
            return  # make extension
        build = load_build()
        try:
            build.build(target)
        except build.BuildError as error:
            if wanted == "1":
                sys.exit(f"SLOPE_BUILD_EXTENSION=1: {error}")
            print(f"slope_pl: built without its compiled backend: {str(error).splitlines()[0]}", file=sys.stderr)


class WheelOfAnyPython(bdist_wheel):
    """With the kernels the wheel belongs to a platform, though to no Python version: the library links to none."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-any``, or of the platform."""
        python, abi, platform = super().get_tag()
        if (ROOT / "build" / "lib" / LIBRARY).exists():
            platform = self.plat_name.replace("-", "_").replace(".", "_") if self.plat_name else "linux_x86_64"
            if platform == "any":
                from sysconfig import get_platform

                platform = get_platform().replace("-", "_").replace(".", "_")
        return python, abi, platform


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfAnyPython})
