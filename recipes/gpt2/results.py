"""What a run leaves: tables on the screen, result-fit.json, the picture of its loss curve, a sample of its text."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.environment import collect as environment
from recipes.gpt2.meter import Meter
from recipes.gpt2.module import GPT2Pretraining
from recipes.gpt2.plots import loss_curves, smooth
from slope_pl import SLoPeCallback, sparsity_report
from slope_pl.baselines import FSTConfig, masked_layers
from slope_pl.baselines.callback import BaselineCallback

_CURVE_ROWS = 8


class ResultTable(pl.Callback):
    """After ``fit`` and ``validate``, prints the table and writes it to result-fit.json or result-validate.json.

    After ``fit`` also prints the loss curve in a few rows and a sample text, and draws loss.svg. Put :class:`Meter` before it.
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
        result = collect(trainer, pl_module, folder)
        # Not pl_module.print: the progress bar is closed by now, and its print would drop the text.
        if result["stage"] == "fit":
            meter = _meter(trainer)
            if meter is not None and meter.curve:
                print("\n" + loss_table(meter), flush=True)
                result["rows"]["loss curve"] = _draw(meter, folder / "loss.svg", result["model"])
            text = pl_module.sample() if isinstance(pl_module, GPT2Pretraining) else None
            if text is not None:
                print("\nSample text:\n" + textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  "))
            result["sample"] = text
        file = folder / f"result-{result['stage']}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        rows = [*result["rows"].items(), ("result", str(file))]
        print("\n" + render(rows, title=f"{result['stage']}: {result['model']}"), flush=True)


def collect(trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path) -> dict[str, Any]:
    """Everything that the table shows, as plain values; ``scores`` are numbers or absent."""
    scores = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    schedule = _schedule(trainer)
    report, meter = sparsity_report(pl_module), _meter(trainer)
    fitted = trainer.state.fn == "fit" and meter is not None
    rows: dict[str, str] = {}
    if scores:
        rows["validation loss / perplexity"] = f"{scores['val/loss']:.4f} / {scores['val/perplexity']:.2f}"
        rows["tokens validated"] = f"{scores['val/tokens']:,.0f}"
    masked = masked_layers(pl_module)
    if masked:  # the report knows sparse layers and dense ones
        rows["masked linear layers (dense ones)"] = (
            f"{len(masked)} ({report.dense_layers}); simulated, nothing is saved"
        )
        rows["parameters"] = f"{report.dense_parameters:,}"
    else:
        rows.update(report.rows())
    if fitted:
        assert meter is not None
        rows["optimizer steps, tokens"] = f"{trainer.global_step:,}, {meter.tokens:,}"
    if schedule is not None:
        label, times, _ = schedule
        rows[label] = str(times)
        phase = _last_phase(pl_module)
        if phase is not None:
            rows[phase] = "never" if schedule[2] is None else f"{schedule[2]:,}"
    if fitted:
        assert meter is not None
        rows["tokens per second"] = f"{meter.tokens_per_second or 0:,.0f}"
        rows["seconds in fit"] = f"{meter.seconds:.1f}"
        rows["peak memory"] = f"{meter.peak_bytes / 2**30:.2f} GiB"
    checkpoint = trainer.checkpoint_callback
    path = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
    rows["log"] = str(folder)
    rows["checkpoint"] = path or str(trainer.ckpt_path or "none")
    return {
        "stage": str(getattr(trainer.state.fn, "value", trainer.state.fn)),
        "model": pl_module.method if isinstance(pl_module, GPT2Pretraining) else type(pl_module).__name__,
        "scores": scores,
        "steps": trainer.global_step,
        "tokens": meter.tokens if fitted and meter else None,
        "tokens_per_second": meter.tokens_per_second if fitted and meter else None,
        "seconds": meter.seconds if fitted and meter else None,
        "peak_bytes": meter.peak_bytes if fitted and meter else None,
        "val_step": meter.last_val_step if fitted and meter else None,
        "resetups": None if schedule is None else schedule[1],
        "woke_at_step": None if schedule is None else schedule[2],
        "checkpoint": path or None,
        "environment": asdict(environment(pl_module.device)),
        "rows": rows,
    }


def _schedule(trainer: pl.Trainer) -> tuple[str, int, int | None] | None:
    """Of the method's callback: what it repeats, how often it did, and the step at which the last phase began."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SLoPeCallback):
            return "re-setups of the backward masks", callback.resetups, callback.woke_at_step
        if isinstance(callback, BaselineCallback):
            return "choices of the masks", callback.refreshes, callback.switched_at_step
    return None


def _last_phase(pl_module: pl.LightningModule) -> str | None:
    if isinstance(getattr(pl_module, "baseline", None), FSTConfig):
        return "dense from step"
    return "adapters woke at step" if any("adapter_down" in name for name, _ in pl_module.named_parameters()) else None


def loss_table(meter: Meter) -> str:
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


def _draw(meter: Meter, file: Path, label: str) -> str:
    train = [(float(tokens), loss) for _, tokens, loss, _ in meter.curve if loss is not None]
    val = [(float(tokens), loss) for _, tokens, _, loss in meter.curve if loss is not None]
    drawn = loss_curves(file, {label: (smooth(train, 200), val)}, "GPT-2")
    return str(file) if drawn else "not drawn: matplotlib is not installed (extra bench)"


def _meter(trainer: pl.Trainer) -> Meter | None:
    return next((cb for cb in trainer.callbacks if isinstance(cb, Meter)), None)  # type: ignore[attr-defined]


def render(rows: list[tuple[str, str]], title: str) -> str:
    """Two aligned columns under a title."""
    width = max(len(label) for label, _ in rows)
    line = "-" * (width + 2 + max(len(text) for _, text in rows))
    return "\n".join([title, line, *(f"{label:<{width}}  {text}" for label, text in rows), line])
