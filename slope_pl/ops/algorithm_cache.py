"""The file that remembers searched algorithms, by GPU, library version and shape.

``algorithms.json`` in ``$SLOPE_CACHE_DIR``, by default ``~/.cache/slope_pl``. Several processes may write it: each merges
what it found under a lock and replaces the file whole. A damaged or foreign file is left out with one line and replaced at
the next write.
"""

import contextlib
import enum
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slope_pl.ops.extension import extension

log = logging.getLogger(__name__)

FORMAT = 2
SM90 = 0x4000
_loaded: dict[str, "Algorithm"] | None = None


class Order(enum.IntEnum):
    """In which order an operand's metadata lie, as ``slope_cuda::write_metadata`` counts them.

    LIBRARY: cuSPARSELt's, made by cuSPARSELt. DIRECT: the same, written by our own kernel. CUTLASS: of the Hopper kernels.
    """

    LIBRARY = 0
    DIRECT = 1
    CUTLASS = 2


class After(enum.StrEnum):
    """What a kernel does with a product before it stores it."""

    NOTHING = ""
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    GELU_GRADIENT = "gelu_gradient"
    GELU_GRADIENT_TANH = "gelu_gradient_tanh"

    @property
    def approximate(self) -> str:
        """As ``torch.nn.functional.gelu`` calls it."""
        return "tanh" if self.endswith("tanh") else "none"

    @property
    def is_gradient(self) -> bool:
        """Whether it multiplies by the derivative of an activation."""
        return self.startswith("gelu_gradient")


class Algorithm(NamedTuple):
    """A way to multiply: an id, and how often the reduction is split.

    Ids are cuSPARSELt's (-1: its default), or, from ``SM90`` on, configurations of the CUTLASS kernels.
    """

    id: int
    split_k: int = 1
    split_k_mode: int = 0


def path() -> Path:
    """Where the file lies; it need not exist."""
    folder = os.environ.get("SLOPE_CACHE_DIR")
    if folder:
        return Path(folder) / "algorithms.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slope_pl" / "algorithms.json"


def key(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    d_out: int,
    d_in: int,
    bias: bool,
    order: Order,
    after: After = After.NOTHING,
) -> str:
    """What an algorithm is remembered under; row counts that differ by less than a quarter share an entry."""
    name, version = torch.cuda.get_device_name(device), extension().running
    library = "CUTLASS kernels 1" if order is Order.CUTLASS else f"cuSPARSELt {version}"
    what = f"{str(dtype).removeprefix('torch.')} {bucket(n)}x{d_in}->{d_out}{' bias' if bias else ''}"
    what += f" {after}" if after else ""
    return f"{name} | {library} | {what}"


def bucket(n: int) -> int:
    """The largest of 4, 5, 6, 7 times a power of two that is not above ``n`` (itself below 8)."""
    if n < 8:
        return n
    step = 1 << (n.bit_length() - 3)
    return n // step * step


def load() -> dict[str, Algorithm]:
    """All entries; the file is read once in a process."""
    global _loaded
    if _loaded is None:
        _loaded = _read()
    return _loaded


def store(key: str, algorithm: Algorithm) -> None:
    """Remember an algorithm here and, where the file can be written, for other processes."""
    load()[key] = algorithm
    target = path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            entries = {**_read(), key: algorithm}
            text = {"format": FORMAT, "entries": {k: list(v) for k, v in sorted(entries.items())}}
            with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", delete=False) as file:
                json.dump(text, file, indent=1)
            os.replace(file.name, target)
    except OSError as error:
        log.warning("slope_pl: algorithms are not remembered: %s (set SLOPE_CACHE_DIR to a folder)", error)


def _read() -> dict[str, Algorithm]:
    try:
        text = json.loads(path().read_text())
        if text["format"] != FORMAT:
            raise ValueError(f"format {text['format']!r}, expected {FORMAT}")
        return {str(k): _entry(v) for k, v in text["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("slope_pl: %s is not a file of algorithms and is left out (%s)", path(), error)
        return {}


def _entry(value: Any) -> Algorithm:
    if not (isinstance(value, list) and len(value) == 3 and all(type(part) is int for part in value)):
        raise ValueError(f"entry {value!r}, expected three integers")
    return Algorithm(*value)


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
