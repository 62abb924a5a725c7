"""The compiled kernels, ``torch.ops.slope_cuda.*``: where the library lies, and why it cannot be used if it cannot.

Nothing here creates a CUDA context; loading happens at the first question, not at import.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("slope_cuda.so")
_CUSPARSELT = "libcusparseLt.so.0"


@dataclass(frozen=True)
class Extension:
    """What came of loading the library.

    Attributes:
        problem: why it is not usable, or None.
        built_with: cuSPARSELt version of the headers it was built with, as ``"0.8.0"``; empty if not loaded.
        running: version of the library found at run time.
    """

    problem: str | None
    built_with: str = ""
    running: str = ""


@functools.cache
def extension() -> Extension:
    """Load the library once in this process."""
    if not LIBRARY.exists():
        return Extension(f"the extension is not built ({LIBRARY.name} is missing): run `make extension`")
    try:
        _load_cusparselt()
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return Extension(f"{LIBRARY.name} does not load: {str(error).splitlines()[0]}")
    numbers = torch.ops.slope_cuda.header_version(), torch.ops.slope_cuda.library_version()
    built, running = map(_version, numbers)
    if numbers[1] < 8_000:  # older ones have structures of other sizes
        return Extension(f"cuSPARSELt {running} was found, 0.8 or newer is needed", built, running)
    _register_fakes()
    return Extension(None, built, running)


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def cusparselt_paths() -> Iterator[Path]:
    """Places of cuSPARSELt among the installed packages, in either of their layouts."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for name in ("cu13", "cu12", "cusparselt"):
            path = Path(place) / name / "lib" / _CUSPARSELT
            if path.exists():
                yield path


def _load_cusparselt() -> None:
    """Make cuSPARSELt known to the dynamic linker; a CUDA torch has loaded its own already."""
    try:
        ctypes.CDLL(_CUSPARSELT)
    except OSError:
        path = next(cusparselt_paths(), None)
        if path is None:
            raise OSError(f"{_CUSPARSELT} was not found: pip install nvidia-cusparselt-cu13") from None
        ctypes.CDLL(str(path))


def _register_fakes() -> None:
    """Shapes and dtypes of what the kernels return, for torch.compile and fake tensors."""

    def spmm(x: Tensor, operand: Tensor, bias: Tensor | None, d_out: int, *_: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], d_out))

    def select(dense: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
        return dense.new_empty((dense.shape[0], dense.shape[1] // 2), dtype=dtype)

    def choose_columns(values: Tensor, indices: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        chosen = indices.new_empty((values.shape[1] * 2, values.shape[0] // 8))
        return chosen, values.new_empty((2,), dtype=torch.int64)

    for fake in (spmm, select, choose_columns):
        torch.library.register_fake(f"slope_cuda::{fake.__name__}", fake)
    for name in ("write_metadata", "refresh"):
        torch.library.register_fake(f"slope_cuda::{name}", lambda *_: None)
