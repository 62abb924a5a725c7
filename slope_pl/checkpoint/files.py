"""Files that appear whole or not at all."""

import os
import socket
from pathlib import Path
from typing import Any

import torch


def save_whole(content: Any, path: str | Path) -> None:
    """``torch.save`` into a file beside the final one, which then takes its name.

    Args:
        content: what ``torch.save`` takes.
        path: of the file; folders are made. A process killed meanwhile leaves the previous file as it was.

    Raises:
        OSError: if the disk is full or not writable; a file of that name is then still the old one.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    _remove_leftovers(final.parent, host)
    unfinished = final.with_name(f".{final.name}.{host}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(final)
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_leftovers(folder: Path, host: str) -> None:
    """Remove what processes of this machine left that were killed while they saved."""
    for file in folder.glob(f".*.{host}.*.unfinished"):
        process = file.name.split(".")[-2]
        if process.isdigit() and not _is_alive(int(process)):
            file.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
