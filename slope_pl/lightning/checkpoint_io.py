"""Checkpoints written straight to disk, whole or not at all."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


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
            return
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname()
        _remove_leftovers(final.parent, host)
        unfinished = final.with_name(f".{final.name}.{host}.{os.getpid()}.unfinished")
        try:
            with unfinished.open("wb") as stream:
                torch.save(dict(checkpoint), stream)
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
