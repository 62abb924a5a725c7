"""Going on after a crash: the newest checkpoint of a folder that is whole, and the data's place in its epoch."""

import logging
from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl

from slope_pl.checkpoint.whole import damage

log = logging.getLogger(__name__)


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Files and folders by their time, without those that are gone meanwhile; of a link to nothing, the link's counts."""
    times = {}
    for path in paths:
        for follow in (True, False):
            try:
                times[path] = path.stat(follow_symlinks=follow).st_mtime_ns
                break
            except FileNotFoundError:
                continue
    return sorted(times, key=times.__getitem__, reverse=True)


def last_good_checkpoint(folder: str | Path, pattern: str = "**/*.ckpt") -> Path | None:
    """The newest checkpoint below a folder that is whole: ``trainer.fit(module, ckpt_path=last_good_checkpoint("runs"))``.

    Newer ones that are damaged are named in the log, at level WARNING, and left as they are.

    Args:
        folder: need not exist.
        pattern: of files, and folders of sharded checkpoints, below it.

    Returns:
        its path, or None if there is none: training then begins anew.
    """
    for path in newest_first(Path(folder).glob(pattern)):
        reason = damage(path)
        if reason is None:
            log.info("going on from %s", path)
            return path
        log.warning("%s is damaged and left out: %s", path, reason)
    return None


def make_loader_anew(trainer: pl.Trainer) -> None:
    """Let a run that goes on from a checkpoint make its training loader again, and give that one its place in the epoch.

    A module that asks for ``trainer.estimated_stepping_batches`` in ``configure_optimizers``, as for a schedule over epochs,
    has the loader made there, before the restore. Lightning then never gives it its state, and the rest of the epoch would
    be the epoch's first batches once more (Lightning 2.6, issue 20550). To be called once optimizers are made and before
    training starts; where no checkpoint is read, nothing happens.
    """
    if trainer.ckpt_path is not None:
        trainer.fit_loop._combined_loader = None
