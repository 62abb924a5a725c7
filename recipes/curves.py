"""Draw the loss curves of several runs on one picture, and their differences to the first.

    python -m recipes.curves --out curves.svg "dense: runs/bert_pretrain/version_0" "2:4: runs/bert_pretrain/version_1"

A run is a folder with the curve.csv that the pretraining recipes leave, or that file.
"""

import argparse
import csv
import sys
from pathlib import Path

from recipes.loss_plot import Points, loss_curves, smooth
from recipes.meter import CURVE

_COLUMNS = {"step", "tokens", "train_loss", "val_loss"}


def main(arguments: list[str] | None = None) -> int:
    """Draw; exit status 1 where matplotlib is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="'LABEL: FOLDER'", help="of a run; the first is what others differ from"
    )
    parser.add_argument("--out", type=Path, required=True, help="an .svg")
    parser.add_argument("--title", default="Loss")
    options = parser.parse_args(arguments)
    curves = {}
    for text in options.runs:
        label, colon, place = text.rpartition(": ")
        if not colon or not label.strip():
            parser.error(f"{text!r}: 'LABEL: FOLDER' is expected")
        if label in curves:
            parser.error(f"{label!r} comes twice: each run needs a label of its own")
        train, val = read(Path(place.strip()))
        curves[label] = (smooth(train), val)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    first = next(iter(curves))
    if not loss_curves(options.out, curves, options.title, against=first if len(curves) > 1 else None):
        print("Not drawn: matplotlib is not installed (extra bench).", file=sys.stderr)
        return 1
    print(f"Loss curves: {options.out}")
    return 0


def read(place: Path) -> tuple[Points, Points]:
    """Training and validation losses of a run, as (tokens, loss).

    Raises:
        SystemExit: if there is no such file, or it is another one.
    """
    file = place / CURVE if place.is_dir() else place
    if not file.is_file():
        raise SystemExit(
            f"{file}: no such file; a folder with {CURVE}, as the pretraining recipes leave it, is expected"
        )
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or set(rows[0]) != _COLUMNS:
        found = ", ".join(rows[0]) if rows else "none"
        raise SystemExit(f"{file}: its columns are {found}, expected {', '.join(sorted(_COLUMNS))}")
    train = [(float(row["tokens"]), float(row["train_loss"])) for row in rows if row["train_loss"]]
    return train, [(float(row["tokens"]), float(row["val_loss"])) for row in rows if row["val_loss"]]


if __name__ == "__main__":
    sys.exit(main())
