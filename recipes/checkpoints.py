"""Opening a recipe's checkpoint: one that is damaged, or of another recipe, is refused before anything is taken from it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import slope_pl.checkpoint
from slope_pl import CheckpointError
from slope_pl.checkpoint import saved_settings


def read_checkpoint(path: str | Path, what: str = "a checkpoint", verify: bool = True) -> dict[str, Any]:
    """The content of a checkpoint of any kind, without the optimizer's; tensors of a file are read when they are used.

    Args:
        path: a file, or the folder that FSDP2 or DeepSpeed wrote.
        what: is expected, for messages.
        verify: compare it with its checksums; False where its tensors are not used.

    Raises:
        CheckpointError: no such file, not a checkpoint, or a damaged one.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise CheckpointError(f"{source}: no such file (working directory: {Path.cwd()}); expected {what}")
    try:
        return slope_pl.checkpoint.read_checkpoint(source, optimizer=False, verify=verify)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; expected {what}") from error


def refuse_foreign(path: str | Path, known: Iterable[str], recipe: str) -> None:
    """Raise unless a checkpoint's saved settings are those of a recipe's module.

    Args:
        path: a checkpoint of any kind.
        known: names of the module's settings.
        recipe: for the message.

    Raises:
        CheckpointError: some are of no setting; or it cannot be read.
    """
    try:
        saved = saved_settings(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; expected a checkpoint of {recipe}") from error
    unknown = sorted(key for key in saved if key not in known and not key.startswith("_"))
    if unknown:
        raise CheckpointError(
            f"{path} is a checkpoint of another recipe: its settings {', '.join(unknown)} are none of {recipe}; give a "
            "checkpoint that this recipe has written"
        )
