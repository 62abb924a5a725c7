"""The two CSV files of a comparison: one row a run, and the loss curves of all runs."""

import csv
import hashlib
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.ledger import append_lines, read_rows


@dataclass(frozen=True)
class Result:
    """One row: a run, what came out, and where it was made."""

    run: str
    """Name in the file of the curves: a hash of settings, rate and seed."""
    family: str
    method: str
    settings: str
    rate: float
    seed: int
    val_loss: float
    """On all held-out tokens, at the last step; nan if the run diverged."""
    steps: int
    tokens: int
    tokens_per_second: float
    """Median over intervals of training."""
    seconds: float
    """In fit: compilation and validation included."""
    peak_bytes: int
    """Of tensors on the GPU; on a CPU, of the process (of all runs so far, with --in-process)."""
    resetups: int
    switched_at_step: int
    """Wake of the adapters, or start of FST's dense finish; -1 for never."""
    gpu: str
    driver: str
    torch: str
    cuda: str
    cusparselt: str
    slope_pl: str
    commit: str
    text: str
    """Name, number and digest of its tokens."""

    @classmethod
    def of(cls, found: dict[str, Any], **run: Any) -> "Result":
        """From the content of a result-fit.json."""
        return cls(
            run=run_name(run["settings"], run["rate"], run["seed"]),
            **run,
            val_loss=round(found["scores"]["val/loss"], 5),
            steps=found["steps"],
            tokens=found["tokens"],
            tokens_per_second=round(found["tokens_per_second"], 1),
            seconds=round(found["seconds"], 1),
            peak_bytes=found["peak_bytes"],
            resetups=found["resetups"] or 0,
            switched_at_step=-1 if found["woke_at_step"] is None else found["woke_at_step"],
            **found["environment"],
            text=found["text"],
        )


def run_name(settings: str, rate: float, seed: int) -> str:
    """Eight letters for a run: the same settings, rate and seed give the same ones."""
    return hashlib.sha256(f"{settings} | {rate!r} | {seed}".encode()).hexdigest()[:8]


def best_rates(results: Sequence[Result]) -> dict[str, float]:
    """The rate of lowest mean loss for each settings; of one that diverged at every rate, the lowest rate."""
    by_settings: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        by_settings[result.settings][result.rate].append(result.val_loss)
    return {
        settings: min(losses, key=lambda rate: (mean_loss(losses[rate]), rate))
        for settings, losses in by_settings.items()
    }


def mean_loss(values: Sequence[float]) -> float:
    """Infinite if a run among them diverged: no best rate, then."""
    return math.inf if any(math.isnan(value) for value in values) else statistics.mean(values)


Point = tuple[int, int, float, float]
"""Step, tokens, training loss, validation loss; one of the losses is nan."""


@dataclass(frozen=True)
class Curve:
    """The loss of one run."""

    run: str
    points: list[Point]

    @classmethod
    def of(cls, file: Path, result: Result, every: int) -> "Curve":
        """From a run's curve.csv; the training loss as means of ``every`` steps."""
        with file.open(newline="", encoding="utf-8") as stream:
            rows = [(int(r["step"]), int(r["tokens"]), r["train_loss"], r["val_loss"]) for r in csv.DictReader(stream)]
        points: list[Point] = []
        waiting: list[float] = []
        for step, tokens, train, val in rows:
            if val:
                points.append((step, tokens, math.nan, float(val)))
                continue
            waiting.append(float(train))
            if step % max(every, 1) == 0 or step == result.steps:
                points.append((step, tokens, round(sum(waiting) / len(waiting), 5), math.nan))
                waiting = []
        return cls(result.run, points)


def curves_file(file: Path) -> Path:
    """Where the curves of a comparison are."""
    return file.with_name(f"{file.stem}-curves.csv")


def read(file: Path) -> list[Result]:
    """All results of a file, in order; none if there is no file.

    Raises:
        SystemExit: if it is another kind of CSV, or a row is damaged.
    """
    return read_rows(file, Result)


def append_curve(file: Path, curve: Curve) -> None:
    """Add a curve beside ``file``."""
    rows = [
        [curve.run, step, tokens, *("" if math.isnan(x) else x for x in losses)]
        for step, tokens, *losses in curve.points
    ]
    append_lines(curves_file(file), ["run", "step", "tokens", "train_loss", "val_loss"], rows)


def read_curves(file: Path) -> dict[str, Curve]:
    """The curves beside ``file`` by run; of a run that was begun twice, the last."""
    path = curves_file(file)
    curves: dict[str, Curve] = {}
    if not path.is_file():
        return curves
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            points = curves.setdefault(row["run"], Curve(row["run"], [])).points
            step = int(row["step"])
            if points and step < points[-1][0]:
                points.clear()
            losses = (float(row[key] or "nan") for key in ("train_loss", "val_loss"))
            points.append((step, int(row["tokens"]), *losses))  # type: ignore[arg-type]
    return curves
