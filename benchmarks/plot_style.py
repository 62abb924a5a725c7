"""How pictures look: SVG, in the colours of Okabe and Ito, which colour-blind readers tell apart."""

from typing import Any

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: a tenth of the size
    "svg.hashsalt": "slope_pl",  # the same picture gives the same file
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",  # also where the page is dark
}


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing SVG; None where it (extra ``bench``) is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    return plt
