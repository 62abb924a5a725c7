"""A bad input, and what the error has to say."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jsonargparse
import lightning.fabric
import lightning.pytorch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import recipes
import slope_pl
from slope_pl.errors import SLoPeError

_OWN = tuple(str(Path(package.__file__).parent) for package in (slope_pl, recipes))
_FRAMEWORKS = tuple(
    str(Path(package.__file__).parent) for package in (lightning.pytorch, lightning.fabric, jsonargparse)
)


@dataclass(frozen=True)
class Case:
    """What is called, and what its error says.

    Attributes:
        name: of the test.
        call: gets an empty folder, into which ``files`` have been put.
        says: parts of the message: the value, the expectation, the fix.
        files: relative path -> content; a function of the folder for what is more than that.
    """

    name: str
    call: Callable[[Path], object]
    says: tuple[str, ...]
    files: dict[str, bytes | str] | Callable[[Path], object] | None = None

    def prepare(self, folder: Path) -> None:
        """Put the files there."""
        if callable(self.files):
            self.files(folder)
        for name, content in (self.files or {}).items() if not callable(self.files) else ():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def why_unclear(error: BaseException) -> str | None:
    """Why an error is none that a user can act upon, or None: what kinds may come from where."""
    if isinstance(error, SLoPeError | MisconfigurationException):
        return None
    origin = traceback.extract_tb(error.__traceback__)[-1]
    kinds = ValueError | TypeError | OSError | RuntimeError
    if not isinstance(error, kinds) or isinstance(error, NotImplementedError | RecursionError | UnicodeError):
        return f"{type(error).__name__} is no kind of error that is raised on purpose"
    # Of data and models, which know nothing of slope_pl.errors, and of Lightning and jsonargparse: raised there, not beneath.
    if not origin.filename.startswith((*_OWN, *_FRAMEWORKS)) or not (origin.line or "").startswith("raise "):
        return f"{type(error).__name__} comes from beneath: {origin.filename}:{origin.lineno}"
    return None


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder; but not the cache of prepared text, which is there to go on with."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] != "cache" or (path.is_file() and path.parent == folder)
    }
