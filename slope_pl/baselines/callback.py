"""What the two baselines share as callbacks: conversion, masks, masked decay, the switch to the last phase, resume."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from slope_pl.baselines.checks import (
    check_checkpoint,
    check_optimizers,
    check_scaling,
    check_strategy,
    refuse_averaging,
)
from slope_pl.baselines.config import BaselineConfig, FSTConfig, SRSTEConfig
from slope_pl.baselines.layers import MaskedLinear
from slope_pl.baselines.surgery import mask_layers
from slope_pl.checkpoint.mark import BASELINE_FORMAT_VERSION, BASELINE_KEY
from slope_pl.errors import ConversionError
from slope_pl.lightning import rng
from slope_pl.lightning.checks import strip_classes
from slope_pl.lightning.ending import end_groups_at_exit
from slope_pl.lightning.restoring import record_optimizers
from slope_pl.nn import was_densified

# Refreshed more often than this, the flip rate is logged only when the trainer logs, since reading it waits for the GPU.
_RARE_ENOUGH_TO_LOG = 5

Config = TypeVar("Config", SRSTEConfig, FSTConfig)


class BaselineCallback(pl.Callback, Generic[Config], ABC):
    """Base of :class:`SRSTECallback` and :class:`FSTCallback`; not for use by itself.

    * ``setup``: converts the model in place, before weights are restored and optimizers are made.
    * before each optimizer step: adds ``decay (1 - mask) W`` to the gradients, once however many were accumulated.
    * at the end of the batch that completes every ``mask_refresh_steps``-th step: chooses the masks anew, so that
      validation and checkpoints see the masks of the weights that they see.
    * before the batch at the mark: the last phase (adapters, or dense training).

    Steps are ``trainer.global_step``, as in :class:`slope_pl.SLoPeCallback`.
    """

    title: ClassVar[str]
    prefix: ClassVar[str]
    config_class: ClassVar[type[SRSTEConfig] | type[FSTConfig]]
    decay_after_clipping: ClassVar[bool]

    config: Config

    def __init__(self, config: Config | Mapping[str, Any] | None) -> None:
        self.config = self.config_class.coerce(config)  # type: ignore[assignment]
        self.refreshes = 0
        self.micro_batches = 0
        self.switched_at_step: int | None = None
        self.switch_step: int | None = None
        self._last_refresh_step = 0
        self._layers: dict[str, MaskedLinear] = {}
        self._plan_lines: list[str] = []
        self._random = rng.RandomState()
        self._restore: list[tuple[pl.LightningModule, str, Any]] = []

    # ------------------------------------------------------------------------------------------------ for the methods

    @abstractmethod
    def plan(self, trainer: pl.Trainer) -> int | None:
        """The step at which the last phase begins, or None if there is none."""

    @abstractmethod
    def plan_line(self) -> str:
        """What the last phase is, for the line that says what will happen."""

    @abstractmethod
    def switched(self) -> bool:
        """Whether the layers, as they are, are in the last phase."""

    @abstractmethod
    def switch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the last phase."""

    # ------------------------------------------------------------------------------------------------ before training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Arrange the conversion; before the restore of a checkpoint, which needs the masked layers to be there."""
        check_strategy(trainer.strategy, type(self).__name__)
        end_groups_at_exit()
        refuse_averaging(trainer, type(self).__name__)
        if stage == "fit" and trainer.global_step == 0:
            # A new run; a restored one gets its counters from the checkpoint, after this hook.
            self.refreshes, self.micro_batches, self._last_refresh_step, self.switched_at_step = 0, 0, 0, None
        if was_densified(pl_module):
            if stage == "fit":
                raise ConversionError(
                    f"the model was made dense by unmask_layers() or densify(): train it without {type(self).__name__}, or "
                    "build it anew"
                )
            return
        if is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module):
            # Layers may be built there, after this hook; what then comes before the restore of a checkpoint is
            # configure_model. By Lightning's contract a second call of it does nothing.
            original = pl_module.configure_model

            def configure_model() -> None:
                original()
                self._layers = mask_layers(pl_module, self.config)

            self._replace_method(pl_module, "configure_model", configure_model)
            return
        self._layers = mask_layers(pl_module, self.config)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue the random numbers of a checkpoint, before the data loader draws from them."""
        self._random.begin(trainer, pl_module.device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training goes on with the random numbers that it had before."""
        self._random.after_validation(pl_module.device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fix the schedule, check the optimizers, say what will happen."""
        self._random.start(pl_module.device)
        self.switch_step = self.plan(trainer)
        if self.switched_at_step is None and self.switched():
            self.switched_at_step = trainer.global_step  # before this callback came to the model
        check_optimizers(trainer, self._layers)
        check_scaling(trainer)
        if self.decay_after_clipping and pl_module.automatic_optimization:
            self._decay_after_clipping(pl_module)
        for layer in self._layers.values():
            layer.noise_stream = trainer.global_rank
            if trainer.global_step == 0 and self.switched_at_step is None:
                layer.refresh_mask()  # weights may have been loaded or drawn anew since the conversion
        hidden = sum(layer.mask.numel() for layer in self._layers.values()) // 2
        every = self.config.mask_refresh_steps
        self._plan_lines = [
            f"{self.title}: {len(self._layers)} linear layers are masked, {hidden:,} of their weights at a time hidden "
            f"(a simulation: products, gradients and optimizer state are dense); masks chosen anew every "
            f"{f'{every} steps' if every > 1 else 'step'}, decay {self.config.decay:g}; {self.plan_line()}."
        ]

    def _decay_after_clipping(self, pl_module: pl.LightningModule) -> None:
        """Lightning has no callback hook between clipping and step: the module's own is what comes last before it."""
        clip = pl_module.configure_gradient_clipping

        def configure_gradient_clipping(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            clip(optimizer, *args, **kwargs)
            self._add_decay(optimizer)

        self._replace_method(pl_module, "configure_gradient_clipping", configure_gradient_clipping)

    def _replace_method(self, pl_module: pl.LightningModule, name: str, method: Any) -> None:
        self._restore.append((pl_module, name, pl_module.__dict__.get(name)))
        setattr(pl_module, name, method)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the module its own methods back."""
        while self._restore:
            module, name, own = self._restore.pop()
            if own is None:
                module.__dict__.pop(name, None)
            else:
                setattr(module, name, own)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Likewise: after an error there is no ``teardown``."""
        self.teardown(trainer, pl_module, "fit")

    # ------------------------------------------------------------------------------------------------ the schedule

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin the last phase on the first micro-batch after the optimizer step that reaches the mark."""
        while self._plan_lines:  # said here, and not at the start of training, because no progress bar prints before
            pl_module.print(self._plan_lines.pop(0))
        problem = self._random.before_batch(trainer, pl_module.device, batch_idx)
        if problem is not None:
            pl_module.print(f"{self.title}: {problem}; random numbers (dropout) differ from the uninterrupted run's.")
        step = trainer.global_step
        if self.switch_step is not None and self.switched_at_step is None and step >= self.switch_step:
            self.switched_at_step = step
            self.switch(trainer, pl_module)
        self.micro_batches += 1

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients are complete and unscaled here; automatic optimization clips them afterwards."""
        if not (self.decay_after_clipping and pl_module.automatic_optimization):
            self._add_decay(optimizer)

    def _add_decay(self, optimizer: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for layer in self._layers.values():
            if id(layer.weight) in held:
                layer.add_decay(self.config.decay)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Choose the masks anew where that is due."""
        self._random.after_batch(pl_module.device)
        step, every = trainer.global_step, self.config.mask_refresh_steps
        # Not step % every: with several optimizers global_step moves by more than one, and would jump over the mark.
        if step // every <= self._last_refresh_step // every or not any(x.masked for x in self._layers.values()):
            return
        flips = [layer.refresh_mask() for layer in self._layers.values()]
        self.refreshes += 1
        self._last_refresh_step = step
        if every >= _RARE_ENOUGH_TO_LOG or self.logs_now(trainer):
            self.log_metrics(trainer, flip_rate=torch.stack(flips).mean().item())

    # ------------------------------------------------------------------------------------------------ around training

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the last phase never came."""
        if self.switch_step is not None and self.switched_at_step is None:
            pl_module.print(
                f"{self.title}: training ended at step {trainer.global_step}, before step {self.switch_step}: "
                f"{self.plan_line()} did not happen."
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark the file as this method's."""
        if not self._layers:
            return
        from slope_pl import __version__

        key = pl_module.CHECKPOINT_HYPER_PARAMS_KEY
        strip_classes(checkpoint, key)
        if checkpoint.get(key):  # likewise configs of this package: the file then loads with weights_only=True
            hparams = checkpoint[key].items()
            checkpoint[key] = {k: v.to_dict() if isinstance(v, BaselineConfig) else v for k, v in hparams}
        record_optimizers(trainer, pl_module, checkpoint)
        checkpoint[BASELINE_KEY] = {
            "format": BASELINE_FORMAT_VERSION,
            "version": __version__,
            "method": self.prefix,
            "config": self.config.to_dict(),
            "layers": list(self._layers),
            "rng": rng.collect(pl_module.device),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare the run's method and config with the checkpoint's: the schedule may change, the layers may not."""
        mark = checkpoint.get(BASELINE_KEY)
        for note in check_checkpoint(mark, self.prefix, self.config, BASELINE_FORMAT_VERSION):
            pl_module.print(f"{self.title}: {note}")
        assert mark is not None, "check_checkpoint refuses a file without the mark"
        self._random.load(mark["rng"])
        self._random.begin(trainer, pl_module.device)  # of strategies that restore after on_fit_start

    def state_dict(self) -> dict[str, Any]:
        """Counters of the schedule; masks and phase live in the model's own state.

        ``micro_batches`` is all the state that the random pruning has: its numbers are a function of it, of the seed, of the
        layer's name and of the rank.
        """
        return {
            "refreshes": self.refreshes,
            "last_refresh_step": self._last_refresh_step,
            "switched_at_step": self.switched_at_step,
            "micro_batches": self.micro_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the saved schedule."""
        self.refreshes = state_dict["refreshes"]
        self._last_refresh_step = state_dict["last_refresh_step"]
        self.switched_at_step = state_dict["switched_at_step"]
        self.micro_batches = state_dict["micro_batches"]

    # ------------------------------------------------------------------------------------------------ helpers

    def logs_now(self, trainer: pl.Trainer) -> bool:
        """Whether the trainer logs at this step."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and trainer.global_step % every == 0

    def log_metrics(self, trainer: pl.Trainer, **metrics: float) -> None:
        """Write to the trainer's loggers under the method's prefix."""
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.prefix}/{k}": v for k, v in metrics.items()}, step=trainer.global_step)
