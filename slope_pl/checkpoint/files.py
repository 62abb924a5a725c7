"""Files and folders that appear whole or not at all."""

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

_writing: set[Path] = set()
"""What this process is in the middle of."""


def save_whole(content: Any, path: str | Path) -> None:
    """``torch.save`` into a file beside the final one, which then takes its name.

    Args:
        content: what ``torch.save`` takes.
        path: of the file; folders are made. A process killed meanwhile leaves the previous file as it was.

    Raises:
        OSError: if the disk is full or not writable, with the bytes that are needed and free; a file of that name is then
            still the old one.
    """
    with appearing_whole(path, lambda: _bytes_of(content)) as unfinished, unfinished.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def appearing_whole(path: str | Path, takes: Callable[[], int] | None = None) -> Iterator[Path]:
    """A name to write a file or a folder under. It takes the final one at the end; after an error nothing is left of it.

    Args:
        path: the final one.
        takes: how many bytes it will have, where that is known; asked for after an error.

    Raises:
        OSError: if the system refuses, see :func:`not_written`.
    """
    final = Path(path)
    try:
        unfinished = unfinished_beside(final)
    except OSError as error:
        raise not_written(final, error) or error from error
    _writing.add(unfinished)
    try:
        yield unfinished
        put_in_place(unfinished, final)
    except (Exception, CheckpointException) as error:
        told = not_written(final, error, takes)
        if told is None:
            raise
        raise told from error
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


def not_written(final: Path, error: BaseException, takes: Callable[[], int] | None = None) -> OSError | None:
    """The error of a save with what the user can do, or None if it was not the system that refused.

    Args:
        final: what was to be written.
        error: that was raised.
        takes: how many bytes that has, where it is known.
    """
    number, reason = _refusal(error)
    if reason is None:
        return None
    needed = "" if takes is None else f"It takes about {takes():,} bytes. "
    return OSError(
        number,
        f"{final} could not be written: {reason}. {needed}{_free_at(final)}What "
        "was there before is whole: make room, or write elsewhere; a run goes on from its newest checkpoint (fit --resume "
        "auto, or last_good_checkpoint)",
    )


def _free_at(path: Path) -> str:
    there = next((folder for folder in path.parents if folder.is_dir()), None)
    return "" if there is None else f"{shutil.disk_usage(there).free:,} bytes are free there. "


def _refusal(error: BaseException | None) -> tuple[int | None, str | None]:
    """What the system said: torch raises errors of its own over it ("unexpected pos 704 vs 598", one of several ranks')."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno, error.strerror or str(error)
        if isinstance(error, SafetensorError) and (code := re.search(r"os error (\d+)", str(error))):
            return int(code[1]), os.strerror(int(code[1]))
        if isinstance(error, CheckpointException):
            found = (_refusal(of_rank) for of_rank, _ in error.failures.values())
            return next((one for one in found if one[1] is not None), (None, None))
        error = error.__cause__ or error.__context__
    return None, None


def _bytes_of(tree: Any) -> int:
    """Of the tensors in it, one that occurs twice counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(tree)}
    return sum(storages.values())


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


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
