"""Adapters in a comparison: their convergence as a third CSV file and a picture, and what their rank gains as a table."""

import csv
import itertools
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from recipes import convergence
from recipes.convergence import COLUMNS, Point, means_by_kind, thinned
from recipes.convergence_plot import convergence_curves
from recipes.gpt2.ledger import Curve, Result, best_rates
from recipes.gpt2.plans import labels
from recipes.ledger import append_lines

MOST_STEPS = 60
_ADAPTER = re.compile(r"\s*--model\.(?:\w+\.)?adapter_(\w+)[ =](\S+)")
HEADER = (
    "| method | r | rate | validation loss | gain over r = 0 | gain at r = 0's rate | jump at the wake | same steps, r = 0 |\n"
    "|---|---|---|---|---|---|---|---|"
)


# ------------------------------------------------------------------------------------------------ convergence


def adapters_file(file: Path) -> Path:
    """Where the convergence of a comparison's adapters is."""
    return file.with_name(f"{file.stem}-adapters.csv")


def append_trace(file: Path, run: str, trace: Path) -> bool:
    """Add what a run left: the mean of each kind of layers, at :data:`MOST_STEPS` steps at most.

    Args:
        file: of the comparison; the rows go into the file beside it.
        run: name of the run.
        trace: its adapters.csv.

    Returns:
        False if there is none: the run had no adapters.
    """
    if not trace.is_file():
        return False
    means = thinned(means_by_kind(convergence.read(trace)), MOST_STEPS)
    append_lines(adapters_file(file), ["run", *COLUMNS], [[run, *convergence.cells(point)] for point in means])
    return True


def read_traces(file: Path) -> dict[str, list[Point]]:
    """The traces beside ``file`` by run; of a run that was begun twice, the last."""
    path = adapters_file(file)
    traces: dict[str, list[Point]] = {}
    if not path.is_file():
        return traces
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            points, point = traces.setdefault(row["run"], []), convergence.from_cells(row)
            if points and point.step < points[-1].step:
                points.clear()
            points.append(point)
    return traces


def draw_traces(file: Path, results: Sequence[Result]) -> str | None:
    """Draw each method's adapters at its best rate, first seed, beside ``file``; None without traces, else where."""
    traces, best, names = read_traces(file), best_rates(results), labels(results)
    shown: dict[str, list[Point]] = {}
    for result in results:
        label = f"{names[result.settings].replace('`', '')}, rate {result.rate:g}"
        if result.rate == best[result.settings] and label not in shown and result.run in traces:
            shown[label] = traces[result.run]
    if not shown:
        return None
    picture = file.with_name(f"{file.stem}-adapters.svg")
    title = "Adapters on their way to their final value"
    if not convergence_curves(picture, shown, title):
        return "Adapters not drawn: matplotlib is not installed (extra bench)."
    return f"Adapters: {picture}"


# ------------------------------------------------------------------------------------------------ rank against gain


def split_rank(settings: str) -> tuple[str, int] | None:
    """Settings without what concerns adapters alone, and their rank (the last one counts); None where none is named."""
    ranks = [int(value) for name, value in _ADAPTER.findall(settings) if name == "rank"]
    return (_ADAPTER.sub("", settings), ranks[-1]) if ranks else None


def rank_table(results: Sequence[Result], curves: dict[str, Curve]) -> str | None:
    """What rank gains: each method with adapters against the same at r = 0, of one length.

    The gain is the difference of the mean validation losses (positive: better than r = 0), each at its own best rate, and both
    at the best rate of r = 0. The wake's jump is the mean training loss over the steps after it minus the mean over as many
    before, from the curves at that rate; beside it the same of r = 0 over the same steps, with the same seeds and so the same
    tokens.

    Returns:
        Markdown; None where no method has r = 0 and another rank.
    """
    groups: dict[tuple[str, int, str], dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        found = split_rank(result.settings)
        if found is not None:
            groups[result.family, result.steps, found[0]][result.settings].append(result)
    lines, names = [HEADER], labels(results)
    for group in groups.values():
        ranks = sorted((_rank(settings), settings) for settings in group)
        zero = group[ranks[0][1]]
        if ranks[0][0] == 0 and ranks[-1][0] > 0:
            lines += [_row(names[settings], rank, group[settings], zero, curves) for rank, settings in ranks]
    if len(lines) == 1:
        return None
    note = (
        "Ranks against gain. The wake's jump: training loss of the steps after it minus that of as many before; beside it the "
        "same steps at r = 0, with the same rate and seeds."
    )
    return "\n".join([*lines, "", note])


def _rank(settings: str) -> int:
    found = split_rank(settings)
    return found[1] if found is not None else 0


def _row(label: str, rank: int, own: Sequence[Result], zero: Sequence[Result], curves: dict[str, Curve]) -> str:
    (rate,), (zero_rate,) = best_rates(own).values(), best_rates(zero).values()
    loss, zero_loss = _loss(own, rate), _loss(zero, zero_rate)
    cells = [label, str(rank), f"{rate:g}", _number(loss, sign="")]
    if rank:
        cells += [_number(zero_loss - loss), _number(zero_loss - _loss(own, zero_rate))]
        cells += map(_number, _jumps([r for r in own if r.rate == rate], zero, curves))
    else:
        cells += ["", "", "", ""]
    return f"| {' | '.join(cells)} |"


def _jumps(own: Sequence[Result], zero: Sequence[Result], curves: dict[str, Curve]) -> tuple[float, float]:
    """Means over the seeds that both have: with adapters, and of the same steps at r = 0; nan without a common seed."""
    twins = {(r.rate, r.seed): r for r in zero}
    pairs = [(r, twins[r.rate, r.seed], r.switched_at_step) for r in own if (r.rate, r.seed) in twins]
    mine = [_jump(curves.get(r.run), wake) for r, _, wake in pairs]
    others = [_jump(curves.get(twin.run), wake) for _, twin, wake in pairs]
    return _mean(mine), _mean(others)


def _jump(curve: Curve | None, wake: int) -> float:
    """Mean training loss after the wake minus the mean of as many points before; nan if a side has none.

    A point is the mean over the steps since the point before it: one that has steps on both sides is left out.
    """
    if curve is None or wake < 0:
        return math.nan
    points = [(step, loss) for step, _, loss, _ in curve.points if not math.isnan(loss)]
    after = [loss for (before, _), (_, loss) in itertools.pairwise(points) if before >= wake]
    before = [loss for step, loss in points if step <= wake][-len(after) :] if after else []
    if not after or len(before) < len(after):
        return math.nan
    return statistics.mean(after) - statistics.mean(before)


def _loss(results: Sequence[Result], rate: float) -> float:
    """Mean over the seeds; nan where there is no run at that rate, or one diverged."""
    return _mean([r.val_loss for r in results if r.rate == rate])


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else math.nan


def _number(value: float, sign: str = "+") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.4f}"
