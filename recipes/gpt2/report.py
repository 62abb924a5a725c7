"""The report of a comparison: each method at its own best rate, as Markdown, and all loss curves on one plot."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from recipes.gpt2.ledger import Result, read, read_curves
from recipes.loss_plot import loss_curves, smooth

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
    """Draw the curves of each method at its best rate, first seed, beside ``file``; a line that says where.

    They are in the order of their final losses; where there is a dense one, also as differences to it.
    """
    results, curves = sorted(read(file), key=lambda result: result.val_loss), read_curves(file)
    best = best_rates(results)
    shown = {}
    for result in results:
        label = f"{result.method}, rate {result.rate:g}"
        if result.rate != best[result.settings] or label in shown or result.run not in curves:
            continue
        points = curves[result.run].points
        train = [(float(tokens), loss) for _, tokens, loss, _ in points if not math.isnan(loss)]
        val = [(float(tokens), loss) for _, tokens, _, loss in points if not math.isnan(loss)]
        shown[label] = (smooth(train), val)
    if not shown:
        return "No loss curves to draw."
    picture = file.with_name(f"{file.stem}-curves.svg")
    title = f"GPT-2, {', '.join(dict.fromkeys(r.gpu for r in results))}"
    dense = next((label for label in shown if label.startswith("dense,")), None)
    if not loss_curves(picture, shown, title, against=dense if len(shown) > 1 else None):
        return "Loss curves not drawn: matplotlib is not installed (extra bench)."
    return f"Loss curves: {picture}"


def _mean(values: Sequence[float]) -> float:
    """Infinite if a run among them diverged: no best rate, then."""
    return math.inf if any(math.isnan(value) for value in values) else statistics.mean(values)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _spread(values: Sequence[float]) -> str:
    mean = f"{_mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 and math.isfinite(_mean(values)) else mean
