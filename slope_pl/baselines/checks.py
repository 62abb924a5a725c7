"""What must hold before a baseline trains: callbacks, optimizers, and the checkpoint that is read."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from slope_pl.baselines.config import BaselineConfig
from slope_pl.baselines.layers import MaskedLinear
from slope_pl.checkpoint.mark import check_format
from slope_pl.errors import CheckpointError, ConversionError, ScheduleError


def check_strategy(strategy: Any, method: str) -> None:
    """Raise unless whole weights and their whole gradients lie on every rank, which the masks and the decay need."""
    # DeepSpeedStrategy is a DDPStrategy by inheritance, but shards.
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ScheduleError(
            f"{type(strategy).__name__} is not supported by {method}: the baselines run on a single device or under DDP. Use "
            "strategy='auto' or 'ddp'."
        )


def refuse_averaging(trainer: pl.Trainer, method: str) -> None:
    """Raise where a callback averages weights: the masks move, so an average over steps is 2:4 under none of them."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise ConversionError(
                f"{type(callback).__name__} averages weights whose mask changes from step to step, which no one mask fits: "
                f"leave it out of a run with {method}"
            )


def check_optimizers(trainer: pl.Trainer, layers: dict[str, MaskedLinear]) -> None:
    """Raise unless every weight that is to be trained, sleeping adapters included, is in an optimizer."""
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        if not layer.weight.requires_grad:
            continue
        for label in ("weight", "adapter_down", "adapter_up"):
            parameter = getattr(layer, label)
            if parameter is not None and id(parameter) not in held:
                raise ScheduleError(
                    f"{name}.{label} is in no optimizer and would never be trained. Give the optimizer all parameters of "
                    "the converted model: do not filter by requires_grad (sleeping adapters are frozen until they wake), "
                    "and make the optimizer in configure_optimizers."
                )


def check_scaling(trainer: pl.Trainer) -> None:
    """Raise where gradients are still multiplied with a loss scale when the decay is added."""
    scaled = isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None
    for optimizer in trainer.optimizers if scaled else []:
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ScheduleError(
                f"{type(optimizer).__name__}(fused=True) under precision='16-mixed' unscales gradients inside its step, after "
                "the masked decay is added: use fused=False, or precision='bf16-mixed'"
            )


def check_checkpoint(mark: dict[str, Any] | None, method: str, config: BaselineConfig, newest: int) -> list[str]:
    """Compare a run with the checkpoint that it reads.

    Args:
        mark: what the callback wrote into the checkpoint; None if nothing did.
        method: of this run.
        config: of this run.
        newest: the newest format that is understood.

    Returns:
        one line for each setting of the schedule that changed.

    Raises:
        CheckpointError: for another method's file, a format that is too new, or a setting that is fixed at conversion.
    """
    if mark is None or mark["method"] != method:
        kind = "a dense or SLoPe run" if mark is None else f"the method {mark['method']!r}"
        raise CheckpointError(
            f"the checkpoint is of {kind}, this run is {method!r}: resume with the callback that it was made with, or load "
            "its weights into the model and start anew"
        )
    check_format(mark, newest)
    notes, own = [], config.to_dict()
    for key, saved in mark["config"].items():
        if key not in own or saved == own[key]:
            continue
        if key in config.FIXED:
            raise CheckpointError(
                f"the checkpoint was made with {key}={saved!r}, this run has {key}={own[key]!r}: it is fixed at conversion. "
                "Resume with the checkpoint's value."
            )
        notes.append(f"{key}={own[key]!r} from here on; the checkpoint was made with {saved!r}.")
    return notes
