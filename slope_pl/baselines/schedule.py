"""When a baseline's last phase begins, counted in optimizer steps."""

import math

import lightning.pytorch as pl

from slope_pl.config import SLoPeConfig
from slope_pl.errors import ScheduleError
from slope_pl.lightning.schedule import planned_steps


def total_steps(trainer: pl.Trainer, marked_by_fraction: str | None) -> float:
    """Optimizer steps that the trainer plans; infinite where it cannot know. May load the training data.

    Args:
        trainer: in training.
        marked_by_fraction: the setting that needs the number, if one does.

    Raises:
        ScheduleError: if several optimizers, stepped by hand, make a fraction of the steps meaningless.
    """
    by_hand = not trainer.lightning_module.automatic_optimization and len(trainer.optimizers) > 1
    if by_hand and marked_by_fraction and trainer.max_steps == -1:
        raise ScheduleError(
            f"{len(trainer.optimizers)} optimizers with manual optimization: nobody knows how often each one steps, so "
            f"{marked_by_fraction} is no mark. Set the step instead of the fraction, or max_steps on the Trainer."
        )
    # SLoPe's count; the config matters to its adapters alone, of which the default one has none.
    return planned_steps(trainer, SLoPeConfig())


def start_of_the_last(total: float, fraction: tuple[str, float], step: tuple[str, int | None], what: str) -> int:
    """The number of optimizer steps completed when the last phase begins, at least one before the end.

    Args:
        total: planned steps; infinite where nobody knows.
        fraction: name and value of the setting that gives the phase's share of all steps.
        step: name and value of the setting that gives its first step; its value None leaves it to the fraction.
        what: what happens then, for the messages.

    Raises:
        ScheduleError: if the fraction has no total to refer to, or the step lies at or past the end.
    """
    if step[1] is not None:
        if step[1] >= total:
            raise ScheduleError(
                f"{step[0]}={step[1]}, but training ends after {int(total)} steps: {what} would never happen. Choose an "
                "earlier step."
            )
        return step[1]
    if math.isinf(total):
        raise ScheduleError(
            f"{what} happens for the last {fraction[1]:.1%} of the steps ({fraction[0]}), but the number of steps is unknown "
            f"(max_time alone, or an endless data set). Set max_steps on the Trainer, or {step[0]}."
        )
    return int(total) - max(1, round(total * fraction[1]))
