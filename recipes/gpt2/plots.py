"""Loss curves as SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.plot_style import COLOURS, STYLE

Points = Sequence[tuple[float, float]]


def loss_curves(file: Path, curves: Mapping[str, tuple[Points, Points]], title: str) -> bool:
    """Draw training losses as lines and validation losses as points.

    Args:
        file: an .svg; its folder exists.
        curves: for each label, (tokens, loss) of training and of validation.
        title: above the picture.

    Returns:
        False where matplotlib (extra ``bench``) is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 5))
        last = []
        for i, (label, (train, val)) in enumerate(curves.items()):
            colour, dashed = COLOURS[i % len(COLOURS)], i >= len(COLOURS)
            axes.plot(*_columns(train), color=colour, linewidth=1, alpha=0.6, linestyle="--" if dashed else "-")
            axes.plot(
                *_columns(val), color=colour, marker="o", markersize=4, linestyle="none" if train else "-", label=label
            )
            last += [loss for _, loss in (*train[len(train) // 10 :], *val)]
        if last:  # the first steps, at ln(vocabulary), would take most of the height
            low, high = min(last), max(last)
            axes.set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)
        axes.set_xlabel("tokens, millions")
        axes.set_ylabel("loss, nats a token")
        axes.set_title(f"{title} (line: training, points: validation)")
        axes.grid(axis="y", linewidth=0.4)
        axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return True


def smooth(points: Points, least: int = 60) -> Points:
    """Means of consecutive points, so many that about ``least`` remain."""
    size = max(1, len(points) // least)
    parts = [points[i : i + size] for i in range(0, len(points) - size + 1, size)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [tokens / 1e6 for tokens, _ in points], [loss for _, loss in points]
