"""The CSV file of a GLUE comparison: one row a run."""

import csv
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning

from slope_pl.data.glue_tasks import TASKS

_METRICS = ("matthews", "accuracy", "accuracy_mismatched", "f1", "pearson", "spearman")


@dataclass(frozen=True)
class Run:
    """What makes a run the same run.

    Attributes:
        task: name of the task.
        method: ``dense`` or ``sparse``.
        mask: kind of the forward mask; ``none`` for dense.
        rank: of the adapters.
        rate: peak learning rate.
        seed: of the head, the order and the subset of the data.
        arguments: given to the sparse runs alone.
        settings: config, data, weights and arguments that all runs of a comparison share.
    """

    task: str
    method: str
    mask: str
    rank: int
    rate: float
    seed: int
    arguments: str
    settings: str

    @property
    def label(self) -> str:
        """The method in a table."""
        if self.method == "dense":
            return "dense"
        return f"2:4 {self.mask}, r = {self.rank}" + (f", {self.arguments}" if self.arguments else "")

    def __str__(self) -> str:
        return f"{self.task}, {self.label}, rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Result(Run):
    """One row: a run, what came out, and where it was made. Metrics that the task has not are nan."""

    score: float
    """What GLUE averages: the mean of the task's metrics."""
    matthews: float
    accuracy: float
    accuracy_mismatched: float
    f1: float
    pearson: float
    spearman: float
    dev_rows: int
    steps: int
    train_rows_seen: int
    resetups: int
    woke_at_step: int
    seconds: float
    """In fit, validation included."""
    samples_per_second: float
    """Training rows over the time in fit without validation."""
    gpu: str
    """Or the CPU."""
    driver: str
    torch: str
    cuda: str
    cusparselt: str
    slope_pl: str
    lightning: str
    commit: str

    @classmethod
    def of(cls, found: dict[str, Any], run: Run) -> "Result":
        """From the content of a result-fit.json."""
        scores = found["scores"]
        return cls(
            **asdict(run),
            score=round(scores["score"], 3),
            **{name: round(scores.get(name, math.nan), 3) for name in _METRICS},
            dev_rows=int(scores["rows"]),
            steps=found["steps"],
            train_rows_seen=found["train_rows_seen"],
            resetups=found["resetups"] or 0,
            woke_at_step=-1 if found["woke_at_step"] is None else found["woke_at_step"],
            seconds=round(found["seconds"], 1),
            samples_per_second=round(found["samples_per_second"], 1),
            lightning=lightning.__version__,
            **found["environment"],
        )

    @property
    def run(self) -> Run:
        """The run alone: its key."""
        return Run(*(getattr(self, field.name) for field in fields(Run)))

    @property
    def published(self) -> float:
        """The metric that the published table shows for this task."""
        return getattr(self, TASKS[self.task].published)


def read(file: Path) -> list[Result]:
    """All results of a file, in order; none if there is no file.

    Raises:
        SystemExit: if it is another kind of CSV.
    """
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    kinds = {field.name: field.type for field in fields(Result)}
    if rows and rows[0].keys() != kinds.keys():
        raise SystemExit(
            f"{file}: its columns are {', '.join(rows[0])}, expected {', '.join(kinds)}; give another --csv"
        )
    try:
        return [Result(**{key: kinds[key](text) for key, text in row.items()}) for row in rows]  # type: ignore[operator]
    except (TypeError, ValueError) as error:
        raise SystemExit(f"{file}: a row is damaged ({error}); remove it, its run is made again") from error


def append(file: Path, result: Result) -> None:
    """Add a row, and the header to a new file."""
    new = not file.is_file() or not file.stat().st_size
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Result)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(result))
