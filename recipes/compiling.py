"""A training step for torch.compile: as one graph, or block by block where the weights are spread over ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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


def _trains_compiled(eager: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(eager, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)

    return forward
