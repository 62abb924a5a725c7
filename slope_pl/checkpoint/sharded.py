"""The folder that FSDP2 leaves: torch.distributed.checkpoint, with Lightning's ``meta.pt`` beside it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from slope_pl.checkpoint.files import appearing_whole, save_whole
from slope_pl.checkpoint.mark import OPTIMIZERS_KEY, by_number, named_states
from slope_pl.checkpoint.trusted import load_bytes, load_index, load_trusted
from slope_pl.errors import CheckpointError

_INDEX, _META = ".metadata", "meta.pt"


class _Reader(dcp.FileSystemReader):
    """Takes the index that was checked."""

    def __init__(self, path: Path, index: Any) -> None:
        super().__init__(path)
        self._checked = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return self._checked


def is_sharded_folder(path: Path) -> bool:
    """Whether FSDP2 wrote the folder."""
    return (path / _INDEX).is_file() or (path / _META).is_file()


def read_sharded(path: Path, optimizer: bool = True) -> dict[str, Any]:
    """A sharded checkpoint as the full one that a single device would have written.

    Args:
        path: the folder; no process group is needed, nor as many processes as wrote it.
        optimizer: whether to read the optimizer's state too.

    Raises:
        CheckpointError: if parts are missing, damaged, or would call something.
    """
    index, plain = _checked(path)
    content = load_trusted(path / _META)
    wanted = {
        key: entry
        for key, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and (optimizer or _place(index, key)[0] == "state_dict")
    }
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in wanted.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what no_dist asks for
        with readable(path):
            dcp.load(tensors, storage_reader=_Reader(path, index), no_dist=True)
    tree: dict[str, Any] = {}
    for key, value in {**tensors, **plain}.items():
        _put(tree, _place(index, key), value)
    content["state_dict"] = _lists(tree.pop("state_dict"))
    if optimizer:
        states = [_lists(tree[key]) for key in sorted(tree, key=lambda key: int(key.rpartition("_")[2]))]
        for state in states:
            state.setdefault("state", {})
        groups = [[{"params": list(group["params"])} for group in state["param_groups"]] for state in states]
        content["optimizer_states"] = [by_number(state) for state in states]
        content.setdefault(OPTIMIZERS_KEY, groups)
    return content


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise a CheckpointError for what torch.distributed raises, which is no Exception and has the stacks of all ranks."""
    try:
        yield
    except CheckpointException as error:
        reason = next((str(of_rank).partition("\n")[0] for of_rank, _ in error.failures.values()), str(error))
        raise CheckpointError(
            f"{path} cannot be loaded: {reason.rstrip('.')}. It is damaged, or of another model or optimizer"
        ) from error


def check_sharded(path: Path) -> None:
    """Raise a CheckpointError if torch, which unpickles the folder's index and some entries, would call something."""
    _checked(path)
    load_trusted(path / _META)


def stored_parts(path: Path) -> dict[Path, list[tuple[str, int, int]]]:
    """What the index of a folder says of its shards: file -> name, offset and length in bytes of each piece in it.

    Raises:
        CheckpointError: if the index is damaged, or would call something.
    """
    parts: dict[Path, list[tuple[str, int, int]]] = {}
    for where, info in load_index(path / _INDEX).storage_data.items():
        parts.setdefault(path / info.relative_path, []).append((where.fqn, info.offset, info.length))
    return {file: sorted(pieces, key=lambda piece: piece[1]) for file, pieces in parts.items()}


def write_sharded(content: dict[str, Any], path: Path) -> None:
    """Write a full checkpoint as FSDP2's folder; a name without content until it is whole.

    Raises:
        CheckpointError: if the checkpoint does not name the parameters of its optimizer.
    """
    state: dict[str, Any] = {"state_dict": dict(content["state_dict"])}
    state |= {f"optimizer_{i}": named for i, named in enumerate(named_states(content, path))}
    with appearing_whole(path) as unfinished:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(state, checkpoint_id=unfinished, no_dist=True)
        rest = {key: value for key, value in content.items() if key not in ("state_dict", "optimizer_states")}
        save_whole(rest, unfinished / _META)


def _checked(path: Path) -> tuple[Any, dict[str, Any]]:
    """The index, and the entries that are no tensors: torch would unpickle both."""
    for name in (_INDEX, _META):
        if not (path / name).is_file():
            raise CheckpointError(f"{path} has no {name}: its save was not finished")
    index = load_index(path / _INDEX)
    plain = {}
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            plain[key] = load_bytes(_stored(path, index, key), f"{key} of {path}")
    return index, plain


def _stored(path: Path, index: Any, key: str) -> bytes:
    place = next((info for where, info in index.storage_data.items() if where.fqn == key), None)
    if place is None or getattr(place, "transform_descriptors", None):
        raise CheckpointError(f"{path}: {key} is not stored as torch.distributed.checkpoint stores it by default")
    with (path / place.relative_path).open("rb") as stream:
        stream.seek(place.offset)
        return stream.read(place.length)


def _place(index: Any, key: str) -> tuple[Any, ...]:
    planned: tuple[Any, ...] = (index.planner_data or {}).get(key) or (key,)
    return planned


def _put(tree: dict[Any, Any], place: tuple[Any, ...], value: Any) -> None:
    for step in place[:-1]:
        tree = tree.setdefault(step, {})
    tree[place[-1]] = value


def _lists(tree: Any) -> Any:
    """Mappings whose keys are positions as lists again."""
    if not isinstance(tree, dict):
        return tree
    if tree and all(isinstance(key, int) for key in tree):
        return [_lists(tree[key]) for key in sorted(tree)]
    return {key: _lists(value) for key, value in tree.items()}
