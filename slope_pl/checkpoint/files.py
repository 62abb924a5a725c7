"""Files and folders that appear whole or not at all."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_writing: set[Path] = set()
"""What this process is in the middle of."""


def save_whole(content: Any, path: str | Path) -> None:
    """``torch.save`` into a file beside the final one, which then takes its name.

    Args:
        content: what ``torch.save`` takes.
        path: of the file; folders are made. A process killed meanwhile leaves the previous file as it was.

    Raises:
        OSError: if the disk is full or not writable; a file of that name is then still the old one.
    """
    with appearing_whole(path) as unfinished, unfinished.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def appearing_whole(path: str | Path) -> Iterator[Path]:
    """A name to write a file or a folder under. It takes the final one at the end; after an error nothing is left of it."""
    final = Path(path)
    unfinished = unfinished_beside(final)
    _writing.add(unfinished)
    try:
        yield unfinished
        put_in_place(unfinished, final)
    finally:
        remove(unfinished)
        _writing.discard(unfinished)


def unfinished_beside(final: Path) -> Path:
    """A hidden name beside the final one; its folder is made, and cleared of what killed processes of this machine left."""
    final.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    _remove_leftovers(final.parent, host)
    return final.with_name(f".{final.name}.{host}.{os.getpid()}.unfinished")


def put_in_place(unfinished: Path, final: Path) -> None:
    """Give what is finished its name.

    A file takes the place of a file at once. No folder can do that: what is there is called ``...-replaced`` until the new
    one is in its place, with the same suffix, so that who looks for checkpoints finds one at every moment.
    """
    if not (final.is_dir() or (unfinished.is_dir() and final.exists())):
        unfinished.replace(final)
        return
    aside = final.with_name(f"{final.stem}-replaced{final.suffix}")
    remove(aside)
    final.rename(aside)
    unfinished.rename(final)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(folder: Path, host: str) -> None:
    for left in folder.glob(f".*.{host}.*.unfinished"):
        process = left.name.split(".")[-2]
        if process.isdigit() and left not in _writing and not _is_another(int(process)):
            remove(left)


def _is_another(process: int) -> bool:
    """Whether it is alive, and not this one: in a container that is started again they may have the same number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
