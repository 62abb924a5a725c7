"""The report of a comparison: each method at its own best rate, as Markdown, and all loss curves on one plot."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from recipes.gpt2.ledger import Curve, Point, Result, best_rates, mean_loss, read, read_curves
from recipes.gpt2.plans import labels, shared_arguments
from recipes.loss_plot import Points, loss_curves, smooth

HEADER = (
    "| method | best rate | seeds | validation loss | perplexity | tokens/s | seconds | peak GiB | loss at every rate tried |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def report(results: Sequence[Result]) -> str:
    """One table for each set of arguments that runs had in common, in the order of the file."""
    if not results:
        return "No results yet."
    return "\n\n".join(_table(own, shared) for (_, _, shared, _), own in _comparable(results).items())


def _comparable(results: Sequence[Result]) -> dict[tuple[str, int, str, str], list[Result]]:
    """Runs that can be compared, by family, number of steps, the arguments that all of them were given, and the text."""
    shared = shared_arguments(results)
    found: dict[tuple[str, int, str, str], list[Result]] = defaultdict(list)
    for result in results:
        found[result.family, result.steps, shared[result.settings], result.text].append(result)
    return found


def _table(results: Sequence[Result], shared: str) -> str:
    best, lines, edges = best_rates(results), [HEADER], False
    for settings, label in labels(results).items():
        own = [r for r in results if r.settings == settings]
        rate = best[settings]
        at_best = [r for r in own if r.rate == rate]
        tried = sorted({r.rate for r in own})
        edge = rate in (tried[0], tried[-1])
        edges |= edge
        others = ", ".join(f"{r:g}: {mean_loss([x.val_loss for x in own if x.rate == r]):.4f}" for r in tried)
        loss = [r.val_loss for r in at_best]
        lines.append(
            f"| {label} | {rate:g}{'*' if edge else ''} | {len(at_best)} | {_spread(loss)} | {_exp(mean_loss(loss)):.2f} | "
            f"{mean_loss([r.tokens_per_second for r in at_best]):,.0f} | {mean_loss([r.seconds for r in at_best]):.0f} | "
            f"{mean_loss([r.peak_bytes for r in at_best]) / 2**30:.2f} | {others} |"
        )
    given = f", all with `{shared}`" if shared else ""
    notes = [f"{results[0].family}: {results[0].steps:,} steps, {results[0].tokens:,} tokens a run{given}. "]
    if edges:
        notes.append("\\* the best rate is the lowest or highest tried: a better one may lie beyond. ")
    for name in ("gpu", "torch", "commit", "text"):
        found = [*dict.fromkeys(getattr(r, name) for r in results)]
        notes.append(f"{name.capitalize()}: {', '.join(found)}. ")
    return "\n".join([*lines, "", "".join(notes).strip()])


def draw(file: Path) -> str:
    """Draw the curve of each method at its best rate, the mean over its seeds, beside ``file``; a line that says where.

    They are in the order of their final losses; where there is a dense one, also as differences to it, over the seeds that both
    have (another seed sees other batches). What cannot be
    compared (another model size) is a picture of its own, the first in the file the one without a number.
    """
    results, curves = read(file), read_curves(file)
    lines = []
    for number, ((_, _, shared, _), own) in enumerate(_comparable(results).items(), 1):
        picture = file.with_name(f"{file.stem}-curves{f'-{number}' if number > 1 else ''}.svg")
        title = f"GPT-2{f' ({shared})' if shared else ''}, {', '.join(dict.fromkeys(r.gpu for r in own))}"
        lines += _draw(picture, own, curves, title)
    return "\n".join(lines) or "No loss curves to draw."


def _draw(picture: Path, results: Sequence[Result], curves: dict[str, Curve], title: str) -> list[str]:
    best, names = best_rates(results), labels(results)
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.rate == best[result.settings] and result.run in curves:
            groups[result.settings].append(result)
    shown: dict[str, tuple[Points, Points]] = {}
    bases: dict[str, tuple[Points, Points]] = {}
    against = next((own for own in groups.values() if own[0].method == "dense"), [])
    dense = None
    for own in sorted(groups.values(), key=lambda group: mean_loss([r.val_loss for r in group])):
        seeds = f", {len(own)} seeds" if len(own) > 1 else ""
        label = f"{names[own[0].settings].replace('`', '')}, rate {own[0].rate:g}{seeds}"
        shown[label] = _points([curves[r.run] for r in own])
        if own is against:
            dense = label
        elif twins := [r for r in against if r.seed in {mine.seed for mine in own}]:
            bases[label] = _points([curves[r.run] for r in twins])
    if not shown:
        return []
    if not loss_curves(picture, shown, title, dense if len(shown) > 1 else None, bases):
        return ["Loss curves not drawn: matplotlib is not installed (extra bench)."]
    return [f"Loss curves: {picture}"]


def _points(curves: Sequence[Curve]) -> tuple[Points, Points]:
    """Means of training and validation losses, as they are drawn."""
    points = mean_curve(curves)
    train = [(float(tokens), loss) for _, tokens, loss, _ in points if not math.isnan(loss)]
    return smooth(train), [(float(tokens), loss) for _, tokens, _, loss in points if not math.isnan(loss)]


def mean_curve(curves: Sequence[Curve]) -> list[Point]:
    """The mean loss over runs at each point that all of them have; a run that diverged leaves no points after that."""
    by_key = [{(point[0], math.isnan(point[2])): point for point in curve.points} for curve in curves]
    means = []
    for key, (step, tokens, *_) in by_key[0].items():
        if all(key in points for points in by_key):
            losses = [[points[key][which] for points in by_key] for which in (2, 3)]
            means.append((step, tokens, statistics.mean(losses[0]), statistics.mean(losses[1])))
    return means


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _spread(values: Sequence[float]) -> str:
    mean = f"{mean_loss(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 and math.isfinite(mean_loss(values)) else mean
