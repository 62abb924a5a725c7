"""Rows of a run: kept, printed and appended to the file one by one; failures among them."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import environment, rows, timing
from benchmarks.options import Options
from benchmarks.rows import Row
from benchmarks.timing import Stats

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """What a row is about: the columns that a case fixes."""

    suite: str
    case: str
    d_in: int
    d_out: int
    tokens: int
    precision: str


class Recorder:
    """Options, machine and results of one run."""

    def __init__(self, options: Options, out: Path | None) -> None:
        self.options, self.out = options, out
        self.device = torch.device(options.device)
        self.environment = environment.collect(self.device)
        self.rows: list[Row] = []

    def keep(
        self,
        point: Point,
        variant: str,
        measure: str,
        stats: Stats | None,
        dense: Stats | None = None,
        *,
        metric: str = "ms",
        note: str = "",
    ) -> None:
        """Keep a number: printed now, appended to the file now. Ratio as :class:`benchmarks.rows.Row` says."""
        if self.options.compile_only and stats is not None:
            return
        ratio = None
        if stats is not None and dense is not None and stats.median and dense.median:
            faster = metric in ("ms", "us")
            ratio = dense.median / stats.median if faster else stats.median / dense.median
        numbers = asdict(stats) if stats is not None else {"median": None, "p10": None, "p90": None, "n": 0}
        row = Row(
            time=datetime.now(UTC).isoformat(timespec="seconds"), **asdict(point), variant=variant, measure=measure,
            metric=metric, **numbers, ratio=ratio, **asdict(self.environment), seed=self.options.seed, note=note,
        )  # fmt: skip
        self.rows.append(row)
        if self.out is not None and not self.options.compile_only:
            rows.append(self.out, row)
        value = "-" if stats is None else f"{stats.median:.4g} {metric}"
        log.info(
            "  %s %s: %s %s%s %s", row.case, measure, variant, value, "" if ratio is None else f" ({ratio:.3f})", note
        )

    def value(
        self,
        point: Point,
        variant: str,
        measure: str,
        metric: str,
        value: float,
        dense: float | None = None,
        note: str = "",
    ) -> None:
        """Keep a number that was counted rather than sampled."""
        if self.options.wants(measure):
            baseline = None if dense is None else Stats(dense, dense, dense, 1)
            self.keep(point, variant, measure, Stats(value, value, value, 1), baseline, metric=metric, note=note)

    def skip(self, point: Point, variant: str, measure: str, reason: str) -> None:
        """Keep a row that says why there is no number."""
        self.keep(point, variant, measure, None, note=f"skipped: {reason}")

    def lost(self, suite: str, case: str, reason: str) -> None:
        """Keep a row for a whole case that failed."""
        self.keep(Point(suite, case, 0, 0, 0, ""), "all", "all", None, note=f"failed: {reason}")

    def attempt(self, point: Point, variant: str, measure: str, make: Callable[[], T]) -> T | None:
        """What ``make`` returns; None, and a row with the error's first line, if it raises."""
        try:
            return make()
        except Exception as error:  # whatever a peer raises is a result
            self.keep(point, variant, measure, None, note=f"failed: {first_line(error)}")
            log.debug("traceback", exc_info=True)
            # A kernel that died takes the CUDA context with it: then this raises, and the run ends.
            timing.synchronize(self.device)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # it may have been memory
            return None


def first_line(error: BaseException) -> str:
    """Type and first line that says something, without line breaks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
