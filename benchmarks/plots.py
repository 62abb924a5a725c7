"""Pictures of the results, as SVG: blue and orange of Okabe and Ito, which colour-blind readers tell apart."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plot_style import STYLE
from benchmarks.rows import Row
from benchmarks.targets import TARGETS

BLUE, ORANGE, BLACK = "#0072B2", "#E69F00", "#000000"
Bars = tuple[str, str, str, str]  # label, suite, measure, colour

SPEEDUPS: tuple[Bars, ...] = (
    ("training step", "steps", "step+resetup", BLUE),
    ("prefill", "prefill", "forward", ORANGE),
)
PRODUCTS: tuple[Bars, ...] = (
    ("forward", "layers", "forward graph", BLUE),
    ("input gradient", "layers", "dgrad graph", ORANGE),
)


def speedups(rows: Sequence[Row], file: Path) -> bool:
    """Whole blocks against dense, a pair of bars a model; False if there is nothing to show."""
    cases = _cases(rows, SPEEDUPS)
    if not cases:
        return False
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 4))
        places = range(len(cases))
        for i, bars in enumerate(SPEEDUPS):
            heights = _ratios(rows, bars, cases)
            at = [x + (i - 0.5) * 0.38 for x in places]
            axes.bar(at, [h or 0 for h in heights], 0.36, color=bars[3], label=bars[0], zorder=2)
            inside = "white" if bars[3] == BLUE else BLACK  # at the foot, where no mark lies over it
            for x, height in zip(at, heights, strict=True):
                if height is not None:
                    axes.text(x, 0.04, f"{height:.2f}", ha="center", color=inside, fontsize=8, zorder=4)
            musts = {t.case: t.must for t in TARGETS if (t.suite, t.measure) == bars[1:3]}
            marked = [(x, musts[case]) for x, case in zip(at, cases, strict=True) if case in musts]
            axes.plot([x for x, _ in marked], [y for _, y in marked], linestyle="none", marker="_", markersize=16,
                      markeredgewidth=2, color=BLACK, zorder=3, label="demanded" if i == 0 else None)  # fmt: skip
        axes.axhline(1, color=BLACK, linestyle="--", linewidth=0.8, zorder=3)
        axes.set_xticks([*places], cases, rotation=20, ha="right")
        axes.set_ylabel("speed-up over dense (dense = 1.0)")
        axes.set_ylim(0.0, 1.15 * max(axes.get_ylim()[1], 1.0))
        axes.set_title(f"One transformer block, 2:4 sparse, bf16: {rows[0].gpu}")
        axes.legend(frameon=False, ncols=3, loc="upper left")
        _save(figure, file)
    return True


def products(rows: Sequence[Row], file: Path) -> bool:
    """Sparse products of single layers against dense, kernels alone; False if there is nothing to show."""
    cases = _cases(rows, PRODUCTS)
    if not cases:
        return False
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 1.4 + 0.36 * len(cases)))
        for i, bars in enumerate(PRODUCTS):
            at = [y + (i - 0.5) * 0.38 for y in range(len(cases))]
            widths = _ratios(rows, bars, cases)
            axes.barh(at, [w or 0 for w in widths], 0.36, color=bars[3], label=bars[0], zorder=2)
            best = [
                (w, y)
                for w, y in zip(_ratios(rows, bars, cases, "torch_sparse_best"), at, strict=True)
                if w is not None
            ]
            axes.plot([w for w, _ in best], [y for _, y in best], linestyle="none", marker="D", markersize=4, color=BLACK,
                      zorder=3, label="cuSPARSELt, best algorithm" if i == 0 else None)  # fmt: skip
        _finish_products(axes, rows, cases)
        _save(figure, file)
    return True


def _finish_products(axes: Axes, rows: Sequence[Row], cases: list[str]) -> None:
    axes.axvline(1, color=BLACK, linestyle="--", linewidth=0.8, zorder=2.5)
    axes.set_ylim(-0.6, len(cases) - 0.4)
    sizes = {row.case: f"{row.case}  {row.tokens} x {row.d_in} -> {row.d_out}" for row in rows if row.suite == "layers"}
    axes.set_yticks([*range(len(cases))], [sizes[case] for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("speed-up over the dense product (dense = 1.0)")
    axes.set_title(f"2:4 products, bf16, kernels alone: {rows[0].gpu}", pad=26)
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _cases(rows: Sequence[Row], bars: tuple[Bars, ...]) -> list[str]:
    wanted = {(suite, measure) for _, suite, measure, _ in bars}
    found = [row for row in rows if (row.suite, row.measure) in wanted and row.variant == "slope" and row.ratio]
    return [*dict.fromkeys(row.case for row in found)]


def _ratios(rows: Sequence[Row], bars: Bars, cases: list[str], variant: str = "slope") -> list[float | None]:
    found = {
        row.case: row.ratio
        for row in rows
        if (row.suite, row.measure, row.variant, row.precision) == (bars[1], bars[2], variant, "bf16-true")
    }
    return [found.get(case) for case in cases]


def _save(figure: Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
