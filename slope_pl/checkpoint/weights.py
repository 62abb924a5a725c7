"""Weights alone as safetensors: half-size values, indices, adapters, and the config; no pickle in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slope_pl.checkpoint.files import appearing_whole
from slope_pl.checkpoint.mark import CHECKPOINT_KEY, FORMAT_VERSION, check_format
from slope_pl.config import SLoPeConfig
from slope_pl.errors import CheckpointError
from slope_pl.nn import sparse_layers


def save_weights(model: nn.Module, path: str | Path) -> Path:
    """Write the weights of a model, sparse or dense, with the config that it was made sparse by.

    Args:
        model: not sharded.
        path: of the file; one that is there is replaced when the new one is whole.
    """
    from slope_pl import __version__

    layers = sparse_layers(model)
    mark = None
    if layers:
        config = next(iter(layers.values())).config.to_dict()
        mark = {"format": FORMAT_VERSION, "version": __version__, "config": config, "layers": list(layers)}
    return write_weights(model.state_dict(), mark, path)


def write_weights(state: Mapping[str, Any], mark: Mapping[str, Any] | None, path: str | Path) -> Path:
    """Write a state dict; ``mark`` is what a checkpoint of this package has under its key, None of a dense one."""
    final = Path(path)
    metadata = {"format": "pt"}
    if mark is not None:
        metadata[CHECKPOINT_KEY] = json.dumps({key: mark[key] for key in ("format", "version", "config", "layers")})
    # A copy of each: safetensors refuses tensors that are views into a common storage, or not contiguous.
    tensors = {k: t.detach().cpu().contiguous().clone() for k, t in state.items() if isinstance(t, Tensor)}
    with appearing_whole(final) as unfinished:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file(tensors, unfinished, metadata=metadata)
        unfinished.chmod(mode)  # safetensors lets nobody but the owner read
    return final


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file, and its mark: None if it is of a dense model.

    Raises:
        CheckpointError: if it is missing or damaged, or a newer version of this package wrote it.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no such file; expected one that save_weights or `convert --to safetensors` wrote"
        )
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no mapping)
        mark = json.loads(metadata[CHECKPOINT_KEY]) if CHECKPOINT_KEY in metadata else None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error
    if mark is not None:
        check_format(mark)
    return tensors, mark


def weights_config(path: str | Path) -> SLoPeConfig | None:
    """How the model of a file was made sparse; None if it is dense."""
    _, mark = read_weights(path)
    return None if mark is None else SLoPeConfig.from_dict(mark["config"])


def load_weights(model: nn.Module, path: str | Path, prefix: str = "") -> None:
    """Load a file into a model of the same kind: dense, or made sparse with :func:`weights_config` of the file.

    Args:
        model: changed in place; masks, adapters and their phase are the file's afterwards.
        path: the file.
        prefix: of the model's names in the file: ``"net."`` for the ``net`` of the LightningModule that was saved.

    Raises:
        CheckpointError: if the file is damaged, newer, of another model, or of the other kind.
    """
    tensors, mark = read_weights(path)
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    theirs = {name.removeprefix(prefix) for name in (mark or {}).get("layers", []) if name.startswith(prefix)}
    layers = set(sparse_layers(model))
    if theirs != layers:
        raise CheckpointError(
            f"{path} has {len(theirs)} sparse layers, this {type(model).__name__} {len(layers)}; they differ in "
            f"{', '.join(sorted(theirs ^ layers)[:3])}: make it sparse before, sparsify(model, weights_config(path), "
            "masks_follow=True)"
        )
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is of another model than this {type(model).__name__}: {error}") from error
