"""Which layers and dense weights can be 2:4 sparse at all."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from slope_pl.config import check_integer
from slope_pl.errors import ConversionError

STORABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORABLE_DTYPES)


def is_conv1d(module: Any) -> bool:
    """Whether a module is Hugging Face's ``Conv1D``, a linear layer that stores its weight ``(d_in, d_out)``."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def check_model(model: Any) -> None:
    """Raise a ConversionError unless something is a module."""
    if not isinstance(model, nn.Module):
        raise ConversionError(f"a model is an nn.Module, got a {type(model).__name__}")


def check_linear(linear: Any) -> None:
    """Raise a ConversionError unless something is a linear layer with a weight of its own."""
    if not (isinstance(linear, nn.Linear) or is_conv1d(linear)):
        raise ConversionError(
            f"a {type(linear).__name__} cannot be made sparse: an nn.Linear is expected, or a Conv1D of transformers"
        )
    weight = linear._parameters.get("weight")
    if weight is None:
        raise ConversionError(
            f"the weight of this {type(linear).__name__} is computed (pruned, normalised or otherwise re-parametrised): make "
            "it a plain parameter first, with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if isinstance(weight, UninitializedParameter):
        raise ConversionError(
            f"the weight of this {type(linear).__name__} has no shape yet: run a batch through the model to initialise it first"
        )


def check_new_layer(in_features: Any, out_features: Any, dtype: Any, seed: Any) -> None:
    """Raise unless a sparse layer can be made of these numbers: ConversionError, for the seed a ConfigError."""
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 8 or size % 8:
            raise ConversionError(f"{name}={size!r}: a positive multiple of 8 is expected")
    if dtype is not None and dtype not in STORABLE_DTYPES:
        raise ConversionError(f"dtype={dtype!r}: torch.float32 or another one of {_NAMES} is expected")
    check_integer("seed", seed, 0)


def check_rank(rank: int, d_out: int, d_in: int) -> None:
    """Raise a ConversionError where adapters would be no smaller than the weight that they are added to."""
    if rank > min(d_out, d_in):
        raise ConversionError(
            f"adapter_rank={rank} is more than the smaller side of a {d_out}x{d_in} layer, which a low rank lies below: choose "
            f"{min(d_out, d_in)} or less, set adapter_rank_fraction instead, or exclude such layers"
        )


def why_ineligible(weight: Tensor) -> str | None:
    """Why a dense weight ``(d_out, d_in)`` cannot be 2:4 sparse, or None if it can."""
    if weight.dim() != 2:
        return f"it has {weight.dim()} dimensions, 2 are expected"
    if weight.numel() == 0:
        return "it is empty (partitioned by ZeRO-3?): convert before it is sharded"
    if weight.dtype not in STORABLE_DTYPES:
        return f"its dtype is none of {_NAMES}"
    d_out, d_in = weight.shape
    if d_out % 8 or d_in % 8:
        return f"{d_out}x{d_in}: both sides must be multiples of 8"
    return None
