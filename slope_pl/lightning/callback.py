"""SLoPeCallback: the method's schedule, for any ``lightning.pytorch`` Trainer and any LightningModule."""

import math
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from slope_pl.checkpoint.mark import CHECKPOINT_KEY, FORMAT_VERSION, OPTIMIZERS_KEY
from slope_pl.config import SLoPeConfig, as_config
from slope_pl.errors import ConversionError
from slope_pl.lightning import rng
from slope_pl.lightning.averaging import refuse_dense_copies, refuse_early_copies, share_masks_with_averages
from slope_pl.lightning.calibration import calibrate_masks, convert, drop_dense_layers, refuse_provisional_masks
from slope_pl.lightning.checks import (
    check_config,
    check_optimizers,
    check_ranks,
    check_strategy,
    product_dtype,
    strip_classes,
)
from slope_pl.lightning.ddp import keep_masks_at_home, rebuild_ddp
from slope_pl.lightning.deepspeed import ZeroAdapters, build_whole
from slope_pl.lightning.ending import end_groups_at_exit
from slope_pl.lightning.optimizers import optimizer_notes
from slope_pl.lightning.restore import RestoreGuard, check_counters, check_mark, check_phase
from slope_pl.lightning.restoring import record_optimizers, resume_from_any
from slope_pl.lightning.saving import save_folders_whole
from slope_pl.lightning.schedule import adapter_start_step, has_time_limit, planned_steps
from slope_pl.lightning.step_checkpoint import say_if_in_the_middle
from slope_pl.nn import (
    SparseLinear,
    backend_lines,
    gathered,
    invalidate_operands,
    sparsity_report,
    was_densified,
)

# Re-set at every step or nearly, a line each time would bury everything else on the screen.
_RARE_ENOUGH_TO_PRINT = 5


