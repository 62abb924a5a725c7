"""The table at the end of a GLUE run, and how fast training went."""

import time
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl

from benchmarks.environment import collect as environment
from recipes.bert_large.glue_module import BertGlue
from recipes.results import RunTable, collect
from slope_pl import sparsity_report

LABELS = {
    "matthews": "Matthews' coefficient x 100",
    "accuracy": "accuracy",
    "accuracy_mismatched": "accuracy, mismatched",
    "f1": "F1",
    "pearson": "Pearson's r x 100",
    "spearman": "Spearman's rho x 100",
}


class GlueTable(RunTable):
    """With the task's metrics and the speed.

    Samples a second are training rows over the time in ``fit`` without validation; the first steps, in which sparse
    products are tuned, count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._validation_began = self._in_validation = 0.0
        self._rows = self._val_step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks."""
        super().on_fit_start(trainer, pl_module)
        self._in_validation, self._rows = 0.0, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:  # fmt: skip
        """Count rows; ranks get equally many."""
        self._rows += len(batch["labels"]) * trainer.world_size

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the training clock."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with it."""
        self._in_validation += time.perf_counter() - self._validation_began
        self._val_step = trainer.global_step
        super().on_validation_end(trainer, pl_module)

    def collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float | None) -> dict[str, Any]:
        """Scores without the prefix ``val/``; the task, the machine, the speed."""
        assert isinstance(pl_module, BertGlue)
        scores = {k.removeprefix("val/"): v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        head = {LABELS[name]: f"{scores[name]:.2f}" for name in pl_module.info.metrics if name in scores}
        if scores:
            if len(head) > 1:
                head["score (their mean)"] = f"{scores['score']:.2f}"
            head["rows scored"] = f"{scores['rows']:,.0f}"
        result = collect(trainer, sparsity_report(pl_module), head, seconds=seconds)
        machine = environment(trainer.strategy.root_device)  # the model itself is on the CPU after fit
        result |= {"task": pl_module.task, "scores": scores, "environment": asdict(machine)}
        if seconds is not None:
            speed = self._rows / max(seconds - self._in_validation, 1e-9)
            result |= {"train_rows_seen": self._rows, "samples_per_second": speed, "val_step": self._val_step}
            result["rows"]["training rows per second"] = f"{speed:,.1f}"
        return result

    def title(self, pl_module: pl.LightningModule, result: dict[str, Any]) -> str:
        """With the task."""
        assert isinstance(pl_module, BertGlue)
        return f"{result['stage']}: {pl_module.info.folder}, {result['model']}"
