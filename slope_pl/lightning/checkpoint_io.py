"""Checkpoints written straight to disk, whole or not at all."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

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
        try:
            save_whole(dict(checkpoint), final)
        except (OSError, RuntimeError) as error:
            reason = _os_error(error)
            if reason is None:
                raise
            raise OSError(
                reason.errno,
                f"{final} could not be written: {reason.strerror or reason}. It takes about {_bytes_of(checkpoint):,} bytes, "
                f"{shutil.disk_usage(final.parent).free:,} are free there. Checkpoints that were there are whole: make "
                "room, or write elsewhere, and go on from the newest (fit --resume auto, or last_good_checkpoint)",
            ) from error

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


def _os_error(error: BaseException | None) -> OSError | None:
    """What the system said: torch raises an error of its own over it ("unexpected pos 704 vs 598")."""
    while error is not None and not isinstance(error, OSError):
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
