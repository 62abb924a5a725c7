"""Checkpoints written straight to disk, whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.plugins.io import TorchCheckpointIO

from slope_pl.checkpoint.files import save_whole


class LocalCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, streamed into a file beside the final one that then takes its name.

    Lightning's own plugin builds the whole file in memory first, twice over: for BERT-Large with Adam's state that is
    4.6 GB more at every save. A process killed during a save leaves the previous file as it was. Paths of other file systems
    (``s3://...``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what ``torch.save`` takes.
            path: of the file; folders are made.
            storage_options: not supported, as in the base class.

        Raises:
            OSError: if the disk is full or not writable; a file of that name is then still the old one.
        """
        if storage_options is not None or urlparse(str(path)).scheme:
            super().save_checkpoint(dict(checkpoint), path, storage_options)
        else:
            save_whole(dict(checkpoint), path)
