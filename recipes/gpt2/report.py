"""The report of a comparison: each method at its own best rate, as Markdown, and all loss curves on one plot."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from recipes.gpt2.ledger import Curve, Point, Result, read, read_curves
from recipes.loss_plot import Points, loss_curves, smooth

HEADER = (
    "| method | best rate | seeds | validation loss | perplexity | tokens/s | seconds | peak GiB | loss at every rate tried |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def best_rates(results: Sequence[Result]) -> dict[str, float]:
    """The rate of lowest mean loss for each settings; of one that diverged at every rate, the lowest rate."""
    by_settings: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        by_settings[result.settings][result.rate].append(result.val_loss)
    return {
        settings: min(losses, key=lambda rate: (_mean(losses[rate]), rate)) for settings, losses in by_settings.items()
    }


def report(results: Sequence[Result]) -> str:
    """One table for each set of arguments that runs had in common, in the order of the file."""
    if not results:
        return "No results yet."
    tables: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        tables[result.family, str(result.steps)].append(result)
    return "\n\n".join(_table(own) for own in tables.values())


def _table(results: Sequence[Result]) -> str:
    best, lines, edges = best_rates(results), [HEADER], False
    names = {r.settings: r.method for r in results}
    for settings, method in names.items():
        own = [r for r in results if r.settings == settings]
        rate = best[settings]
        at_best = [r for r in own if r.rate == rate]
        tried = sorted({r.rate for r in own})
        edge = rate in (tried[0], tried[-1])
        edges |= edge
        others = ", ".join(f"{r:g}: {_mean([x.val_loss for x in own if x.rate == r]):.4f}" for r in tried)
        # The same name with other arguments is another row; the arguments tell them apart.
        arguments = settings.partition(" ")[2]
        twice = list(names.values()).count(method) > 1
        label = f"{method} (`{arguments}`)" if twice and arguments else method
        loss = [r.val_loss for r in at_best]
        lines.append(
            f"| {label} | {rate:g}{'*' if edge else ''} | {len(at_best)} | {_spread(loss)} | {_exp(_mean(loss)):.2f} | "
            f"{_mean([r.tokens_per_second for r in at_best]):,.0f} | {_mean([r.seconds for r in at_best]):.0f} | "
            f"{_mean([r.peak_bytes for r in at_best]) / 2**30:.2f} | {others} |"
        )
    notes = [f"{results[0].family}: {results[0].steps:,} steps, {results[0].tokens:,} tokens a run. "]
    if edges:
        notes.append("\\* the best rate is the lowest or highest tried: a better one may lie beyond. ")
    for name in ("gpu", "torch", "commit"):
        found = [*dict.fromkeys(getattr(r, name) for r in results)]
        notes.append(f"{name.capitalize()}: {', '.join(found)}. ")
    return "\n".join([*lines, "", "".join(notes).strip()])


def draw(file: Path) -> str:
    """Draw the curve of each method at its best rate, the mean over its seeds, beside ``file``; a line that says where.

    They are in the order of their final losses; where there is a dense one, also as differences to it.
    """
    results, curves = read(file), read_curves(file)
    best = best_rates(results)
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.rate == best[result.settings] and result.run in curves:
            groups[result.settings].append(result)
    shown: dict[str, tuple[Points, Points]] = {}
    for own in sorted(groups.values(), key=lambda group: _mean([r.val_loss for r in group])):
        seeds = f", {len(own)} seeds" if len(own) > 1 else ""
        label = f"{own[0].method}, rate {own[0].rate:g}{seeds}"
        points = mean_curve([curves[r.run] for r in own])
        train = [(float(tokens), loss) for _, tokens, loss, _ in points if not math.isnan(loss)]
        val = [(float(tokens), loss) for _, tokens, _, loss in points if not math.isnan(loss)]
        shown.setdefault(label, (smooth(train), val))
    if not shown:
        return "No loss curves to draw."
    picture = file.with_name(f"{file.stem}-curves.svg")
    title = f"GPT-2, {', '.join(dict.fromkeys(r.gpu for r in results))}"
    dense = next((label for label in shown if label.startswith("dense,")), None)
    if not loss_curves(picture, shown, title, against=dense if len(shown) > 1 else None):
        return "Loss curves not drawn: matplotlib is not installed (extra bench)."
    return f"Loss curves: {picture}"


def mean_curve(curves: Sequence[Curve]) -> list[Point]:
    """The mean loss over runs at each point that all of them have; a run that diverged leaves no points after that."""
    by_key = [{(point[0], math.isnan(point[2])): point for point in curve.points} for curve in curves]
    means = []
    for key, (step, tokens, *_) in by_key[0].items():
        if all(key in points for points in by_key):
            losses = [[points[key][which] for points in by_key] for which in (2, 3)]
            means.append((step, tokens, statistics.mean(losses[0]), statistics.mean(losses[1])))
    return means


def _mean(values: Sequence[float]) -> float:
    """Infinite if a run among them diverged: no best rate, then."""
    return math.inf if any(math.isnan(value) for value in values) else statistics.mean(values)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _spread(values: Sequence[float]) -> str:
    mean = f"{_mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 and math.isfinite(_mean(values)) else mean
