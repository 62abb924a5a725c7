"""Resuming from a checkpoint of another strategy, or of another number of processes.

Lightning's strategies read what they wrote themselves. Here each one reads the checkpoints of all, as the full file that a
single device would have written; and what DeepSpeed and torch.distributed would unpickle without a check is checked before.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from slope_pl.checkpoint.convert import checkpoint_kind, read_checkpoint
from slope_pl.checkpoint.mark import OPTIMIZERS_KEY, by_name, name_groups
from slope_pl.checkpoint.sharded import check_sharded, readable
from slope_pl.checkpoint.zero import check_zero, describe_zero
from slope_pl.errors import CheckpointError
from slope_pl.lightning.deepspeed import ZeroAdapters
from slope_pl.lightning.restore import check_resumable
from slope_pl.lightning.zero_restoring import restore_zero, trusted_engine


def record_optimizers(trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Name the parameters behind the numbers of the optimizers' states; DeepSpeed names them itself."""
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        checkpoint.setdefault(OPTIMIZERS_KEY, [name_groups(module, optimizer) for optimizer in trainer.optimizers])


def resume_from_any(strategy: Any, zero: ZeroAdapters | None = None) -> None:
    """Let a strategy, Lightning's or ours, resume from any kind of checkpoint: on the instance, before the restore.

    Args:
        strategy: of a single device, DDP, FSDP2 or DeepSpeed.
        zero: of a fit under DeepSpeed.
    """
    load, load_model = type(strategy).load_checkpoint, type(strategy).load_model_state_dict
    foreign = False

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        nonlocal foreign
        foreign = False
        path = strategy.broadcast(checkpoint_path)
        if urlparse(str(path)).scheme or not Path(path).exists():
            # For Lightning to read, or to complain of. By itself it runs what is pickled in a file from the web.
            return load(strategy, path, True if weights_only is None else weights_only)
        kind = checkpoint_kind(path)
        if kind == "safetensors":
            raise CheckpointError(f"{path} holds weights alone: load them with load_weights before the Trainer starts")
        if isinstance(strategy, DeepSpeedStrategy):
            foreign = not (zero is not None and kind == "deepspeed" and _is_own(strategy, Path(path)))
            if not foreign:
                with trusted_engine(strategy.deepspeed_engine):
                    return load(strategy, path, weights_only)
        elif isinstance(strategy, ModelParallelStrategy):
            foreign = kind != "sharded"
            if not foreign:
                check_sharded(Path(path))
                with readable(Path(path)):
                    return load(strategy, path, weights_only)
        elif kind == "full":
            return load(strategy, path, weights_only)
        if kind != "full":
            rank_zero_info(
                f"SLoPe: {path} is a {kind} checkpoint of another strategy or number of processes; every process reads all of "
                "it. `python -m slope_pl.checkpoint convert` makes one file of it"
            )
        return read_checkpoint(path, verify=False)  # RestoreGuard has, once for all ranks

    def load_model_state_dict(checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if not foreign:
            load_model(strategy, checkpoint, strict)
            return
        fitting = strategy.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if fitting:
            check_resumable(checkpoint)
        if isinstance(strategy, DeepSpeedStrategy):
            restore_zero(strategy, checkpoint, strict, zero.groups if fitting and zero is not None else None)
        else:
            _restore_fsdp2(strategy, checkpoint, strict, fitting)

    strategy.load_checkpoint = load_checkpoint
    strategy.load_model_state_dict = load_model_state_dict


def _is_own(strategy: DeepSpeedStrategy, path: Path) -> bool:
    folder = describe_zero(path)
    check_zero(folder)
    assert isinstance(strategy.config, dict)
    stage = strategy.config.get("zero_optimization", {}).get("stage")
    return folder.world_size == strategy.world_size and folder.stage == stage


def _restore_fsdp2(strategy: ModelParallelStrategy, checkpoint: Mapping[str, Any], strict: bool, fitting: bool) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    model = strategy.model
    assert isinstance(model, nn.Module)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
    set_model_state_dict(model, dict(checkpoint["state_dict"]), options=options)
    if fitting:
        # By the groups of this run's optimizer: Lightning would take the numbers for places among the model's parameters.
        for optimizer, state in zip(strategy.optimizers, checkpoint["optimizer_states"], strict=True):
            named = by_name(state, name_groups(model, optimizer))
            set_optimizer_state_dict(model, optimizer, named, options=options)
