"""Turn CSV files of benchmarks.run into the tables and plots of benchmarks/README.md.

  python -m benchmarks.report --csv benchmarks/results/*.csv

Writes between the two comments of the README and SVG files beside the first CSV; a section a GPU. Of numbers measured more
than once the newest counts. Plots need matplotlib (`pip install matplotlib`).
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tables, targets
from benchmarks.rows import Row, latest, read

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results: written by benchmarks.report -->", "<!-- end of results -->"
NOTHING = "Not measured yet."


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, render, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--csv", type=Path, nargs="*", default=[], help="files of benchmarks.run; without any: not measured"
    )
    parser.add_argument("--readme", type=Path, default=README, help="file with the two comments")
    parser.add_argument("--plots", type=Path, help="folder of the SVG files; by default the first CSV's")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    given = parser.parse_args(arguments)
    missing = [str(file) for file in given.csv if not file.is_file()]
    if missing:
        raise SystemExit(f"no such file: {', '.join(missing)}; `python -m benchmarks.run all --out FILE` writes one")
    text = NOTHING
    if given.csv:
        folder = None if given.no_plots else given.plots or given.csv[0].parent
        text = render(read(given.csv), folder, given.readme.parent)
    given.readme.write_text(insert(given.readme.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(f"wrote {given.readme}")


def insert(readme: str, text: str) -> str:
    """The README with ``text`` between its two comments.

    Raises:
        ValueError: if the comments are not there, once each and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the README needs the lines {BEGIN!r} and {END!r}, once each and in this order")
    head, _, rest = readme.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def render(rows: Sequence[Row], plots: Path | None, home: Path) -> str:
    """A section a GPU; plots are drawn into ``plots`` and linked relative to ``home``."""
    gpus = dict.fromkeys(row.gpu for row in rows)
    sections = [_section(gpu, latest([row for row in rows if row.gpu == gpu]), plots, home) for gpu in gpus]
    return "\n\n".join(sections) or NOTHING


def _section(gpu: str, rows: list[Row], plots: Path | None, home: Path) -> str:
    parts = [f"### {gpu}", _provenance(rows), targets.markdown(rows)]
    parts += _plots(gpu, rows, plots, home) if plots is not None else []
    parts += [_folded(table.title, tables.markdown(table)) for table in tables.tables(rows)]
    empty = tables.without_number(rows)
    if empty:
        parts.append(_folded(f"failed or skipped: {len(empty)}", tables.markdown_failures(empty)))
    return "\n\n".join(parts)


def _provenance(rows: Sequence[Row]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(row, name)) for row in rows))

    days = sorted({row.time[:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"Measured {when}: torch {all_of('torch')}, CUDA {all_of('cuda')}, cuSPARSELt {all_of('cusparselt')}, driver "
        f"{all_of('driver')}, slope_pl {all_of('slope_pl')}, commit {all_of('commit')}, seed {all_of('seed')}."
    )


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _plots(gpu: str, rows: Sequence[Row], folder: Path, home: Path) -> list[str]:
    from benchmarks import plots  # here: tables need no matplotlib

    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    links = []
    for name, draw, words in (
        ("speedup", plots.speedups, "Training step and prefill of one block against dense"),
        ("products", plots.products, "Sparse products of single layers against dense"),
    ):
        file = folder / f"{slug}-{name}.svg"
        if draw(rows, file):
            links.append(f"![{words}]({_relative(file, home)})")
    return links


def _relative(file: Path, home: Path) -> str:
    file, home = file.resolve(), home.resolve()
    return file.relative_to(home).as_posix() if file.is_relative_to(home) else file.as_posix()


if __name__ == "__main__":
    main()
