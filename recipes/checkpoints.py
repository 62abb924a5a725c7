"""Opening a recipe's checkpoint: one that is damaged, or of another recipe, is refused before anything is taken from it."""

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from slope_pl import CheckpointError


def read_checkpoint(path: str | Path, what: str = "a checkpoint") -> dict[str, Any]:
    """The content of a Lightning checkpoint; tensors are read from the file when they are used.

    Args:
        path: the file.
        what: is expected, for messages.

    Raises:
        CheckpointError: no such file, not a checkpoint, or a damaged one.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file (working directory: {Path.cwd()}); expected {what}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it is empty"
        raise CheckpointError(
            f"{file} is damaged or no checkpoint ({type(error).__name__}: {reason}); expected {what}"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{file} holds no state_dict of a Lightning module; expected {what}")
    return content


def refuse_foreign(path: str | Path, known: Iterable[str], recipe: str) -> None:
    """Raise unless a checkpoint's saved settings are those of a recipe's module.

    Args:
        path: the file.
        known: names of the module's settings.
        recipe: for the message.

    Raises:
        CheckpointError: some are of no setting; or see :func:`read_checkpoint`.
    """
    saved = read_checkpoint(path, f"one of {recipe}").get("hyper_parameters") or {}
    unknown = sorted(key for key in saved if key not in known and not key.startswith("_"))
    if unknown:
        raise CheckpointError(
            f"{path} is a checkpoint of another recipe: its settings {', '.join(unknown)} are none of {recipe}; give a "
            "checkpoint that this recipe has written"
        )
