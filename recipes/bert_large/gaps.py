"""Draw how far each method ends from dense: a row a method, a panel a comparison.

    python -m recipes.bert_large.gaps --out gaps.svg recipes/bert_large/results/glue_minilm.csv

Each file is a CSV of glue_all or compare. A small point is one seed's difference to dense, a large one their mean; each method
at its best rate for each task, as in the tables. A method that was not run on all tasks has no point.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plot_style import COLOURS, STYLE, pyplot
from recipes.bert_large.glue_report import PUBLISHED_TASKS, dense_first, scores_at_best_rates
from recipes.bert_large.ledger import Result, read
from recipes.bert_large.methods import MASKS

Gaps = Mapping[str, Mapping[int, float]]


def main(arguments: list[str] | None = None) -> int:
    """Draw; exit status 1 where matplotlib is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.bert_large.gaps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="CSV", help="of glue_all or compare")
    parser.add_argument("--out", type=Path, required=True, help="an .svg")
    parser.add_argument("--title", default="Difference to dense")
    options = parser.parse_args(arguments)
    panels: dict[str, Gaps] = {}
    for file in options.files:
        if not file.is_file():
            raise SystemExit(f"{file}: no such file; a CSV of recipes.bert_large.glue_all or .compare is expected")
        panels |= panels_of(read(file))
    if not any(len(gaps) > 1 for gaps in panels.values()):
        raise SystemExit("There is no method beside dense that was run on the same tasks and seeds: nothing to draw.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not draw(options.out, panels, options.title):
        print("Not drawn: matplotlib is not installed (extra bench).", file=sys.stderr)
        return 1
    print(f"Differences to dense: {options.out}")
    return 0


def panels_of(results: Sequence[Result]) -> dict[str, Gaps]:
    """For each set of settings, by its title: differences to dense of each method, by seed.

    Args:
        results: of one file.
    """
    panels: dict[str, Gaps] = {}
    for settings in dict.fromkeys(r.settings for r in results):
        own = [r for r in results if r.settings == settings]
        present = {r.task for r in own}
        tasks = ["squad"] if "squad" in present else [task for task in PUBLISHED_TASKS if task in present]
        what = "SQuAD, F1" if tasks == ["squad"] else f"GLUE, mean of {len(tasks)} tasks"
        title = what if what not in panels else f"{what}\n{settings}"
        panels[title] = gaps(own, tasks)
    return panels


def gaps(results: Sequence[Result], tasks: Sequence[str]) -> Gaps:
    """Mean over tasks minus dense's, by method and seed; dense itself is first, and 0.

    Args:
        results: of one set of settings.
        tasks: the mean is of; a seed counts where a method and dense have all of them.
    """
    scores = scores_at_best_rates(results)
    differences = {}
    for label in sorted({r.label for r in results}, key=dense_first):
        pairs = [(scores.get((label, task), {}), scores.get(("dense", task), {})) for task in tasks]
        seeds = set.intersection(*(own.keys() & dense.keys() for own, dense in pairs)) if pairs else set()
        if seeds:
            differences[label] = {s: statistics.mean(own[s] - dense[s] for own, dense in pairs) for s in sorted(seeds)}
    return differences


def draw(file: Path, panels: Mapping[str, Gaps], title: str) -> bool:
    """Draw panels side by side, methods as shared rows.

    Args:
        file: an .svg; its folder exists.
        panels: for each title, differences by method and seed.
        title: above the picture.

    Returns:
        False where matplotlib (extra ``bench``) is not installed.
    """
    plt = pyplot()
    if plt is None:
        return False
    labels = sorted({label for found in panels.values() for label in found}, key=dense_first)
    rows = {label: -i for i, label in enumerate(labels)}
    with plt.rc_context(STYLE):
        size = (4 + 4.2 * len(panels), 1.2 + 0.34 * len(rows))
        figure, grid = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
        for axes, (name, found) in zip(grid[0], panels.items(), strict=True):
            _panel(axes, rows, found)
            axes.set_title(name)
            axes.set_xlabel("points to dense")
        grid[0, 0].set_yticks(list(rows.values()), [_short(label) for label in rows])
        figure.suptitle(f"{title}\n(small points: seeds, large: their mean)")
        figure.savefig(file, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.3)
        plt.close(figure)
    return True


def _panel(axes: Any, rows: Mapping[str, int], found: Gaps) -> None:
    axes.axvline(0, color="black", linewidth=0.8)
    for label, by_seed in found.items():
        colour, mean = _colour(label), statistics.mean(by_seed.values())
        axes.plot([mean, 0], [rows[label]] * 2, color=colour, linewidth=1, alpha=0.35)
        axes.plot(list(by_seed.values()), [rows[label]] * len(by_seed), "o", color=colour, markersize=3, alpha=0.6)
        axes.plot([mean], [rows[label]], "o", color=colour, markersize=7)
    axes.grid(axis="both", linewidth=0.4)


def _colour(label: str) -> str:
    """One for each mask."""
    masks = [mask for mask in MASKS if label.startswith(f"2:4 {mask},")]
    return "black" if not masks else COLOURS[1 + list(MASKS).index(masks[0])]


def _short(label: str) -> str:
    return label.removeprefix("2:4 ").replace("--model.", "")


if __name__ == "__main__":
    sys.exit(main())
