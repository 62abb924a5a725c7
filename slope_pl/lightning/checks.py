"""What must hold before sparse training goes on: strategy, optimizers, and the checkpoint that is read."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor

from slope_pl.checkpoint.mark import check_format
from slope_pl.config import SLoPeConfig
from slope_pl.errors import CheckpointError, ConversionError, ScheduleError
from slope_pl.nn import SparseLinear, check_drawn

# Settings that live in the weights' own state once a model is converted.
_FIXED_AT_CONVERSION = frozenset({"mask", "seed", "adapter_rank", "adapter_rank_fraction", "include", "exclude"}) | {
    "layer_masks",
    "keep_first_dense",
    "keep_heads_dense",
    "mask_calibration_batches",
}


def check_strategy(strategy: Any) -> None:
    """Raise unless the strategy is one that sparse training has been shown to be right under."""
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        raise ScheduleError(
            f"{type(strategy).__name__} is not supported: sparse training runs on a single device, under DDP, DeepSpeed and "
            "FSDP2. Use strategy='auto', 'ddp', 'slope', 'slope_ddp', 'slope_deepspeed_stage_2' or 'slope_fsdp2'."
        )
    if isinstance(strategy, DeepSpeedStrategy):
        stage = (strategy.config or {}).get("zero_optimization", {}).get("stage")
        if stage not in (1, 2, 3) or not isinstance(stage, int):
            raise ScheduleError(
                f"DeepSpeed with stage={stage!r}: ZeRO stage 1, 2 or 3 is expected; use 'slope_ddp' for none"
            )
    if isinstance(strategy, ModelParallelStrategy) and strategy._tensor_parallel_size not in ("auto", 1):
        raise ScheduleError(
            f"tensor_parallel_size={strategy._tensor_parallel_size}: sparse weights know data parallelism alone; set 1"
        )


def check_config(mark: dict[str, Any], config: SLoPeConfig) -> list[str]:
    """Compare a run's config with the one its checkpoint was made with.

    Args:
        mark: what the callback wrote into the checkpoint.
        config: of the run that reads it.

    Returns:
        one line for each setting of the schedule that changed.

    Raises:
        CheckpointError: if a setting differs that is fixed once a model is converted, or the format is too new.
    """
    check_format(mark)
    # What an older version did not write had its default.
    saved, own = SLoPeConfig().to_dict() | dict(mark["config"]), config.to_dict()
    notes = []
    for key in own:
        if saved[key] == own[key]:
            continue
        if key in _FIXED_AT_CONVERSION:
            raise CheckpointError(
                f"the checkpoint was made with {key}={saved[key]!r}, this run has {key}={own[key]!r}: masks and layers "
                "are fixed at conversion. Resume with the checkpoint's value."
            )
        notes.append(f"SLoPe: {key}={own[key]!r} from here on; the checkpoint was made with {saved[key]!r}.")
    return notes


def check_optimizers(trainer: pl.Trainer, layers: dict[str, SparseLinear]) -> None:
    """Raise unless every weight that is to be trained, sleeping adapters included, is in an optimizer."""
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        if not layer.values.requires_grad:
            continue
        for label in ("values", "adapter_down", "adapter_up"):
            parameter = getattr(layer, label)
            if parameter is not None and id(parameter) not in held:
                raise ScheduleError(
                    f"{name}.{label} is in no optimizer and would never be trained. Give the optimizer all parameters of "
                    "the converted model: do not filter by requires_grad (sleeping adapters are frozen until they wake), "
                    "and make the optimizer in configure_optimizers."
                )


def check_ranks(layers: dict[str, SparseLinear], step: int | None = None) -> None:
    """Raise unless all ranks have the same masks and phase: what is sharded or averaged would mean other entries on each.

    Args:
        layers: by name.
        step: where training is; None before its start.

    Raises:
        ConversionError: naming the first rank that differs from rank 0 and its first layer that does, or a layer that was
            built on the meta device and has no values yet.
    """
    check_drawn(layers)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    own = dict(zip(layers, torch.stack([_digest(layer) for layer in layers.values()]).tolist(), strict=True))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    for rank, theirs in enumerate(everyone):
        if theirs == everyone[0]:
            continue
        differing = [name for name in {**everyone[0], **theirs} if everyone[0].get(name) != theirs.get(name)]
        expected = (
            "all ranks have to convert the same weights. Load the same weights or set the same seed on every rank before the "
            "conversion."
            if step is None
            else f"they were alike before, and something changed them on one rank before step {step}. What trained since "
            "then is of no use: change masks on all ranks alike, and go on from an earlier checkpoint."
        )
        raise ConversionError(
            f"rank {rank} has other masks than rank 0, in {len(differing)} layers ({differing[0]}, ...): {expected}"
        )


def _digest(layer: SparseLinear) -> Tensor:
    """An int64 scalar on the layer's device, cheap enough for every re-setup.

    Each eight bytes and their place are mixed into 64 bits (the constants are splitmix64's), and those added up.
    """
    phase = layer.adapter_active.expand(8)
    words = torch.cat([layer.indices.flatten(), layer.backward_indices.flatten(), phase]).view(torch.int64)
    mixed = words + torch.arange(len(words), device=words.device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)).sum()


def strip_classes(checkpoint: dict[str, Any], hparams_key: str) -> None:
    """Turn configs among the saved hyperparameters into plain mappings: the file then loads with ``weights_only=True``."""
    hparams = checkpoint.get(hparams_key)
    if hparams:
        checkpoint[hparams_key] = {
            key: value.to_dict() if isinstance(value, SLoPeConfig) else value for key, value in hparams.items()
        }


def product_dtype(precision: str) -> torch.dtype | None:
    """Dtype of the products under a Trainer's precision; None where it is that of the parameters."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
