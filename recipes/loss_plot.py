"""Loss curves as SVG."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plot_style import COLOURS, STYLE, pyplot

Points = Sequence[tuple[float, float]]
_TITLE = 100  # characters a line


def loss_curves(
    file: Path,
    curves: Mapping[str, tuple[Points, Points]],
    title: str,
    against: str | None = None,
    bases: Mapping[str, tuple[Points, Points]] | None = None,
) -> bool:
    """Draw training losses as lines and validation losses as points.

    Args:
        file: an .svg; its folder exists.
        curves: for each label, (tokens, loss) of training and of validation.
        title: above the picture.
        against: the label whose losses are taken from all others' in a second panel; None for no such panel.
        bases: what is taken from a label's losses instead: where not all runs of ``against`` can be compared with its own.

    Returns:
        False where matplotlib (extra ``bench``) is not installed.
    """
    plt = pyplot()
    if plt is None:
        return False
    with plt.rc_context(STYLE):
        rows = 1 if against is None else 2
        figure, panels = plt.subplots(rows, figsize=(9, 1 + 4 * rows), squeeze=False, sharex=True)
        axes = panels[0, 0]
        last = _draw(axes, curves)
        if last:  # the first steps, at ln(vocabulary), would take most of the height
            low, high = min(last), max(last)
            axes.set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)
        axes.set_ylabel("loss, nats a token")
        axes.set_title(textwrap.fill(title, _TITLE) + "\n(line: training, points: validation)")
        beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if len(curves) > len(COLOURS) else {}
        axes.legend(handles=_keys(plt, curves), frameon=False, **beside)
        if against is not None:
            lower = panels[1, 0]
            taken = dict.fromkeys(curves, curves[against]) | dict(bases or {})
            last = _draw(lower, {label: _less(curve, taken[label]) for label, curve in curves.items()})
            low, high = min([0.0, *last]), max([0.0, *last])
            lower.set_ylim(low - 0.1 * (high - low) - 0.005, high + 0.1 * (high - low) + 0.005)
            lower.set_ylabel(f"loss minus that of\n{against}")
        for axes in panels[:, 0]:
            axes.grid(axis="y", linewidth=0.4)
        axes.set_xlabel("tokens, millions")
        figure.tight_layout()
        figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return True


def _draw(axes: Any, curves: Mapping[str, tuple[Points, Points]]) -> list[float]:
    """Draw the curves; returns what must be seen of them, which leaves out their first tenth."""
    seen = []
    for i, (label, (train, val)) in enumerate(curves.items()):
        style = _style(i)
        axes.plot(*_columns(train), **style | {"marker": "none", "linewidth": 1, "alpha": 0.6})
        axes.plot(*_columns(val), label=label, **style | ({"linestyle": "none"} if train else {}))
        seen += [loss for _, loss in (*train[len(train) // 10 :], *val)]
    return seen


def _style(number: int) -> dict[str, Any]:
    """Of one curve: colours come again with broken lines and hollow points."""
    colour, again = COLOURS[number % len(COLOURS)], number >= len(COLOURS)
    shape = {"linestyle": "--", "markerfacecolor": "white"} if again else {"linestyle": "-"}
    return {"color": colour, "marker": "o", "markersize": 4, **shape}


def _keys(plt: Any, labels: Iterable[str]) -> list[Any]:
    """What the legend shows."""
    return [plt.Line2D([], [], label=label, linewidth=1, **_style(i)) for i, label in enumerate(labels)]


def _less(curve: tuple[Points, Points], other: tuple[Points, Points]) -> tuple[Points, Points]:
    """The difference of two curves, where both have a point."""
    parts = []
    for mine, base in zip(curve, other, strict=True):
        known = dict(base)
        parts.append([(tokens, loss - known[tokens]) for tokens, loss in mine if tokens in known])
    return parts[0], parts[1]


def smooth(points: Points, least: int = 60) -> Points:
    """Means of consecutive points, so many that about ``least`` remain."""
    size = max(1, len(points) // least)
    parts = [points[i : i + size] for i in range(0, len(points) - size + 1, size)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [tokens / 1e6 for tokens, _ in points], [loss for _, loss in points]
