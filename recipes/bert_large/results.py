"""The table at the end of a fine-tuning run: what SQuAD and GLUE share, and SQuAD's own."""

import time
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl

from benchmarks.environment import collect as environment
from recipes.results import RunTable, collect
from slope_pl import sparsity_report


class FineTuningTable(RunTable):
    """With the machine and the speed.

    Samples a second are training rows over the time in ``fit`` without validation; the first steps, in which sparse
    products are tuned, count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._validation_began = self._in_validation = 0.0
        self._rows = self._val_step = 0

    def head(self, pl_module: pl.LightningModule, scores: dict[str, float]) -> dict[str, str]:
        """The first rows: scores, by their names without ``val/``; none before a validation."""
        return {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks."""
        super().on_fit_start(trainer, pl_module)
        self._in_validation, self._rows = 0.0, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:  # fmt: skip
        """Count rows; ranks get equally many."""
        self._rows += len(batch["input_ids"]) * trainer.world_size

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the training clock."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with it."""
        self._in_validation += time.perf_counter() - self._validation_began
        self._val_step = trainer.global_step
        super().on_validation_end(trainer, pl_module)

    def collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float | None) -> dict[str, Any]:
        """With the machine and the speed."""
        scores = {k.removeprefix("val/"): v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        result = collect(trainer, sparsity_report(pl_module), self.head(pl_module, scores), seconds=seconds)
        result["environment"] = asdict(environment(trainer.strategy.root_device))  # the model is on the CPU by now
        if seconds is not None:
            speed = self._rows / max(seconds - self._in_validation, 1e-9)
            result |= {"train_rows_seen": self._rows, "samples_per_second": speed, "val_step": self._val_step}
            result["rows"]["training rows per second"] = f"{speed:,.1f}"
        return result


class ResultTable(FineTuningTable):
    """SQuAD's: exact match and F1."""

    def head(self, pl_module: pl.LightningModule, scores: dict[str, float]) -> dict[str, str]:
        """As its base class."""
        if "f1" not in scores:
            return {}
        return {
            "exact match / F1": f"{scores['exact_match']:.2f} / {scores['f1']:.2f}",
            "questions scored": f"{scores['questions']:,.0f}",
        }
