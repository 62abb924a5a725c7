"""What a BERT pretraining run measures of itself, and the table at its end."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from recipes.meter import Meter
from recipes.results import RunTable, collect, loss_table, meter_of
from slope_pl import sparsity_report


class PretrainMeter(Meter):
    """A token is a position of the input, padding included, as in published counts."""

    def tokens_of(self, batch: dict[str, Tensor]) -> int:
        """Positions of the batch."""
        return batch["input_ids"].numel()


class PretrainTable(RunTable):
    """With losses and accuracies; after ``fit`` also the loss curve in a few rows. Put :class:`PretrainMeter` before it."""

    def collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float | None) -> dict[str, Any]:
        """With what the meter measured, and what the run started from."""
        scores, head = trainer.callback_metrics, {}
        if "val/mlm_loss" in scores:
            head["loss (masked words + next sentence)"] = (
                f"{scores['val/loss']:.4f} ({scores['val/mlm_loss']:.4f} + {scores['val/nsp_loss']:.4f})"
            )
            head["masked words right"] = f"{scores['val/mlm_accuracy']:.2%}"
            head["next sentences told right"] = f"{scores['val/nsp_accuracy']:.2%}"
        if "val/imitation" in scores:
            head["of the teacher's hidden states missed"] = f"{scores['val/imitation']:.4f} (squares)"
        meter = meter_of(trainer) if seconds is not None else None
        result = collect(
            trainer, sparsity_report(pl_module), head, seconds=seconds, **(meter.rows(trainer) if meter else {})
        )
        started = getattr(pl_module, "start_from", None) or getattr(pl_module, "weights", None)
        result["rows"]["started from"] = str(started or "random weights")
        return result | {"started_from": started} | Meter.measured(meter)

    def title(self, pl_module: pl.LightningModule, result: dict[str, Any]) -> str:
        """Say that it is pretraining."""
        return f"{super().title(pl_module, result)} BERT, pretraining"

    def above(self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: dict[str, Any], folder: Path) -> None:
        """The curve."""
        meter = meter_of(trainer)
        if result["stage"] == "fit" and meter is not None and meter.curve:
            print("\n" + loss_table(meter), flush=True)
