"""Weights that are spread over ranks: telling them, having them whole for a moment, and building them whole."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a parameter lies in parts on several ranks: FSDP2's are DTensors, ZeRO-3's carry ``ds_id``."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def full_shape(tensor: Tensor) -> torch.Size:
    """Shape of the whole parameter; under ZeRO-3 every parameter by itself has one dimension and no entry."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def full_numel(tensor: Tensor) -> int:
    """Entries of the whole parameter, whatever part of it this rank has."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def full_bytes(tensor: Tensor) -> int:
    """Bytes of the whole parameter."""
    return full_numel(tensor) * tensor.element_size()


@contextmanager
def gathered(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The whole of each parameter, detached, for reading; every rank has to come here.

    A parameter that is not sharded is itself. Nothing that is written into a gathered one is kept.
    """
    zero: list[Any] = [p for p in parameters if hasattr(p, "ds_id")]
    if not zero:
        yield [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in parameters]
        return
    # Whoever has such parameters has imported it.
    with sys.modules["deepspeed"].zero.GatheredParameters(zero, modifier_rank=None):
        yield [p.detach() for p in parameters]


@contextmanager
def whole_in_place(parameter: Tensor) -> Iterator[None]:
    """Let a parameter of ZeRO-3 be whole where it lies, on every rank, for reading; others are as they are."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    with sys.modules["deepspeed"].zero.GatheredParameters([parameter], modifier_rank=None):
        yield


def shard_like(parameter: Any, others: Sequence[Tensor]) -> None:
    """Spread new parameters over ranks as an old one is that they take the place of: under ZeRO-3, and nothing otherwise."""
    if hasattr(parameter, "convert_to_zero_parameters"):
        parameter.convert_to_zero_parameters(param_list=list(others))


@contextmanager
def built_whole() -> Iterator[None]:
    """Build modules as on a single device, on each rank: a context, or the decorator of a constructor.

    ``deepspeed.zero.Init`` empties each module's parameters as soon as its own ``__init__`` is through; what a parent then does
    to them (draws them anew, loads weights) is lost without an error. Here that is suspended, and new tensors lie on its
    device. They stay whole until DeepSpeed's engine spreads them. Outside of ``zero.Init`` nothing happens.
    """
    zero: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    outer = None if zero is None else zero.top_level_context
    if outer is None or not outer.patched:  # or suspended by a caller
        yield
        return
    zero.shutdown_init_context()
    try:
        with torch.device(outer.local_device):
            yield
    finally:
        zero.restore_init_context()
