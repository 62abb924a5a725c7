"""The CSV file of a comparison of fine-tuned models: one row a run, for GLUE and SQuAD alike."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning

from recipes.bert_large.methods import Run
from recipes.ledger import read_rows
from slope_pl.data.glue_tasks import TASKS

_METRICS = ("matthews", "accuracy", "accuracy_mismatched", "f1", "pearson", "spearman", "exact_match")


@dataclass(frozen=True)
class Result(Run):
    """One row: a run, what came out, and where it was made. Metrics that the task has not are nan."""

    score: float
    """What GLUE averages, the mean of the task's metrics; SQuAD's F1."""
    matthews: float
    accuracy: float
    accuracy_mismatched: float
    f1: float
    pearson: float
    spearman: float
    exact_match: float
    dev_rows: int
    """Or questions."""
    steps: int
    steps_before: int
    """Of the runs whose weights it started from, dense ones or a recovery; not those of a teacher."""
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
    def of(cls, found: dict[str, Any], run: Run, steps_before: int = 0) -> "Result":
        """From the content of a result-fit.json."""
        scores = {name.removeprefix("val/"): value for name, value in found["scores"].items()}
        return cls(
            **asdict(run),
            score=round(scores.get("score", scores.get("f1", math.nan)), 3),
            **{name: round(scores.get(name, math.nan), 3) for name in _METRICS},
            dev_rows=int(scores["questions"] if run.task == "squad" else scores["rows"]),
            steps=found["steps"],
            steps_before=steps_before,
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
        return self.f1 if self.task == "squad" else getattr(self, TASKS[self.task].published)


def read(file: Path) -> list[Result]:
    """All results of a file, in order; none if there is no file.

    Raises:
        SystemExit: if it is another kind of CSV, or a row is damaged.
    """
    return read_rows(file, Result)
