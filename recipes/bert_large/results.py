"""The table at the end of a run, on the screen and as JSON in the run's folder."""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from slope_pl import SLoPeCallback, sparsity_report


class ResultTable(pl.Callback):
    """Prints scores, sizes and the schedule's events after ``fit`` and ``validate``, and writes them to result.json."""

    def __init__(self) -> None:
        self._began = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After training."""
        self._show(trainer, pl_module, seconds=time.perf_counter() - self._began)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After ``validate``; the validations inside ``fit`` are not the end of anything."""
        if trainer.state.fn == "validate":
            self._show(trainer, pl_module)

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float | None = None) -> None:
        if not trainer.is_global_zero:
            return
        result = collect(trainer, pl_module, seconds)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"result-{result['stage']}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        rows = [*result["rows"].items(), ("result", str(file))]
        # Not pl_module.print: the progress bar is closed by now, and its print would drop the text.
        print("\n" + render(rows, title=f"{result['stage']}: {result['model']}"), flush=True)


def collect(trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float | None) -> dict[str, Any]:
    """Everything that the table shows, as plain values; ``scores`` are NaN-free numbers or absent."""
    scores = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    schedule = next((cb for cb in trainer.callbacks if isinstance(cb, SLoPeCallback)), None)  # type: ignore[attr-defined]
    report = sparsity_report(pl_module)
    rows: dict[str, str] = {}
    if scores:
        rows["exact match / F1"] = f"{scores['val/exact_match']:.2f} / {scores['val/f1']:.2f}"
        rows["questions scored"] = f"{scores['val/questions']:,.0f}"
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
        "model": "2:4 sparse" if report.sparse_layers else "dense",
        "scores": scores,
        "steps": trainer.global_step,
        "resetups": None if schedule is None else schedule.resetups,
        "woke_at_step": None if schedule is None else schedule.woke_at_step,
        "seconds": seconds,
        "checkpoint": path or None,
        "rows": rows,
    }


def render(rows: list[tuple[str, str]], title: str) -> str:
    """Two aligned columns under a title."""
    width = max(len(label) for label, _ in rows)
    line = "-" * (width + 2 + max(len(text) for _, text in rows))
    return "\n".join([title, line, *(f"{label:<{width}}  {text}" for label, text in rows), line])
