"""Where a pretrained model lies: a folder or the hub, its config.json, its weights in one file or several."""

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_TOKENIZER = ["vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
# One file or the index of several, in order of preference.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class PretrainedUnavailableError(OSError):
    """The weights could not be fetched from the hub."""


class PretrainedFilesError(FileNotFoundError):
    """A folder lacks files of a pretrained model, or there is no such folder."""


@dataclass(frozen=True)
class PretrainedFiles:
    """Where a pretrained model lies: its ``config.json`` and its weights, one file or several shards."""

    folder: Path
    config: Path
    weights: tuple[Path, ...]


def locate_pretrained(source: str | Path, cache_dir: str | Path | None = None) -> PretrainedFiles:
    """Find the files of a pretrained model.

    Args:
        source: a folder with ``config.json`` and ``model.safetensors`` (or shards with their ``.index.json``, or
            ``pytorch_model.bin``); if there is no such folder, a hub id such as ``google-bert/bert-large-uncased``.
        cache_dir: where the hub's files go; None for Hugging Face's default.

    Raises:
        PretrainedFilesError: if the folder does not exist or lacks files; names them.
        PretrainedUnavailableError: if the hub does not deliver.
    """
    folder = Path(source).expanduser()
    if folder.exists():
        return _files_in(folder)
    if _is_path(source):
        raise PretrainedFilesError(f"No such folder: {folder}. Expected one with config.json and {_WEIGHTS[0]}.")
    source = str(source)
    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json", *_TOKENIZER]
    folder = _download(source, wanted, cache_dir)
    if not any((folder / name).is_file() for name in _WEIGHTS[:2]):
        folder = _download(source, [*wanted, "pytorch_model*.bin", "pytorch_model.bin.index.json"], cache_dir)
    return _files_in(folder)


def load_model_type(source: str | Path, cache_dir: str | Path | None = None) -> str:
    """The ``model_type`` in the config.json of a folder or hub id: ``bert``, ``roberta``, ...; nothing else is fetched.

    The first releases of BERT name none, and are one.

    Raises:
        ValueError: if config.json is damaged.
        OSError: as :func:`locate_pretrained`.
    """
    folder = Path(source).expanduser()
    if folder.exists() or _is_path(source):
        file = locate_pretrained(source).config
    else:
        file = _download(str(source), ["config.json"], cache_dir) / "config.json"
    if not file.is_file():
        raise PretrainedFilesError(f"{source} has no config.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected the config of a model, an object")
    return str(content.get("model_type", "bert"))


def listing(names: tuple[str, ...] | list[str]) -> str:
    """Return the first few of ``names`` in brackets, with a space before them."""
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f" ({shown})" if names else ""


def _is_path(source: str | Path) -> bool:
    """Whether what is not there is written like a path, and so no hub id."""
    return isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def _files_in(folder: Path) -> PretrainedFiles:
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    weights = next((name for name in _WEIGHTS if name in names), None)
    missing = [] if "config.json" in names else ["config.json"]
    missing += [] if weights else [f"weights ({' or '.join(_WEIGHTS)})"]
    if missing or weights is None:
        content = f"It holds: {', '.join(names) or 'nothing'}." if folder.is_dir() else "It is not a folder."
        raise PretrainedFilesError(f"{folder} lacks {' and '.join(missing)}. {content}")
    shards: tuple[str, ...] = (weights,)
    if weights.endswith(".index.json"):
        shards = _shards_of(folder / weights)
        # An index comes from outside: it may name neither other folders nor another format than its own.
        lost = [shard for shard in shards if shard not in names or not shard.endswith(weights.split(".")[1])]
        if lost:
            raise PretrainedFilesError(f"{folder} lacks the shards {', '.join(lost)}, which its {weights} lists.")
    return PretrainedFiles(folder, folder / "config.json", tuple(folder / shard for shard in shards))


def _shards_of(index: Path) -> tuple[str, ...]:
    """The files that an index of several lists."""
    try:
        return tuple(sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PretrainedFilesError(
            f"{index} is damaged, expected an object with a weight_map of tensors and files "
            f"({type(error).__name__}: {error}). Download it again."
        ) from error


def _download(repo: str, patterns: list[str], cache_dir: str | Path | None) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, cache_dir=cache_dir))
    except Exception as error:  # the client raises its HTTP library's errors too, and changed library between versions
        raise PretrainedUnavailableError(
            f"No folder {repo!r} here, and the Hugging Face hub did not deliver a model of that name "
            f"({type(error).__name__}: {error}). Without network, download it elsewhere and pass the path of a folder "
            "with config.json and model.safetensors."
        ) from error


def read_tensors(files: PretrainedFiles) -> dict[str, Tensor]:
    """All tensors of the files of a pretrained model."""
    tensors: dict[str, Tensor] = {}
    for path in files.weights:
        try:
            if path.suffix == ".safetensors":
                tensors |= load_file(path)
            else:
                tensors |= torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:  # torch's, of a broken zip
            raise PretrainedFilesError(
                f"{path} is damaged or holds no weights ({error}). Download it again; in a git clone, run git lfs pull."
            ) from error
    return tensors


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``target`` when the block ends well and vanishes when it does not."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors lets nobody but the owner read
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
