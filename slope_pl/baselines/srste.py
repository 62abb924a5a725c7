"""Extended SR-STE, the baseline of SLoPe's GPT2 tables (SLoPe, appendix B.12, after Zhou et al., arXiv 2102.04010)."""

from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import nn

from slope_pl.baselines.callback import BaselineCallback
from slope_pl.baselines.config import SRSTEConfig
from slope_pl.baselines.schedule import start_of_the_last, total_steps
from slope_pl.lightning.ddp import rebuild_ddp


class SRSTECallback(BaselineCallback[SRSTEConfig]):
    """Trains a model by Extended SR-STE; plugs into any Trainer as :class:`slope_pl.SLoPeCallback` does.

    ``y = x (mask * W)^T + b`` with the mask of the two largest of every four, chosen anew at every optimizer step; the
    gradient passes straight through to all of the dense W, plus ``decay (1 - mask) W``; the input gradient goes through the
    double-pruned weight; low-rank adapters wake for the last 1 % of the steps. The layers are those that SLoPe would make
    sparse. A simulation: everything is dense, no speed-up is claimed.

    The decay is added **before** clipping, because in SR-STE it is part of the gradient that autograd returns; but here
    once a step, however many micro-batches accumulate. Under ``bf16-true`` the sum is rounded to bfloat16, which swallows a
    decay much smaller than the gradient: train with ``bf16-mixed``.

    It logs ``srste/flip_rate``, ``srste/adapters_awake``, ``srste/adapter_down_norm`` and ``srste/adapter_up_norm``.

    Args:
        config: what to do; a mapping of the config's fields is taken as well.

    Raises:
        ConfigError: for an unknown or wrong setting.
        ConversionError: in ``setup``, see :func:`slope_pl.baselines.mask_layers`.
        ScheduleError: at the start of training, if the number of steps is unknown and ``adapter_start_step`` is not set, or
            weights are missing from the optimizers.
        CheckpointError: if a run resumes from another method's checkpoint, or with other layers.
    """

    title: ClassVar[str] = "Extended SR-STE"
    prefix: ClassVar[str] = "srste"
    config_class = SRSTEConfig
    decay_after_clipping: ClassVar[bool] = False

    def __init__(self, config: SRSTEConfig | None = None) -> None:
        super().__init__(config)
        self._norms_logged_at = -1

    def plan(self, trainer: pl.Trainer) -> int | None:
        """The wake's step; None without adapters."""
        config = self.config
        if not config.selection().has_adapters:
            return None
        total = total_steps(trainer, "adapter_fraction" if config.adapter_start_step is None else None)
        return start_of_the_last(
            total,
            ("adapter_fraction", config.adapter_fraction),
            ("adapter_start_step", config.adapter_start_step),
            "the adapters' wake",
        )

    def plan_line(self) -> str:
        """Whether and when adapters wake."""
        if self.switch_step is None:
            return "no adapters"
        if self.switched_at_step is not None:
            return "the adapters are awake"
        ranks = sorted({layer.adapter_rank for layer in self._layers.values()})
        return f"the wake of the adapters of rank {', '.join(map(str, ranks))} at step {self.switch_step}"

    def switched(self) -> bool:
        """Whether adapters are awake."""
        return any(layer.adapters_awake for layer in self._layers.values())

    def switch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wake the adapters, and rebuild DDP so that their gradients are averaged."""
        woke = sum(layer.wake_adapters() for layer in self._layers.values())
        rebuild_ddp(trainer.strategy)
        self.log_metrics(trainer, adapters_awake=1.0)
        pl_module.print(f"{self.title}: step {trainer.global_step}: adapters of {woke} layers are awake.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """As the base class; logs the adapters' norms."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        due = self.switched_at_step is not None and self.logs_now(trainer)
        if due and trainer.loggers and trainer.global_step != self._norms_logged_at:
            self._norms_logged_at = trainer.global_step
            layers = self._layers.values()
            self.log_metrics(
                trainer,
                adapter_down_norm=_norm([layer.adapter_down for layer in layers]),
                adapter_up_norm=_norm([layer.adapter_up for layer in layers]),
            )


def _norm(tensors: list[nn.Parameter | None]) -> float:
    norms = [t.detach().float().norm() for t in tensors if t is not None]
    return torch.stack(norms).norm().item()
