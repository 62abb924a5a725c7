"""What a GPT-2 run leaves: the table, the picture of its loss curve, a sample of its text."""

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.environment import collect as environment
from recipes.gpt2.module import GPT2Pretraining
from recipes.loss_plot import loss_curves, smooth
from recipes.meter import Meter
from recipes.results import Events, RunTable, collect, loss_table, meter_of
from slope_pl import sparsity_report
from slope_pl.baselines import FSTConfig, masked_layers
from slope_pl.baselines.callback import BaselineCallback
from slope_pl.data import TextDataModule


class ResultTable(RunTable):
    """With loss and perplexity; after ``fit`` also the loss curve, in a few rows and as loss.svg, and a sample text.

    Put :class:`recipes.meter.Meter` before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sample: str | None = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the sample here: by ``on_fit_end`` Lightning has moved the model to the CPU, where it takes minutes."""
        if trainer.is_global_zero and isinstance(pl_module, GPT2Pretraining):
            self._sample = pl_module.sample()

    def collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float | None) -> dict[str, Any]:
        """With what the meter measured, and the machine."""
        scores, head = trainer.callback_metrics, {}
        if "val/loss" in scores:
            head["validation loss / perplexity"] = f"{scores['val/loss']:.4f} / {scores['val/perplexity']:.2f}"
            head["tokens validated"] = f"{scores['val/tokens']:,.0f}"
        report, sizes = sparsity_report(pl_module), None
        if masked := masked_layers(pl_module):  # the report knows sparse layers and dense ones
            sizes = {
                "masked linear layers (dense ones)": f"{len(masked)} ({report.dense_layers}); simulated, nothing is saved",
                "parameters": f"{report.dense_parameters:,}",
            }
        meter = meter_of(trainer) if seconds is not None else None
        measured = meter.rows(trainer) if meter else {}
        result = collect(
            trainer, report, head, seconds=seconds, sizes=sizes, events=_events(trainer, pl_module), **measured
        )
        if isinstance(pl_module, GPT2Pretraining):
            result["model"] = pl_module.method
        machine = environment(trainer.strategy.root_device)  # the model itself is on the CPU by now
        return result | {"environment": asdict(machine), "text": text_of(trainer)} | Meter.measured(meter)

    def above(self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: dict[str, Any], folder: Path) -> None:
        """Curve and sample."""
        if result["stage"] != "fit":
            return
        meter = meter_of(trainer)
        if meter is not None and meter.curve:
            print("\n" + loss_table(meter), flush=True)
            result["rows"]["loss curve"] = _draw(meter, folder / "loss.svg", result["model"])
        if (text := self._sample) is not None:
            print("\nSample text:\n" + textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  "))
        result["sample"] = text


def text_of(trainer: pl.Trainer) -> str:
    """Name, number and digest of the tokens that a run was trained on and validated with; empty for other data."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, TextDataModule):
        return ""
    tokens = sum(split.tokens for split in data.index.splits.values())
    return f"{Path(data.source).name}, {tokens:,} tokens, {data.index.digest}"


def _events(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Events | None:
    """Of a baseline's callback; None leaves it to SLoPe's."""
    found = next((cb for cb in trainer.callbacks if isinstance(cb, BaselineCallback)), None)  # type: ignore[attr-defined]
    if found is None:
        return None
    phase = None
    if isinstance(getattr(pl_module, "baseline", None), FSTConfig):
        phase = "dense from step"
    elif any("adapter_down" in name for name, _ in pl_module.named_parameters()):
        phase = "adapters woke at step"
    return Events("choices of the masks", found.refreshes, phase, found.switched_at_step)


def _draw(meter: Meter, file: Path, label: str) -> str:
    train = [(float(tokens), loss) for _, tokens, loss, _ in meter.curve if loss is not None]
    val = [(float(tokens), loss) for _, tokens, _, loss in meter.curve if loss is not None]
    drawn = loss_curves(file, {label: (smooth(train, 200), val)}, "GPT-2")
    return str(file) if drawn else "not drawn: matplotlib is not installed (extra bench)"
