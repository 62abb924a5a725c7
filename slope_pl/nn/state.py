"""What a state dict must hold for a sparse layer: looked at before any of it is copied."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slope_pl.errors import CheckpointError
from slope_pl.nn.sharding import is_sharded
from slope_pl.sparsity import check_indices

_INTEGERS = ("indices", "backward_indices", "adapter_active")


def check_state(layer: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Raise unless a state dict fits a sparse layer.

    Args:
        layer: a ``SparseLinear``.
        state: of a whole model.
        prefix: of the layer's names in it, with a dot at its end.

    Names that are missing or superfluous are torch's to report: whether they are an error, ``load_state_dict`` alone knows.

    Raises:
        CheckpointError: for a dense weight, a tensor of another shape or dtype, a damaged index, or a phase that the layer
            cannot be in.
    """
    own = {name: t for name, t in (*layer._parameters.items(), *layer._buffers.items()) if t is not None}
    saved = {name: state[prefix + name] for name in own if prefix + name in state}
    if prefix + "weight" in state and "values" not in saved:
        raise CheckpointError(
            f"the checkpoint holds a dense {prefix + 'weight'!r}, but that layer is 2:4 sparse here: load dense "
            "weights before the model is made sparse, or train the dense configuration"
        )
    for name, tensor in saved.items():
        _check_tensor(prefix + name, tensor, own[name], torch.uint8 if name in _INTEGERS else None)
    for name in ("indices", "backward_indices"):
        if name in saved and saved[name].device.type != "meta":
            try:
                check_indices(saved[name], prefix + name)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
    _check_phase(prefix, saved.get("adapter_active"), "adapter_down" in own)


def _check_tensor(name: str, tensor: Any, own: Tensor, dtype: torch.dtype | None) -> None:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{name} is a {type(tensor).__name__} in the checkpoint, a tensor is expected: it is damaged"
        )
    if not is_sharded(own) and tensor.shape != own.shape:
        hint = "adapter_rank is another" if "adapter_" in name else "the layer has another size, or the file is damaged"
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)} in the checkpoint and {tuple(own.shape)} in this model: {hint}"
        )
    if dtype is None and not tensor.is_floating_point():
        raise CheckpointError(
            f"{name}: dtype {tensor.dtype}, expected floating-point numbers: the checkpoint is damaged"
        )
    if dtype is not None and tensor.dtype != dtype:
        raise CheckpointError(f"{name}: dtype {tensor.dtype}, expected {dtype}: the checkpoint is damaged")


def _check_phase(prefix: str, active: Tensor | None, has_adapters: bool) -> None:
    if active is None or active.device.type == "meta":
        return
    phase = int(active)
    if phase not in (0, 1):
        raise CheckpointError(f"{prefix}adapter_active is {phase}, 0 or 1 is expected: the checkpoint is damaged")
    if phase and not has_adapters:
        raise CheckpointError(
            f"{prefix}adapter_active is 1, but this layer has no adapters: set adapter_rank to that of the checkpoint's run"
        )
