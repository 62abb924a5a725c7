"""DDP: what its wrapper sends beside gradients, and when it is made anew."""

from collections.abc import Iterable
from typing import Any

from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from slope_pl.nn import SparseLinear


def rebuild_ddp(strategy: Any) -> None:
    """Wrap the model anew: a reducer made while parameters were frozen ignores them, and ranks drift apart unseen."""
    if isinstance(strategy.model, DistributedDataParallel):
        _begin_anew(strategy._ddp_comm_state)
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


def _begin_anew(state: Any) -> None:
    """PowerSGD keeps an error and two factors for each of DDP's buckets, which are others now; it begins after its steps."""
    if isinstance(state, PowerSGDState):
        for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            kept.clear()
        state.iter = 0


def keep_masks_at_home(strategy: Any, layers: Iterable[SparseLinear]) -> None:
    """Let DDP no longer send masks, columns and phase of these layers with every forward; it goes on with other buffers.

    To be called each time that the model has been wrapped. Wrapping has just given all ranks the state of rank 0, these
    buffers with it; from here on every rank computes the same ones from the same values, which ``check_ranks`` holds them to.
    (Named to DDP before, they would be left out of that first exchange too.) Under other strategies nothing happens.

    Args:
        strategy: of the Trainer.
        layers: sparse layers of its model.
    """
    wrapped = strategy.model
    if not isinstance(wrapped, DistributedDataParallel):
        return
    own = {id(buffer) for layer in layers for buffer in (layer.indices, layer.backward_indices, layer.adapter_active)}
    buffers = wrapped.module.named_buffers(remove_duplicate=False)  # names as DDP has them, whatever lies in between
    wrapped.parameters_to_ignore |= {name for name, buffer in buffers if id(buffer) in own}
    wrapped._assign_modules_buffers()
