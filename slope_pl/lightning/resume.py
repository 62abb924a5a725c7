"""Going on after a crash: the newest checkpoint of a folder that is whole, and the data's place in its epoch.

A checkpoint file is a zip archive, and every tensor in it has a checksum that ``torch.load`` does not look at. A damaged file
that loads is worse than one that does not; here all of it is read and compared.
"""

import logging
import zipfile
from pathlib import Path

import lightning.pytorch as pl

from slope_pl.checkpoint.zero import describe_zero, is_zero_folder
from slope_pl.errors import CheckpointError

log = logging.getLogger(__name__)

# What is written last into a folder: Lightning's of FSDP2, DeepSpeed's.
_SHARDED_MARK, _ZERO_MARK = ("meta.pt", ".metadata"), "latest"


def damage(path: Path) -> str | None:
    """Why a checkpoint is not whole, or None.

    Args:
        path: a file; or the folder of a sharded checkpoint (FSDP2's, DeepSpeed's), whose parts are looked at one by one.
    """
    if path.is_dir():
        missing = [name for name in _SHARDED_MARK if not (path / name).exists()]
        if is_zero_folder(path):
            missing = [] if (path / _ZERO_MARK).is_file() else [_ZERO_MARK]
            try:
                describe_zero(path)
            except CheckpointError as error:
                return str(error)
        if missing:
            return f"it has no {missing[0]}: its save was not finished"
        files = [file for file in sorted(path.rglob("*.pt")) if file.is_file()]
        return next((f"{file.name}: {reason}" for file in files if (reason := damage(file))), None)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        return str(error)
    return None if broken is None else f"the checksum of {broken} is wrong"


def last_good_checkpoint(folder: str | Path, pattern: str = "**/*.ckpt") -> Path | None:
    """The newest checkpoint below a folder that is whole: ``trainer.fit(module, ckpt_path=last_good_checkpoint("runs"))``.

    Newer ones that are damaged are named in the log, at level WARNING, and left as they are.

    Args:
        folder: need not exist.
        pattern: of files, and folders of sharded checkpoints, below it.

    Returns:
        its path, or None if there is none: training then begins anew.
    """
    candidates = sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in candidates:
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
