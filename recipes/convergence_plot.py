"""The picture of how adapters converge: a row of panels for each run, a line for each kind of layer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plot_style import COLOURS, STYLE, pyplot
from recipes.convergence import KINDS, Point

PANELS = (
    ("cosine_down", "down"),
    ("cosine_up", "up"),
    ("cosine_product", "product up down"),
    ("cosine_down_change", "change of down"),
)


def convergence_curves(file: Path, runs: Mapping[str, Sequence[Point]], title: str) -> bool:
    """Draw the cosines to the final value against the steps since the wake.

    Args:
        file: an .svg; its folder exists.
        runs: for each label (empty for none), the means of the kinds of layers, see :func:`recipes.convergence.means_by_kind`.
        title: above the picture.

    Returns:
        False where matplotlib (extra ``bench``) is not installed.
    """
    plt = pyplot()
    if plt is None:
        return False
    found = dict.fromkeys(point.kind for points in runs.values() for point in points)
    kinds = [kind for kind in dict.fromkeys(KINDS.values()) if kind in found]
    kinds += [kind for kind in found if kind not in kinds]
    looks: dict[str, tuple[str, Any]] = {
        kind: (COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--") for i, kind in enumerate(kinds)
    }
    with plt.rc_context(STYLE):
        size = (3.1 * len(PANELS) + 0.6, 2.9 * len(runs) + 0.9)
        figure, grid = plt.subplots(len(runs), len(PANELS), figsize=size, squeeze=False, layout="constrained")
        for row, (label, points) in zip(grid, runs.items(), strict=True):
            for axes, (column, name) in zip(row, PANELS, strict=True):
                for kind, (colour, line) in looks.items():
                    axes.plot(*_line(points, kind, column), color=colour, linestyle=line, linewidth=1.2)
                low = min((y for kind in kinds for y in _line(points, kind, column)[1]), default=0.0)
                axes.set_xlim(left=0)
                axes.set_ylim(min(low, 0.0) - 0.03, 1.03)
                axes.set_title(f"{label}\n{name}" if label else name, fontsize=9)
                axes.set_xlabel("steps since the wake")
                axes.xaxis.get_major_locator().set_params(integer=True)
                axes.grid(axis="y", linewidth=0.4)
            row[0].set_ylabel("cosine to the final value")
        lines: list[Any] = [plt.Line2D([], [], color=c, linestyle=s) for c, s in looks.values()]
        figure.legend(lines, kinds, frameon=False, loc="outside lower center", ncols=min(len(kinds), 6))
        figure.suptitle(title)
        figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return True


def _line(points: Sequence[Point], kind: str, column: str) -> tuple[list[int], list[float]]:
    own = [(point.since_wake, float(getattr(point, column))) for point in points if point.kind == kind]
    known = [(x, y) for x, y in own if not math.isnan(y)]
    return [x for x, _ in known], [y for _, y in known]
