"""Reading files that may have been made to do harm: nothing in them is called.

A pickle is a program. ``torch.load(weights_only=True)`` runs it with a short list of things that it may call; here DeepSpeed's
classes come to that list, as empty stand-ins, and the index of a torch.distributed checkpoint gets a list of its own.
"""

import io
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from slope_pl.errors import CheckpointError


class StandIn:
    """An object of DeepSpeed's, with its attributes and without its class."""

    def __init__(self, *args: Any) -> None:
        self.args = args


# What ZeRO 1 to 3 leave in their files, in deepspeed 0.19.
DEEPSPEED_NAMES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)

_INDEX_NAMES = {
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}


def load_trusted(path: str | Path, classes: Sequence[Any] | None = None, map_location: Any = "cpu") -> Any:
    """``torch.load`` of a file, which can call nothing but what rebuilds tensors and plain values.

    Args:
        path: the file; tensors are mapped from it where its format allows.
        classes: DeepSpeed's, where its engine is to get them; by default stand-ins take their place.
        map_location: as in ``torch.load``.

    Raises:
        CheckpointError: if the file is damaged, no checkpoint, or would call something else.
    """
    allowed = list(classes) if classes is not None else [(StandIn, name) for name in DEEPSPEED_NAMES]
    try:
        with torch.serialization.safe_globals(allowed):
            mapped = map_location == "cpu" and zipfile.is_zipfile(path)
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(_refusal(path, error)) from error


def load_bytes(content: bytes, path: object) -> Any:
    """The same for what lies within another file."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(_refusal(path, error)) from error


def load_index(path: str | Path) -> Any:
    """The ``.metadata`` of a torch.distributed checkpoint, which torch itself would unpickle without a check.

    Raises:
        CheckpointError: if it is damaged, or would call something that is no part of such an index.
    """
    try:
        with Path(path).open("rb") as stream:
            index = _IndexUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(_refusal(path, error)) from error
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, Mapping):
        raise CheckpointError(f"{path} is damaged: a {type(index).__name__} is in place of a checkpoint's index")
    return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if plain or name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"global {module}.{name} is no part of the index of a checkpoint")


def _refusal(path: object, error: Exception) -> str:
    """Torch's own text is long, and advises to load the file all the same."""
    text = str(error).strip()
    called = re.search(r"(?:GLOBAL|global:?) ((?:\w+\.)+\w+)", text)
    if called:
        return (
            f"{path} is not read: it would call {called[1]}, which is no part of a checkpoint. If the file is your own and "
            f"that is a class of yours, torch.serialization.add_safe_globals([{called[1].rpartition('.')[2]}]) lets it be read"
        )
    reason = re.search(r"WeightsUnpickler error: (.*)", text)
    line = reason[1].strip() if reason else text.splitlines()[0] if text else "it is empty"
    return f"{path} is damaged or no checkpoint ({type(error).__name__}: {line})"
