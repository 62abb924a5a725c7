"""The table at the end of a GLUE run, on the screen and as JSON in the run's folder, and how fast training went."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.environment import collect as environment
from recipes.bert_large.glue_module import BertGlue
from recipes.bert_large.results import render
from slope_pl import SLoPeCallback, sparsity_report

LABELS = {
    "matthews": "Matthews' coefficient x 100",
    "accuracy": "accuracy",
    "accuracy_mismatched": "accuracy, mismatched",
    "f1": "F1",
    "pearson": "Pearson's r x 100",
    "spearman": "Spearman's rho x 100",
}


class GlueTable(pl.Callback):
    """Prints scores, sizes and speed after ``fit`` and ``validate``, and writes result-fit.json or result-validate.json.

    Samples a second are training rows over the time in ``fit`` without validation; the first steps, in which sparse
    products are tuned, count.
    """

    def __init__(self) -> None:
        self._began = self._validation_began = self._in_validation = 0.0
        self._rows = self._val_step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began, self._in_validation, self._rows = time.perf_counter(), 0.0, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:  # fmt: skip
        """Count rows; ranks get equally many."""
        self._rows += len(batch["labels"]) * trainer.world_size

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the training clock."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on; after ``validate``, show: the validations inside ``fit`` are not the end of anything."""
        self._in_validation += time.perf_counter() - self._validation_began
        self._val_step = trainer.global_step
        if trainer.state.fn == "validate":
            self._show(trainer, pl_module, None)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After training."""
        self._show(trainer, pl_module, time.perf_counter() - self._began)

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float | None) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank: they agree on it by talking
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, BertGlue)
        result = collect(trainer, pl_module, seconds)
        if seconds is not None:
            speed = self._rows / max(seconds - self._in_validation, 1e-9)
            result |= {"train_rows_seen": self._rows, "samples_per_second": speed, "val_step": self._val_step}
            result["rows"]["training rows per second"] = f"{speed:,.1f}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"result-{result['stage']}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        rows = [*result["rows"].items(), ("result", str(file))]
        # Not pl_module.print: the progress bar is closed by now, and its print would drop the text.
        print("\n" + render(rows, title=f"{result['stage']}: {pl_module.info.folder}, {result['model']}"), flush=True)


def collect(trainer: pl.Trainer, pl_module: BertGlue, seconds: float | None) -> dict[str, Any]:
    """Everything that the table shows, as plain values."""
    scores = {k.removeprefix("val/"): v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    schedule = next((cb for cb in trainer.callbacks if isinstance(cb, SLoPeCallback)), None)  # type: ignore[attr-defined]
    report = sparsity_report(pl_module)
    rows = {LABELS[name]: f"{scores[name]:.2f}" for name in pl_module.info.metrics if name in scores}
    if scores:
        if len(rows) > 1:
            rows["score (their mean)"] = f"{scores['score']:.2f}"
        rows["rows scored"] = f"{scores['rows']:,.0f}"
    rows.update(report.rows())
    if seconds is not None:
        rows["optimizer steps"] = f"{trainer.global_step:,}"
    if schedule is not None:
        rows["re-setups of the backward masks"] = str(schedule.resetups)
        woke = schedule.woke_at_step
        if report.adapter_parameters:
            rows["adapters woke at step"] = "never" if woke is None else f"{woke:,}"
    if seconds is not None:
        rows["seconds in fit"] = f"{seconds:.1f}"
    checkpoint = trainer.checkpoint_callback
    path = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
    rows["log"] = str(trainer.log_dir)
    rows["checkpoint"] = path or str(trainer.ckpt_path or "none")
    return {
        "stage": str(getattr(trainer.state.fn, "value", trainer.state.fn)),
        "task": pl_module.task,
        "model": "2:4 sparse" if report.sparse_layers else "dense",
        "scores": scores,
        "steps": trainer.global_step,
        "resetups": None if schedule is None else schedule.resetups,
        "woke_at_step": None if schedule is None else schedule.woke_at_step,
        "seconds": seconds,
        "checkpoint": path or None,
        "environment": asdict(environment(pl_module.device)),
        "rows": rows,
    }
