"""When things happen, counted in optimizer steps."""

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer

from slope_pl.config import SLoPeConfig
from slope_pl.errors import ScheduleError


def adapter_start_step(config: SLoPeConfig, total_steps: float) -> int | None:
    """The optimizer step before which the adapters wake (paper: the last 1 % of iterations).

    Args:
        config: ``adapter_start_step``, or ``adapter_start`` as a fraction of all steps.
        total_steps: planned optimizer steps; infinite or negative where nobody knows.

    Returns:
        number of steps completed at the wake, at least one before the end; None without adapters.

    Raises:
        ScheduleError: if the fraction has no total to refer to, or the step lies at or past the end.
    """
    if not config.has_adapters:
        return None
    known = 0 < total_steps < math.inf
    if config.adapter_start_step is not None:
        if known and config.adapter_start_step >= total_steps:
            raise ScheduleError(
                f"adapter_start_step={config.adapter_start_step}, but training ends after {int(total_steps)} steps: the "
                "adapters would never wake. Choose an earlier step, or drop the adapters."
            )
        return config.adapter_start_step
    if not known:
        raise ScheduleError(
            f"the adapters wake after {config.adapter_start:.0%} of the steps, but the number of steps is unknown (max_time "
            "alone, or an endless data set). Set max_steps on the Trainer, or adapter_start_step in SLoPeConfig."
        )
    return int(total_steps) - max(1, round(total_steps * (1 - config.adapter_start)))


def planned_steps(trainer: pl.Trainer, config: SLoPeConfig) -> float:
    """Optimizer steps that the trainer plans; infinite where it cannot know. May load the training data.

    Raises:
        ScheduleError: if several optimizers, stepped by hand, make a fraction of the steps meaningless.
    """
    by_hand = not trainer.lightning_module.automatic_optimization and len(trainer.optimizers) > 1
    if by_hand and config.has_adapters and config.adapter_start_step is None and trainer.max_steps == -1:
        raise ScheduleError(
            f"{len(trainer.optimizers)} optimizers with manual optimization: nobody knows how often each one steps, so "
            f"{config.adapter_start:.0%} of the steps is no mark. Set adapter_start_step in SLoPeConfig (steps of all "
            "optimizers add up), or max_steps on the Trainer."
        )
    total = trainer.max_steps if by_hand and trainer.max_steps > 0 else trainer.estimated_stepping_batches
    return total if total > 0 else math.inf


def has_time_limit(trainer: pl.Trainer) -> bool:
    """Whether ``max_time`` may end training before the planned steps are done."""
    return any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
