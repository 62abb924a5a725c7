"""The Markdown table of a GLUE comparison beside the published one, over the same tasks."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from recipes.bert_large.ledger import Result
from recipes.bert_large.methods import STARTS, Run
from slope_pl.data.glue_tasks import TASKS

# SLoPe, BERT-Large on GLUE, by task (slope-method.md, 10.9): Matthews, accuracy, F1, not stated, F1, accuracy x 3.
PUBLISHED_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "rte", "mnli", "qnli")
PUBLISHED: Mapping[str, tuple[float, ...]] = {
    "dense": (51.6, 91.9, 81.2, 87.5, 87.8, 66.4, 84.1, 91.3),
    "SLoPe, r = 0": (37.9, 91.4, 85.4, 86.6, 85.8, 62.5, 80.7, 88.6),
    "SLoPe, r = 4": (38.5, 91.4, 85.8, 86.8, 85.8, 63.9, 80.8, 88.4),
    "SLoPe, r = 16": (39.2, 91.3, 86.4, 86.6, 86.0, 63.5, 80.8, 88.2),
    "SLoPe, r = 64": (42.7, 90.3, 85.1, 86.8, 85.7, 66.4, 80.3, 88.5),
    "Wanda 2:4": (43.0, 91.4, 88.3, 86.9, 86.1, 63.5, 81.9, 89.6),
}


def best_rates(results: Sequence[Result]) -> dict[tuple[str, str, str], float]:
    """By (settings, task, method's label): the rate of highest mean score, of those with the most seeds.

    A rate that was chosen with one seed and then run with more is not dropped for one that was merely lucky once.
    """
    scores: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for result in results:
        key = result.settings, result.task, result.label
        scores.setdefault(key, {}).setdefault(result.rate, []).append(result.score)

    def rank(values: list[float]) -> tuple[int, float]:
        return len(values), statistics.mean(values)

    return {key: max(rates, key=lambda rate: rank(rates[rate])) for key, rates in scores.items()}


def scores_at_best_rates(results: Sequence[Result]) -> dict[tuple[str, str], dict[int, float]]:
    """By (method's label, task), then by seed: the score at the method's best rate.

    Args:
        results: of one set of settings.
    """
    best = best_rates(results)
    found: dict[tuple[str, str], dict[int, float]] = {}
    for r in results:
        if r.rate == best[r.settings, r.task, r.label]:
            found.setdefault((r.label, r.task), {})[r.seed] = r.published
    return found


def dense_first(label: str) -> tuple[bool, list[tuple[int, str]]]:
    """Order of methods; numbers in them count as such: r = 4 comes before r = 16."""
    parts = re.findall(r"\d+|\D+", label)
    return label != "dense", [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def report(results: Sequence[Result]) -> str:
    """A table for each set of settings, then the published one; methods at their own best rate for each task.

    Differences to dense are over the seeds that both have.
    """
    if not results:
        return "No results yet."
    tasks = [task for task in TASKS if any(r.task == task for r in results)]
    compared = [task for task in PUBLISHED_TASKS if task in tasks]
    parts = []
    for settings in dict.fromkeys(r.settings for r in results):
        own = [r for r in results if r.settings == settings]
        parts.append(f"{settings}\n\n{_table(own, tasks, compared)}\n\n{_rates(own)}")
        parts += filter(None, [start_gains(own, tasks, compared), rank_gains(own, tasks, compared)])
    if compared and not all(r.settings.startswith("glue_sample.yaml") for r in results):
        left_out = [task for task in PUBLISHED_TASKS if task not in compared]
        note = f", without {', '.join(left_out)}, which are not above" if left_out else ""
        parts.append(f"Published for BERT-Large pretrained sparse{note}:\n\n{published(tasks, compared)}")
    return "\n\n".join(parts)


def _table(results: Sequence[Result], tasks: Sequence[str], compared: Sequence[str]) -> str:
    scores = scores_at_best_rates(results)
    lines = _header(tasks, compared, "seeds | ")
    dense: dict[str, dict[int, float]] = {}
    for label in sorted({r.label for r in results}, key=dense_first):
        by_task = {task: scores.get((label, task), {}) for task in tasks}
        mean = difference = "-"
        if compared and all(by_task[task] for task in compared):
            score = statistics.mean(statistics.mean(by_task[task].values()) for task in compared)
            dense = by_task if label == "dense" else dense
            common = set.intersection(*(set(by_task[task]) for task in compared))
            # The spread of the average: of the averages that each seed gives.
            averages = [statistics.mean(by_task[task][seed] for task in compared) for seed in sorted(common)]
            mean = f"**{score:.2f}**" + (f" ± {statistics.stdev(averages):.2f}" if len(averages) > 1 else "")
            pairs = [paired(by_task[task], dense.get(task, {})) for task in compared]
            known = [pair for pair in pairs if pair is not None]
            difference = f"{statistics.mean(known):+.2f}" if len(known) == len(pairs) else "-"
        cells = [spread(list(values.values())) for values in by_task.values()]
        count = _count(len(values) for values in by_task.values() if values)
        lines.append(f"| {label} | {count} | {' | '.join(cells)} | {mean} | {difference} |")
    return "\n".join(lines)


def published(tasks: Sequence[str], compared: Sequence[str]) -> str:
    """The published rows, cut to the tasks of a comparison, with the mean over these."""
    lines = _header(tasks, compared, "")
    dense = 0.0
    for label, values in PUBLISHED.items():
        by_task = dict(zip(PUBLISHED_TASKS, values, strict=True))
        cells = [f"{by_task[task]}" if task in by_task else "-" for task in tasks]
        mean = statistics.mean(by_task[t] for t in compared)
        dense = mean if label == "dense" else dense
        lines.append(f"| {label} | {' | '.join(cells)} | {mean:.2f} | {mean - dense:+.2f} |")
    return "\n".join(lines)


def _header(tasks: Sequence[str], compared: Sequence[str], extra: str) -> list[str]:
    names = [f"{TASKS[task].folder} ({_metric(task)})" for task in tasks]
    columns = f"method | {extra}{' | '.join(names)} | mean of {len(compared)} | to dense"
    return [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1)]


def _metric(task: str) -> str:
    short = {"matthews": "Matthews", "accuracy": "acc.", "f1": "F1", "score": "r, rho"}
    return short[TASKS[task].published]


def rank_gains(results: Sequence[Result], tasks: Sequence[str], averaged: Sequence[str] = ()) -> str:
    """Ranks against gain: what adapters add to the same method without them; see :func:`_gains`."""
    title = "Ranks against gain, points over the same method at r = 0:"
    return _gains(title, results, tasks, averaged, _without_adapters)


def start_gains(results: Sequence[Result], tasks: Sequence[str], averaged: Sequence[str] = ()) -> str:
    """What a start adds to the same one without its arguments, or without the first of its parts; see :func:`_gains`."""
    title = "What each start adds, points over the same method with one part less:"
    return _gains(title, results, tasks, averaged, _one_part_less)


def _without_adapters(run: Run) -> Run | None:
    return replace(run, rank=0, start=run.without("early")) if run.rank else None


def _one_part_less(run: Run) -> Run | None:
    if run.method != "sparse":
        return None
    if run.arguments:
        return replace(run, arguments="")
    part = next((part for part in STARTS if part in run.starts), None)
    return None if part is None else replace(run, start=run.without(part))


def _gains(
    title: str,
    results: Sequence[Result],
    tasks: Sequence[str],
    averaged: Sequence[str],
    base_of: Callable[[Run], Run | None],
) -> str:
    """A table of differences to another method, each at its own best rate, over the seeds that both have.

    Args:
        title: a line before it.
        results: of one set of settings.
        tasks: the columns.
        averaged: those of the last column, a mean, as far as all methods of the table were run on them; none: no such column.
        base_of: what a run is compared with; None for one that is not.

    Returns:
        Markdown, or "" where there is nothing to compare.
    """
    found = scores_at_best_rates(results)
    rows: dict[tuple[str, int, str], dict[str, tuple[float, int]]] = {}
    for r in results:
        base = base_of(r.run)
        if base is None:
            continue
        own, theirs = found[r.label, r.task], found.get((base.label, r.task), {})
        gain = paired(own, theirs)
        if gain is not None:
            rows.setdefault((base.label, r.rank, r.label), {})[r.task] = gain, len(own.keys() & theirs.keys())
    if not rows:
        return ""
    shared = [task for task in averaged if all(task in gains for gains in rows.values())]
    names = ["SQuAD (F1)" if task == "squad" else f"{TASKS[task].folder} ({_metric(task)})" for task in tasks]
    columns = " | ".join(["method", "seeds", *names, *([f"mean of {len(shared)}"] if shared else [])])
    lines = [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1)]
    for (_, _, label), gains in sorted(rows.items()):
        cells = [f"{gains[task][0]:+.2f}" if task in gains else "-" for task in tasks]
        cells += [f"{statistics.mean(gains[task][0] for task in shared):+.2f}"] if shared else []
        seeds = _count(count for _, count in gains.values())
        lines.append(f"| {label} | {seeds} | {' | '.join(cells)} |")
    return f"{title}\n\n" + "\n".join(lines)


def paired(own: Mapping[int, float], others: Mapping[int, float]) -> float | None:
    """Mean difference of scores by seed, over the seeds that both have; None if there is none."""
    common = own.keys() & others.keys()
    return statistics.mean(own[seed] - others[seed] for seed in common) if common else None


def _count(numbers: Iterable[int]) -> str:
    """Of seeds, in a cell."""
    counts = list(numbers)
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _rates(results: Sequence[Result]) -> str:
    """Score at every rate tried, where more than one was."""
    best, lines = best_rates(results), []
    for (_, task, label), rate in best.items():
        own = [r for r in results if (r.task, r.label) == (task, label)]
        tried = sorted({r.rate for r in own})
        if len(tried) > 1:
            means = (f"{r:g}: {statistics.mean(x.score for x in own if x.rate == r):.2f}" for r in tried)
            lines.append(f"* {task}, {label}: best at {rate:g} ({', '.join(means)})")
    if lines:
        return "Rates were chosen on the same rows, by the score of each:\n\n" + "\n".join(lines)
    return f"Rates: {', '.join(f'{rate:g}' for rate in sorted({r.rate for r in results}))}."


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
