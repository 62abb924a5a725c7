"""A training step for torch.compile: as one graph, or block by block where the weights are spread over ranks."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slope_pl.lightning.deepspeed import torchs_own_linear
from slope_pl.lightning.sharding import blocks
from slope_pl.nn.sharding import is_sharded

_MARK = "_eager_forward"


def is_spread(net: nn.Module) -> bool:
    """Whether weights are spread over ranks (FSDP2, ZeRO-3) and gathered by hooks around each block."""
    return any(is_sharded(parameter) for parameter in net.parameters())


def compile_blocks(net: nn.Module) -> int:
    """Compile the forward pass of each block, the hooks around it left out: a graph of the whole net would break at each.

    Without gradients (validation, generation, with batches of other sizes) a block runs as it is. A second call finds
    nothing to do; :func:`release_blocks` undoes it, before the net is copied, say.

    Returns:
        how many blocks were compiled.
    """
    found = [block for _, block in blocks(net) if _MARK not in vars(block)]
    for block in found:
        setattr(block, _MARK, block.forward)
        block.forward = _trains_compiled(block.forward)
    return len(found)


def release_blocks(net: nn.Module) -> None:
    """Give every block its own forward pass back."""
    for _, block in blocks(net):
        if _MARK in vars(block):
            del block.forward, vars(block)[_MARK]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a part of a step under any strategy, for batches of one size."""
    inner = torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _torchs_own_linear():
            return inner(*args, **kwargs)

    return call


@contextmanager
def _torchs_own_linear() -> Iterator[None]:
    """Take DeepSpeed's ``F.linear`` out for a while; it replaces torch's in the whole process once ZeRO-3 was started.

    It adds the bias in place inside an autograd function. Of that torch.compile makes zeros in place of the gradients of
    input, weight and bias, without a word (seen with torch 2.11.0, no longer with 2.13.0). What DeepSpeed's is there for,
    not to hold on to a gathered weight, compiled functions do by themselves: they keep the parameter and derive the rest.
    """
    own = torchs_own_linear()
    found = F.linear
    if own is None or found is own:
        yield
        return
    F.linear = own
    try:
        yield
    finally:
        F.linear = found


def _trains_compiled(eager: Callable[..., Any]) -> Callable[..., Any]:
    trained = compiled(eager)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (trained if torch.is_grad_enabled() else eager)(*args, **kwargs)

    return forward