class SLoPeCallback(pl.Callback):
    """Makes the model 2:4 sparse before training and drives the method's schedule.

    * ``setup``: converts the model in place, before weights are restored and optimizers are made.
    * ``on_fit_start``: with ``mask_calibration_batches``, chooses the masks anew by activation norms, unless restored.
    * every ``backward_refresh_steps`` optimizer steps: chooses the columns of the double-pruned weights anew.
    * at ``adapter_start``: wakes the adapters, and rebuilds DDP so that their gradients are averaged.

    Steps are ``trainer.global_step``: gradient accumulation counts optimizer steps, and with manual optimization the steps
    of all optimizers add up. To the trainer's loggers it writes ``slope/backward_churn``, ``slope/forward_density``,
    ``slope/backward_density``, ``slope/adapters_awake``, ``slope/adapter_down_norm`` and ``slope/adapter_up_norm``. Put it
    before averaging callbacks, which copy the model in their own ``setup``.

    Args:
        config: what to do; default is the module's own ``slope_config`` if it has one, else ``SLoPeConfig()``. A mapping
            of the config's fields is taken as well.

    Raises:
        ScheduleError: at the start of training, if the number of steps is unknown and ``adapter_start_step`` is not set,
            or weights are missing from the optimizers.
        ConversionError: in ``setup``, see :func:`slope_pl.sparsify`.
    """

    def __init__(self, config: SLoPeConfig | None = None) -> None:
        self.config = as_config(config)
        self.resetups = 0
        self.woke_at_step: int | None = None
        self.start_step: int | None = None
        self._last_resetup_step = 0
        self._layers: dict[str, SparseLinear] = {}
        self._plan_lines: list[str] = []
        self._norms_logged_at = -1
        self._random = rng.RandomState()
        self._zero: ZeroAdapters | None = None
        self._guard: RestoreGuard | None = None

    # ------------------------------------------------------------------------------------------------ before training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Arrange the conversion; before the restore of a checkpoint, which needs the sparse layers to be there."""
        check_strategy(trainer.strategy)
        end_groups_at_exit()
        build_whole(trainer.strategy)
        self._zero = None
        if isinstance(trainer.strategy, DeepSpeedStrategy) and stage == "fit":
            self._zero = ZeroAdapters(trainer.strategy)
        resume_from_any(trainer.strategy, self._zero)
        save_folders_whole(trainer.strategy)
        if self.config is None:
            self.config = as_config(getattr(pl_module, "slope_config", None)) or SLoPeConfig()
        self._guard = RestoreGuard(trainer, pl_module, self.config)
        if stage == "fit" and trainer.global_step == 0:
            # A new run; a restored one gets its counters from the checkpoint, after this hook.
            self.resetups, self._last_resetup_step, self.woke_at_step = 0, 0, None
        if was_densified(pl_module):
            if stage == "fit":
                raise ConversionError(
                    "the model was made dense by densify(): call sparsify(model, config) to train it sparse again (awake "
                    "adapters, now part of its weights, are pruned with them), or train it without SLoPeCallback"
                )
            return
        if is_overridden("setup", pl_module):
            refuse_early_copies(trainer)
            self._convert_in_configure_model(pl_module)
            return
        if is_overridden("configure_model", pl_module):
            # Lightning calls it right after this hook, and again before each stage: by contract a second call does
            # nothing. Its contexts are entered here too, so that dtype and device come out the same. Now, and not
            # then, because averaging callbacks copy the model in their own setup.
            with (
                trainer.strategy.tensor_init_context(),
                trainer.strategy.model_sharded_context(),
                trainer.precision_plugin.module_init_context(),
            ):
                pl_module.configure_model()
        self._layers = convert(pl_module, self.config)
        refuse_dense_copies(trainer)

    def _convert_in_configure_model(self, pl_module: pl.LightningModule) -> None:
        """Let the module's ``configure_model`` end with the conversion.

        A module with a ``setup`` of its own may build layers there, after this callback's; what then comes before the
        restore of a checkpoint is ``configure_model`` alone. The instance gets a wrapped one until ``teardown``.
        """
        config, original = self._config, type(pl_module).configure_model

        def configure_model() -> None:
            original(pl_module)
            self._layers = convert(pl_module, config)

        pl_module.configure_model = configure_model  # type: ignore[method-assign]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the module its own ``configure_model`` back."""
        pl_module.__dict__.pop("configure_model", None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Likewise: after an error there is no ``teardown``."""
        pl_module.__dict__.pop("configure_model", None)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Masks by activation norms, if no checkpoint brought any; its random numbers, before the data loader draws."""
        keep_masks_at_home(trainer.strategy, self._layers.values())  # the model has just been wrapped
        calibrate_masks(trainer, pl_module, self._config)
        self._random.begin(trainer, pl_module.device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fix the schedule, check that the optimizers hold the weights, say what will happen."""
        config = self._config
        self._random.start(pl_module.device)
        refuse_provisional_masks(trainer, pl_module, config)
        for layer in self._layers.values():
            layer.note_sharding()
        check_ranks(self._layers)
        total = planned_steps(trainer, config)
        if self.woke_at_step is None and any(layer.adapters_awake for layer in self._layers.values()):
            self.woke_at_step = trainer.global_step  # woken before this callback came to the model
        check_phase(pl_module, self.woke_at_step)
        self.start_step = adapter_start_step(config, total) if self.woke_at_step is None else self.woke_at_step
        notes: list[str] = []
        if self._zero is None:
            check_optimizers(trainer, self._layers)
            if self._guard is not None:
                self._guard.check_optimizers()
            notes = optimizer_notes(trainer.optimizers, self._layers)
        else:
            self._zero.follow(awake=self.woke_at_step is not None)
        report = sparsity_report(pl_module)
        self._log(trainer, forward_density=report.forward_density, backward_density=report.backward_density)
        self._plan_lines = [
            f"SLoPe: {report.sparse_layers} linear layers are 2:4 ({self._mask_kinds()}), {report.dense_layers} stay dense; "
            f"{report.kept_parameters:,} kept values for {report.kept_parameters + report.pruned_entries:,} weights; "
            + self._plan(total),
            *notes,
        ]
        if pl_module.device.type != "cpu":  # where there is a choice
            lines = backend_lines(self._layers, pl_module.device.type, product_dtype(trainer.precision))
            self._plan_lines += [f"SLoPe: {line}." for line in lines]
        waiting = self.start_step is not None and self.woke_at_step is None
        if waiting and has_time_limit(trainer) and config.adapter_start_step is None:
            self._plan_lines.append(
                f"SLoPe: max_time may end training before the adapters wake at step {self.start_step}; "
                "adapter_start_step sets an earlier one."
            )

    def _double_pruned(self) -> list[SparseLinear]:
        """The layers whose backward mask is not the forward mask."""
        return [layer for layer in self._layers.values() if layer.config.mask != "transposable"]

    def _mask_kinds(self) -> str:
        kinds = Counter(layer.config.mask for layer in self._layers.values())
        if len(kinds) == 1:
            return f"{next(iter(kinds))} mask"
        return f"masks: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"

    def _plan(self, total: float) -> str:
        config = self._config
        if not self._double_pruned():
            refresh = "the backward mask is the forward mask, nothing to re-set"
        elif config.backward_refresh_steps is None:
            refresh = "backward masks are never re-set"
        else:
            refresh = f"backward masks re-set every {config.backward_refresh_steps} steps"
        if self.start_step is None:
            return f"{refresh}; no adapters."
        if self.woke_at_step is not None:
            return f"{refresh}; the adapters are awake."
        steps = "an unknown number" if math.isinf(total) else str(int(total))
        ranks = sorted({layer.adapter_rank for layer in self._layers.values()})
        return f"{refresh}; adapters of rank {', '.join(map(str, ranks))} wake at step {self.start_step} of {steps}."

    # ------------------------------------------------------------------------------------------------ the schedule

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Act on the first micro-batch after an optimizer step: after the update, before the next forward."""
        while self._plan_lines:  # said here, and not at the start of training, because no progress bar prints before
            pl_module.print(self._plan_lines.pop(0))
        problem = self._random.before_batch(trainer, pl_module.device, batch_idx)
        if problem is not None:
            pl_module.print(f"SLoPe: {problem}; random numbers (dropout) differ from the uninterrupted run's.")
        step = trainer.global_step
        if self._due_for_resetup(step):
            self._reset_backward_masks(trainer, pl_module, step)
        if self.start_step is not None and self.woke_at_step is None and step >= self.start_step:
            self._wake(trainer, pl_module, step)
        elif self.woke_at_step is not None and self._norms_are_due(trainer, step):
            self._log_adapter_norms(trainer)

    def _norms_are_due(self, trainer: pl.Trainer, step: int) -> bool:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and step % every == 0 and step != self._norms_logged_at

    def _due_for_resetup(self, step: int) -> bool:
        every = self._config.backward_refresh_steps
        if every is None:
            return False
        # Not step % every: with several optimizers global_step moves by more than one, and would jump over the mark.
        return step // every > self._last_resetup_step // every and bool(self._double_pruned())

    def _reset_backward_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        check_ranks(self._layers, step)
        churn = torch.stack([layer.refresh_backward_mask() for layer in self._double_pruned()]).mean().item()
        self.resetups += 1
        self._last_resetup_step = step
        self._log(trainer, backward_churn=churn)
        every = self._config.backward_refresh_steps or 0
        rare = every >= _RARE_ENOUGH_TO_PRINT
        if rare or self.resetups == 1:
            note = "" if rare else " (the logger has the further ones)"
            pl_module.print(f"SLoPe: step {step}: backward masks re-set, {churn:.2%} of their entries changed{note}.")

    def _wake(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        check_ranks(self._layers, step)  # now, because wrapping makes them alike
        woke = sum(layer.wake_adapters() for layer in self._layers.values())
        self.woke_at_step = step
        rebuild_ddp(trainer.strategy)
        keep_masks_at_home(trainer.strategy, self._layers.values())
        if self._zero is not None:
            self._zero.woke()
        self._log(trainer, adapters_awake=1.0)
        self._log_adapter_norms(trainer)
        pl_module.print(f"SLoPe: step {step}: adapters of {woke} layers are awake.")

    # ------------------------------------------------------------------------------------------------ around training

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an averaging callback that stands before this one; the hooks below serve one that stands after."""
        self._random.after_batch(pl_module.device)
        share_masks_with_averages(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Likewise, for averages that move once an epoch."""
        share_masks_with_averages(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before an averaging callback swaps its weights in."""
        share_masks_with_averages(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An averaging callback has swapped the weights back, through ``.data``, which no version counter sees."""
        self._random.after_validation(pl_module.device)
        invalidate_operands()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before an averaging callback copies its weights over; says so if the adapters never woke."""
        share_masks_with_averages(trainer, pl_module)
        if self.start_step is not None and self.woke_at_step is None:
            pl_module.print(
                f"SLoPe: training ended at step {trainer.global_step}, before the adapters' step {self.start_step}: they "
                "never woke, the result is the sparse model without them."
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark the file as a sparse model's, with all that is needed to rebuild it."""
        if not self._layers:
            return
        from slope_pl import __version__

        say_if_in_the_middle(trainer)
        strip_classes(checkpoint, pl_module.CHECKPOINT_HYPER_PARAMS_KEY)
        share_masks_with_averages(trainer, pl_module)
        if self._zero is not None:
            checkpoint[OPTIMIZERS_KEY] = [self._zero.record()]
        record_optimizers(trainer, pl_module, checkpoint)
        checkpoint[CHECKPOINT_KEY] = {
            "format": FORMAT_VERSION,
            "version": __version__,
            "config": self._config.to_dict(),
            "layers": list(self._layers),
            "rng": rng.collect(pl_module.device),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare the run's config with the checkpoint's: the schedule may change, what the masks are may not."""
        mark = checkpoint.get(CHECKPOINT_KEY)
        if mark is not None:
            check_mark(mark)
            drop_dense_layers(pl_module)
            for note in check_config(mark, self._config):
                pl_module.print(note)
            self._random.load(mark.get("rng"))
            self._random.begin(trainer, pl_module.device)  # of strategies that restore after on_fit_start

    def state_dict(self) -> dict[str, Any]:
        """Counters of the schedule; the adapters' phase lives in the model's own state."""
        return {
            "resetups": self.resetups,
            "last_resetup_step": self._last_resetup_step,
            "woke_at_step": self.woke_at_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the saved schedule."""
        check_counters(state_dict, ("resetups", "last_resetup_step"), optional=("woke_at_step",))
        self.resetups = state_dict["resetups"]
        self._last_resetup_step = state_dict["last_resetup_step"]
        self.woke_at_step = state_dict["woke_at_step"]

    # ------------------------------------------------------------------------------------------------ helpers

    @property
    def _config(self) -> SLoPeConfig:
        assert self.config is not None, "setup() sets it"
        return self.config

    def _log(self, trainer: pl.Trainer, **metrics: float) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"slope/{name}": value for name, value in metrics.items()}, step=trainer.global_step)

    def _log_adapter_norms(self, trainer: pl.Trainer) -> None:
        def norm(tensors: list[nn.Parameter | None]) -> float:
            with gathered([t for t in tensors if t is not None]) as whole:
                return torch.stack([t.float().norm() for t in whole]).norm().item()

        self._norms_logged_at = trainer.global_step
        layers = self._layers.values()
        self._log(
            trainer,
            adapter_down_norm=norm([layer.adapter_down for layer in layers]),
            adapter_up_norm=norm([layer.adapter_up for layer in layers]),
        )
