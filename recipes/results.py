"""What a run leaves at its end: a table on the screen, and all of it as JSON in the run's folder."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from recipes.meter import Meter
from slope_pl import SLoPeCallback, SparsityReport, sparsity_report

_CURVE_ROWS = 8


class Events(NamedTuple):
    """What a method's callback did.

    Attributes:
        label: of what it repeats.
        times: how often it did.
        phase: label of its last phase; None if the model has none.
        began: the step at which that began; None for never.
    """

    label: str
    times: int
    phase: str | None
    began: int | None


class RunTable(pl.Callback):
    """After ``fit`` and ``validate``, prints the table and writes it to result-fit.json or result-validate.json.

    A recipe's table is a subclass with :meth:`collect`.

    Attributes:
        unscored: whether ``fit`` found its run at its end, but no result of it: it was killed in its last validation. Then
            ``validate`` is to follow, whose result is that of both.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._first_step: int | None = None
        self.unscored = False

    def collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float | None) -> dict[str, Any]:
        """Everything that the table shows, as plain values: what :func:`collect` makes, and more.

        Args:
            trainer: at the end of a stage.
            pl_module: its model.
            seconds: in ``fit``; None after ``validate``.
        """
        return collect(trainer, sparsity_report(pl_module), {}, seconds=seconds)

    def title(self, pl_module: pl.LightningModule, result: dict[str, Any]) -> str:
        """The line above the table."""
        return f"{result['stage']}: {result['model']}"

    def above(self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: dict[str, Any], folder: Path) -> None:
        """Print more before the table, and add it to the result; rank zero alone comes here."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began, self._first_step = time.perf_counter(), None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where the run goes on; Lightning does not come here where nothing is left to train."""
        self._first_step = trainer.global_step

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After training."""
        self._show(trainer, pl_module, time.perf_counter() - self._began)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After ``validate``; the validations inside ``fit`` are not the end of anything."""
        if trainer.state.fn == "validate":
            self._show(trainer, pl_module, None)

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float | None) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank: they agree on it by talking
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"result-{getattr(trainer.state.fn, 'value', trainer.state.fn)}.json"
        if seconds is not None and self._was_at_its_end(trainer, file):
            return
        if not trainer.is_global_zero:
            return
        result = self.collect(trainer, pl_module, seconds)
        result["rows"] |= {"log": str(folder), "checkpoint": result["checkpoint"] or str(trainer.ckpt_path or "none")}
        # Not pl_module.print: the progress bar is closed by now, and its print would drop the text.
        self.above(trainer, pl_module, result, folder)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if self.unscored:
            text = json.dumps(result | {"stage": "fit"}, indent=1)
            file.with_name("result-fit.json").write_text(text + "\n", encoding="utf-8")
        rows = [*result["rows"].items(), ("result", str(file))]
        print("\n" + render(rows, title=self.title(pl_module, result)), flush=True)

    def _was_at_its_end(self, trainer: pl.Trainer, file: Path) -> bool:
        """Whether there is nothing to show of this ``fit``; says why. All ranks come here and agree."""
        if self._first_step not in (None, trainer.global_step):
            return False
        done = trainer.strategy.broadcast(file.is_file())
        self.unscored = not done and self._first_step is None and bool(trainer.limit_val_batches)
        line = f"\nThe run was at its end, step {trainer.global_step:,}, already: "
        if done:
            file.touch()
            rank_zero_only(print)(f"{line}{file} stays as it is.", flush=True)
        elif self.unscored:
            rank_zero_only(print)(f"{line}validating what was saved, since there is no {file.name}.", flush=True)
        return done or self.unscored


def collect(
    trainer: pl.Trainer,
    report: SparsityReport,
    head: Mapping[str, str],
    *,
    seconds: float | None,
    sizes: Mapping[str, str] | None = None,
    steps: tuple[str, str] | None = None,
    speed: Mapping[str, str] | None = None,
    memory: Mapping[str, str] | None = None,
    events: Events | None = None,
) -> dict[str, Any]:
    """What all recipes show, in one order.

    Args:
        trainer: at the end of a stage.
        report: of its model.
        head: the first rows: scores.
        seconds: in ``fit``; None after ``validate``.
        sizes: rows on the model; those of the report by default.
        steps: label and text of the steps taken.
        speed: rows after the schedule.
        memory: rows after the seconds.
        events: what the method's callback did; SLoPeCallback's by default.
    """
    if events is None:
        found = next((cb for cb in trainer.callbacks if isinstance(cb, SLoPeCallback)), None)  # type: ignore[attr-defined]
        if found is not None:
            phase = "adapters woke at step" if report.adapter_parameters else None
            events = Events("re-setups of the backward masks", found.resetups, phase, found.woke_at_step)
    rows = {**head, **(dict(report.rows()) if sizes is None else sizes)}
    if seconds is not None:
        label, text = steps or ("optimizer steps", f"{trainer.global_step:,}")
        rows[label] = text
    if events is not None:
        rows[events.label] = str(events.times)
        if events.phase is not None:
            rows[events.phase] = "never" if events.began is None else f"{events.began:,}"
    if seconds is not None:
        rows |= {**(speed or {}), "seconds in fit": f"{seconds:.1f}", **(memory or {})}
    saver = trainer.checkpoint_callback
    return {
        "stage": str(getattr(trainer.state.fn, "value", trainer.state.fn)),
        "model": "2:4 sparse" if report.sparse_layers else "dense",
        "scores": {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
        "steps": trainer.global_step,
        "resetups": None if events is None else events.times,
        "woke_at_step": None if events is None else events.began,
        "seconds": seconds,
        "checkpoint": getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", "") or None,
        "rows": rows,
    }


def meter_of(trainer: pl.Trainer) -> Meter | None:
    """The run's :class:`Meter`, if it has one."""
    return next((cb for cb in trainer.callbacks if isinstance(cb, Meter)), None)  # type: ignore[attr-defined]


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


def render(rows: list[tuple[str, str]], title: str) -> str:
    """Two aligned columns under a title."""
    width = max(len(label) for label, _ in rows)
    line = "-" * (width + 2 + max(len(text) for _, text in rows))
    return "\n".join([title, line, *(f"{label:<{width}}  {text}" for label, text in rows), line])
