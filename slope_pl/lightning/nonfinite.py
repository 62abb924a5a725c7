"""A loss that is nan or infinite: found before it is in a checkpoint, on whichever rank it is."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from slope_pl.errors import ConfigError, NonFiniteError
from slope_pl.lightning.agreement import Agreement

log = logging.getLogger(__name__)

_MOST_IDS = 16


@dataclass
class _Step:
    """What a rank knows of an optimizer step: a finite largest gradient and finite losses, or not."""

    step: int
    epoch: int
    batches: list[int] = field(default_factory=list)
    ids: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    gradient: Tensor | None = None
    flag: Tensor | None = None
    """int32 on the CPU, 1 if something is not finite; valid once ``ready`` is."""
    ready: Any = None

    def is_known(self) -> bool:
        """Whether the flag has come from the device."""
        return self.ready is None or bool(self.ready.query())

    def is_bad(self) -> bool:
        """Waits for the device, if need be."""
        if self.flag is None:
            return False
        if self.ready is not None:
            self.ready.synchronize()
        return bool(self.flag)


class NonFiniteLoss(pl.Callback):
    """Stops, or leaves out the step, where a loss or a gradient is nan or infinite on any rank.

    * ``stop``: an error names optimizer step, epoch, ranks, batches and, where the batch has them, the ids of its data (its
      entries named ``*_index`` or ``*ids`` with one number a row). Nothing that such a step has touched is saved: a save looks
      first. The newest checkpoint is the last good one. Flags are fetched without waiting, so that the error may come a few
      steps late; it names the first.
    * ``skip``: the optimizer does not step, on any rank: weights, moments and masks stay, the schedule of the rate goes on.
      ``patience`` steps in a row may be left out, then it stops.

    Accumulated micro-batches count as one step. Gradients are looked at after they are averaged and before they are clipped.
    Under a gradient scaler (``16-mixed``) an infinite gradient is no error, the scaler lowers its scale and leaves the step
    out; then the loss alone counts. Under DeepSpeed, which keeps the gradients to itself, likewise.

    Cost of ``stop``: the largest gradient of each step, for which all gradients are read once more, and one small integer
    between the ranks over the CPU; nothing waits for the device (not timed on a GPU yet). With ``skip``, the host waits for
    the device and the ranks for each other once an optimizer step.

    Args:
        policy: what to do.
        patience: with ``skip``, how many steps in a row may be left out; 10 by default.

    Raises:
        ConfigError: if a setting is out of range or has no effect, or ``skip`` is asked for under DeepSpeed.
        NonFiniteError: from ``fit``, on all ranks.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop", patience: int | None = None) -> None:
        if policy not in ("stop", "skip"):
            raise ConfigError(f"policy={policy!r} is unknown; choose one of stop, skip")
        if patience is not None and policy == "stop":
            raise ConfigError(f"patience={patience} has no effect with policy='stop'; leave it out, or skip steps")
        if patience is not None and (isinstance(patience, bool) or not isinstance(patience, int) or patience < 0):
            raise ConfigError(f"patience={patience!r}: an integer of at least 0 is expected")
        self.policy = policy
        self.patience = 10 if patience is None else patience
        self.skipped = 0
        """Steps left out so far, resumed runs included."""
        self._in_a_row = 0
        self._left_out = False
        self._agreement = Agreement()
        self._now: _Step | None = None
        self._steps: list[_Step] = []
        """Finished ones that are bad, or not known yet."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be done."""
        if self.policy == "skip" and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ConfigError(
                "policy='skip' under DeepSpeed: its engine steps by itself, and leaves out overflowing steps under fp16 alone. "
                "Use policy='stop'"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A fit begins."""
        self._agreement.begin()
        self._now, self._in_a_row, self._left_out = None, 0, False
        self._steps = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which data the step sees."""
        if self._now is None:
            self._now = _Step(trainer.global_step, trainer.current_epoch)
        self._now.batches.append(batch_idx)
        self._now.ids.append(_ids(batch))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss, where it is."""
        if self._now is not None:
            self._now.losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the gradients, unscaled and averaged."""
        now = self._now
        if now is None or trainer.fit_loop._should_accumulate():  # DeepSpeed comes here with every micro-batch
            return
        if _scaler(trainer) is None:
            gradients = [
                _local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            if gradients:
                largest = get_total_norm(gradients, norm_type=math.inf)
                now.gradient = largest if now.gradient is None else torch.maximum(now.gradient, largest)
        _raise_flag(now)
        if self.policy == "skip" and self._agreement.settle(int(now.is_bad())):
            self._leave_out(trainer, now, optimizer)

    def _leave_out(self, trainer: pl.Trainer, now: _Step, optimizer: Optimizer) -> None:
        if self._in_a_row == self.patience:
            self._fail(
                trainer, f"{self.patience} steps in a row were left out before this one, and patience is at its end"
            )
        self._in_a_row += 1
        self.skipped += 1
        self._left_out = True
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if trainer.is_global_zero:
            log.warning("step %d: the loss or a gradient is not finite; the step is left out", now.step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: what the one before it was."""
        now = self._now
        if now is None or trainer.global_step == now.step:
            return
        self._now = None
        if self.policy == "stop":
            # Asked once: a flag may come at any moment, and one that comes in between would count as bad.
            asked = [(step, step.is_known()) for step in [*self._steps, now]]
            self._steps = [step for step, known in asked if not known or step.is_bad()]
            if self._agreement.exchange(int(any(known and step.is_bad() for step, known in asked))):
                self._fail(trainer)
        elif not self._left_out:
            self._in_a_row = 0
        else:
            self._left_out = False
            for logger in trainer.loggers:
                logger.log_metrics({"train/skipped_steps": self.skipped}, step=trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nothing bad is saved; all ranks come here."""
        if self._agreement.settle(int(any(step.is_bad() for step in self._steps))):
            self._fail(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last steps."""
        if self._agreement.settle(int(any(step.is_bad() for step in self._steps))):
            self._fail(trainer)
        self._steps = []
        self._agreement.end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Without waiting for ranks that may be gone. Flags stay: what others save on the way out is looked at, too."""
        self._agreement.drop()

    def state_dict(self) -> dict[str, Any]:
        """The count goes on after a resume."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""
        self.skipped = state_dict["skipped"]

    def _fail(self, trainer: pl.Trainer, why: str | None = None) -> None:
        """Raise on all ranks, with what each one saw in the first bad step."""
        steps = [*self._steps, *([self._now] if self._now is not None else [])]
        own = next((step for step in steps if step.is_bad()), None)
        seen = self._agreement.gather(None if own is None else (own.step, own.epoch, _describe(trainer, own)))
        first, epoch = min((found[0], found[1]) for found in seen if found is not None)
        lines = [
            f"rank {rank}: {found[2]}" for rank, found in enumerate(seen) if found is not None and found[0] == first
        ]
        # What is common to all ranks once gradients are averaged says little beside a rank whose own loss is bad.
        culprits = [line for line in lines if "loss" in line] or lines
        raise NonFiniteError(
            f"optimizer step {first} (epoch {epoch}) is not finite. {'; '.join(culprits)}. "
            + (f"{why}. " if why else "")
            + "Nothing of it is saved: go on from the newest checkpoint (fit --resume auto) with a lower rate or other data, "
            "look at the named batch, or leave such steps out with NonFiniteLoss(policy='skip')"
        )


def _ids(batch: Any) -> dict[str, Tensor]:
    """One number a row that says which data it is."""
    if not isinstance(batch, Mapping):
        return {}
    return {
        key: value
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.dim() == 1 and str(key).endswith(("_index", "ids", "_id"))
    }


def _local(gradient: Tensor) -> Tensor:
    """This rank's part of a sharded one."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _scaler(trainer: pl.Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _raise_flag(step: _Step) -> None:
    """Set ``flag`` and begin to fetch it."""
    looked_at = [loss.float().sum() for loss in step.losses]
    if step.gradient is not None:
        looked_at.append(step.gradient.float())
    if not looked_at:
        return
    bad = (~torch.isfinite(torch.stack(looked_at))).any().to(torch.int32)
    if bad.device.type != "cuda":
        step.flag = bad.cpu()
        return
    step.flag = torch.empty((), dtype=torch.int32, pin_memory=True).copy_(bad, non_blocking=True)
    step.ready = torch.cuda.Event()
    step.ready.record()


def _describe(trainer: pl.Trainer, step: _Step) -> str:
    scaler = _scaler(trainer)
    scale = (1.0 if scaler is None else float(scaler.get_scale())) / trainer.accumulate_grad_batches
    bad = [i for i, loss in enumerate(step.losses) if not torch.isfinite(loss).all()]
    parts = []
    for i in bad:
        ids = ", ".join(f"{key} {_shown(value)}" for key, value in step.ids[i].items())
        parts.append(
            f"loss {step.losses[i].float().sum().item()} in batch {step.batches[i]}" + (f" ({ids})" if ids else "")
        )
    if not parts:
        losses = ", ".join(f"{loss.float().sum().item() / scale:.4g}" for loss in step.losses)
        kind = "nan" if step.gradient is not None and bool(torch.isnan(step.gradient)) else "inf"
        parts.append(
            f"a gradient is {kind} in batches {step.batches[0]} to {step.batches[-1]}, whose values are {losses}"
        )
    return ", ".join(parts)


def _shown(ids: Tensor) -> str:
    numbers = ids.flatten().tolist()
    return ", ".join(map(str, numbers[:_MOST_IDS])) + (", ..." if len(numbers) > _MOST_IDS else "")
