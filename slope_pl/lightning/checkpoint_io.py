"""Checkpoints written straight to disk, whole or not at all."""

import errno
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint import CheckpointException

from slope_pl.checkpoint.convert import is_checkpoint
from slope_pl.checkpoint.files import save_whole
from slope_pl.checkpoint.whole import damage
from slope_pl.errors import CheckpointError


class LocalCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, streamed into a file beside the final one that then takes its name.

    Lightning's own plugin builds the whole file in memory first, twice over: for BERT-Large with Adam's state that is
    4.6 GB more at every save. A process killed during a save leaves the previous file as it was. What is read is compared with
    its checksums first, which ``torch.load`` does not. Paths of other file systems (``s3://...``) are left to Lightning.

    A save that fails, as on a full disk, ends the run: if it went on, ``ModelCheckpoint`` would take the file for written and
    remove the one before it.
    """

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what ``torch.save`` takes.
            path: of the file; folders are made.
            storage_options: not supported, as in the base class.

        Raises:
            OSError: if the disk is full or not writable, with the bytes that are needed and free; a file of that name is then
                still the old one, and nothing else is left.
        """
        if storage_options is not None or urlparse(str(path)).scheme:
            super().save_checkpoint(dict(checkpoint), path, storage_options)
            return
        final = Path(path)
        refuse_other_folder(final)
        try:
            save_whole(dict(checkpoint), final)
        except (OSError, RuntimeError) as error:
            told = not_written(final, error, checkpoint)
            if told is None:
                raise
            raise told from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; arguments are those of Lightning's ``TorchCheckpointIO``.

        Raises:
            CheckpointError: if the file is damaged.
        """
        if Path(path).is_file() and (reason := damage(Path(path))) is not None:
            raise CheckpointError(
                f"{path} is damaged: {reason}. Name another one; slope_pl.lightning.last_good_checkpoint(folder) finds the "
                "newest that is whole"
            )
        return super().load_checkpoint(path, *args, **kwargs)


def refuse_other_folder(final: Path) -> None:
    """Raise an OSError if a checkpoint would take the place of a folder that is none."""
    if final.is_dir() and any(final.iterdir()) and not is_checkpoint(final):
        names = ", ".join(sorted(entry.name for entry in final.iterdir())[:3])
        raise IsADirectoryError(
            errno.EISDIR,
            f"{final} is a folder that holds {names}, and no checkpoint: it stays. Save under another name",
        )


def not_written(final: Path, error: BaseException, checkpoint: Any = None) -> OSError | None:
    """The error of a save, with what the user can do; None if it was not the system that refused.

    Args:
        final: what was to be written.
        error: that was raised.
        checkpoint: its content, where one process has all of it.
    """
    reason = _os_error(error)
    if reason is None:
        return None
    takes = "" if checkpoint is None else f"It takes about {_bytes_of(checkpoint):,} bytes. "
    return OSError(
        reason.errno,
        f"{final} could not be written: {reason.strerror or reason}. {takes}{shutil.disk_usage(final.parent).free:,} "
        "bytes are free there. Checkpoints that were there are whole: make room, or write elsewhere, "
        "and go on from the newest (fit --resume auto, or last_good_checkpoint)",
    )


def _os_error(error: BaseException | None) -> OSError | None:
    """What the system said: torch raises errors of its own over it ("unexpected pos 704 vs 598", one of several ranks')."""
    while error is not None and not isinstance(error, OSError):
        if isinstance(error, CheckpointException):
            found = (_os_error(of_rank) for of_rank, _ in error.failures.values())
            return next((reason for reason in found if reason is not None), None)
        error = error.__cause__ or error.__context__
    return error


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
