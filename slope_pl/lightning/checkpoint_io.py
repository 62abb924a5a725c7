"""Checkpoints written straight to disk, whole or not at all."""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.plugins.io import TorchCheckpointIO

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
        save_whole(dict(checkpoint), final)

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
