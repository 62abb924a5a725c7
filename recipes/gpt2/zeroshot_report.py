"""Scores of the zero-shot tasks, beside the published ones of GPT2-small."""

from dataclasses import dataclass
from typing import Any

from recipes.gpt2.zeroshot_tasks import TASKS

PUBLISHED_METRIC = "acc"
"""The paper does not name its metric. Its OpenBookQA, 16 %, and HellaSwag, 28.5 %, are what ``acc`` gives at this size."""

PUBLISHED_MODEL = "GPT2-small, 400,000 steps of 512 x 1024 tokens of OpenWebText"

_ORDER = ("mmlu", "arc_challenge", "openbookqa", "winogrande", "hellaswag", "mathqa", "piqa", "race")
# Mozaffari et al., ICLR 2025 (arXiv 2405.16325), zero-shot table of GPT2-small; adapter rank as share of the width. Printed
# as "0.05%" is rank 4 of 768, that is 0.5 %.
_ROWS = {
    "dense": (22.9, 20.7, 16.2, 50.6, 28.5, 21.8, 59.8, 28.4),
    "SLoPe r=0": (23.0, 19.3, 16.0, 50.1, 27.5, 20.8, 57.4, 27.1),
    "SLoPe 0.05%": (23.0, 19.4, 16.2, 50.5, 27.4, 20.8, 57.5, 27.1),
    "SLoPe 2.1%": (23.0, 19.3, 16.4, 50.8, 27.5, 20.8, 57.6, 27.2),
    "SR-STE r=0": (24.1, 18.3, 12.6, 47.5, 26.9, 21.2, 54.8, 24.0),
    "SR-STE 0.05%": (24.1, 18.4, 14.2, 47.5, 26.8, 21.2, 54.5, 24.2),
    "SR-STE 2.1%": (24.2, 18.3, 14.2, 47.5, 26.9, 21.4, 55.2, 24.2),
}
PUBLISHED = {column: dict(zip(_ORDER, values, strict=True)) for column, values in _ROWS.items()}
"""Per cent, by method and task; SR-STE is the paper's "Extended SR-STE"."""

RACE_NOTE = (
    "RACE: race-articles.txt (passages of the RACE training set) holds near-copies of a fifth of the test passages. "
    "Do not report this score for a model trained on it."
)


@dataclass(frozen=True)
class Score:
    """One number of one task.

    Attributes:
        task: key of ``TASKS``.
        metric: the harness' name: acc, acc_norm (by length in bytes) or perplexity.
        value: per cent, except for perplexity.
        stderr: its standard error, in the same unit; None where there are too few documents.
        documents: how many were scored.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int


def collect(results: dict[str, Any], names: list[str]) -> list[Score]:
    """Take the scores of ``names`` out of the harness' results, the published metric first."""
    scores = []
    for name in names:
        task = TASKS[name]
        found = results["results"][task.harness]
        counts = results["n-samples"]
        members = [key for key in counts if key.startswith(f"{task.harness}_")] if task.group else [task.harness]
        documents = sum(counts[key]["effective"] for key in members)
        for metric in ("acc", "acc_norm", "perplexity"):
            if f"{metric},none" not in found:
                continue
            unit = 1.0 if metric == "perplexity" else 100.0
            error = found.get(f"{metric}_stderr,none")
            stderr = float(error) * unit if isinstance(error, float) else None  # "N/A" for a single document
            scores.append(Score(name, metric, float(found[f"{metric},none"]) * unit, stderr, documents))
    return scores


def table(scores: list[Score], limit: int | None = None) -> str:
    """The scores as a table beside the published ones, with what a reader must know below it."""
    head = ["task", "metric", "items", "this model", "chance", *PUBLISHED]
    rows = [_row(score) for score in scores]
    compared = [score for score in scores if score.metric == PUBLISHED_METRIC and score.task in _ORDER]
    if len(compared) > 1:
        own = sum(score.value for score in compared) / len(compared)
        chance = sum(TASKS[score.task].chance for score in compared) / len(compared)
        means = [sum(column[score.task] for score in compared) / len(compared) for column in PUBLISHED.values()]
        title = f"mean of {len(compared)}"
        rows.append([title, PUBLISHED_METRIC, "", f"{own:.2f}", f"{chance:.1f}", *(f"{m:.2f}" for m in means)])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    own_width = sum(widths[:5]) + 2 * 4
    lines = [
        " " * own_width + f"  | published: {PUBLISHED_MODEL}",
        *(_line(row, widths) for row in [head, *rows]),
        "",
        "Accuracies in per cent, ours with their standard error. The paper does not name its metric; acc fits its numbers.",
    ]
    if limit is not None:
        lines.append(
            f"--limit {limit}: NOT a score, only the first {limit} documents of each task (of each subject of MMLU)."
        )
    if any(score.task == "race" for score in scores):
        lines.append(RACE_NOTE)
    return "\n".join(lines)


def _row(score: Score) -> list[str]:
    # An untrained model's perplexity has twenty digits.
    form = ".1f" if score.metric != "perplexity" else ".2f" if score.value < 1e6 else ".3g"
    error = "" if score.stderr is None else f" ± {score.stderr:{form}}"
    cells = [score.task, score.metric, f"{score.documents:,}", f"{score.value:{form}}{error}"]
    chance = TASKS[score.task].chance
    cells.append(f"{chance:.0f}" if chance and score.metric != "perplexity" else "")
    for column in PUBLISHED.values():
        comparable = score.metric == PUBLISHED_METRIC and score.task in column
        cells.append(f"{column[score.task]:.1f}" if comparable else "")
    return cells


def _line(cells: list[str], widths: list[int]) -> str:
    texts = [cells[i].ljust(widths[i]) if i < 2 else cells[i].rjust(widths[i]) for i in range(len(cells))]
    return ("  ".join(texts[:5]) + "  | " + "  ".join(texts[5:])).rstrip(" |")
