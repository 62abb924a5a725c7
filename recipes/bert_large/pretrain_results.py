"""What a pretraining run measures of itself and leaves behind: loss curve, tokens per second, tables, result-fit.json."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from recipes.bert_large.results import render
from recipes.gpt2.meter import Meter
from slope_pl import SLoPeCallback, sparsity_report

_CURVE_ROWS = 8


class PretrainMeter(Meter):
    """GPT-2's meter over BERT's batches: a token is a position of the input, padding included, as in published counts."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Count the batch's positions."""
        super().on_train_batch_end(trainer, pl_module, outputs, {"targets": batch["input_ids"]}, batch_idx)


class PretrainTable(pl.Callback):
    """After ``fit`` and ``validate``, prints the table and writes it to result-fit.json or result-validate.json.

    After ``fit`` also the loss curve in a few rows. Put :class:`PretrainMeter` before it.
    """

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After training."""
        self._show(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After ``validate``; the validations inside ``fit`` are not the end of anything."""
        if trainer.state.fn == "validate":
            self._show(trainer, pl_module)

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank: they agree on it by talking
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        result = collect(trainer, pl_module)
        meter = _meter(trainer)
        # Not pl_module.print: the progress bar is closed by now, and its print would drop the text.
        if result["stage"] == "fit" and meter is not None and meter.curve:
            print("\n" + curve_table(meter), flush=True)
        file = folder / f"result-{result['stage']}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        rows = [*result["rows"].items(), ("result", str(file))]
        print("\n" + render(rows, title=f"{result['stage']}: {result['model']} BERT, pretraining"), flush=True)


def collect(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Everything that the table shows, as plain values; ``scores`` are numbers or absent."""
    scores = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    schedule = next((cb for cb in trainer.callbacks if isinstance(cb, SLoPeCallback)), None)  # type: ignore[attr-defined]
    report, meter = sparsity_report(pl_module), _meter(trainer)
    fitted = meter if trainer.state.fn == "fit" else None
    rows: dict[str, str] = {}
    if scores:
        rows["loss (masked words + next sentence)"] = (
            f"{scores['val/loss']:.4f} ({scores['val/mlm_loss']:.4f} + {scores['val/nsp_loss']:.4f})"
        )
        rows["masked words right"] = f"{scores['val/mlm_accuracy']:.2%}"
        rows["next sentences told right"] = f"{scores['val/nsp_accuracy']:.2%}"
    rows.update(report.rows())
    if fitted:
        rows["optimizer steps, tokens"] = f"{trainer.global_step:,}, {fitted.tokens:,}"
    if schedule is not None:
        rows["re-setups of the backward masks"] = str(schedule.resetups)
        if report.adapter_parameters:
            woke = schedule.woke_at_step
            rows["adapters woke at step"] = "never" if woke is None else f"{woke:,}"
    if fitted:
        rows["tokens per second"] = f"{fitted.tokens_per_second or 0:,.0f}"
        rows["seconds in fit"] = f"{fitted.seconds:.1f}"
        rows["peak memory"] = f"{fitted.peak_bytes / 2**30:.2f} GiB"
    checkpoint = trainer.checkpoint_callback
    path = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
    started = getattr(pl_module, "start_from", None)
    rows["started from"] = str(started or "random weights")
    rows["log"] = str(trainer.log_dir)
    rows["checkpoint"] = path or str(trainer.ckpt_path or "none")
    return {
        "stage": str(getattr(trainer.state.fn, "value", trainer.state.fn)),
        "model": "2:4 sparse" if report.sparse_layers else "dense",
        "scores": scores,
        "steps": trainer.global_step,
        "tokens": fitted.tokens if fitted else None,
        "tokens_per_second": fitted.tokens_per_second if fitted else None,
        "seconds": fitted.seconds if fitted else None,
        "peak_bytes": fitted.peak_bytes if fitted else None,
        "resetups": None if schedule is None else schedule.resetups,
        "woke_at_step": None if schedule is None else schedule.woke_at_step,
        "started_from": started,
        "checkpoint": path or None,
        "rows": rows,
    }


def curve_table(meter: Meter) -> str:
    """The loss curve in a few rows: means of the training loss, and what validation gave."""
    train = [(step, tokens, loss) for step, tokens, loss, _ in meter.curve if loss is not None]
    val = {step: loss for step, _, _, loss in meter.curve if loss is not None}
    size = max(1, -(-len(train) // _CURVE_ROWS))
    lines = ["    step       tokens   train loss   val loss"]
    for i in range(0, len(train), size):
        part = train[i : i + size]
        step, tokens, _ = part[-1]
        mean = sum(loss for *_, loss in part) / len(part)
        found = [loss for at, loss in val.items() if part[0][0] <= at <= step]
        lines.append(f"{step:>8,} {tokens:>12,} {mean:>12.4f} {f'{found[-1]:.4f}' if found else '':>10}")
    return "\n".join(lines)


def _meter(trainer: pl.Trainer) -> Meter | None:
    return next((cb for cb in trainer.callbacks if isinstance(cb, Meter)), None)  # type: ignore[attr-defined]
