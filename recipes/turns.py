"""Runs that share a GPU take turns: one gets ready (imports, text, model) while another trains."""

import fcntl
import os
from typing import Any

import lightning.pytorch as pl


class Turn(pl.Callback):
    """Holds a file's lock from the beginning of ``fit`` to its end, and waits for it if another process does.

    Put it first, so that no clock of another callback runs while it waits. The lock goes with the process, however that ends.

    Args:
        file: the same one for all runs that take turns; made if it is not there.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self._descriptor: int | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait."""
        self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the next one go."""
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A run that fails is through, too."""
        self._leave()

    def _leave(self) -> None:
        if self._descriptor is not None:
            # Closing it would not do: a data or compile worker that was forked meanwhile has it open as well.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds nothing."""
        return {**self.__dict__, "_descriptor": None}
