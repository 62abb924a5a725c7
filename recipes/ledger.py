"""CSV files with one dataclass a row: what comparisons keep their results in."""

import csv
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


def read_rows(file: Path, kind: type[Row]) -> list[Row]:
    """All rows of a file, in order; none if there is no file.

    Raises:
        SystemExit: if it is another kind of CSV, or a row is damaged.
    """
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    kinds: dict[str, Any] = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    if rows and rows[0].keys() != kinds.keys():
        raise SystemExit(
            f"{file}: its columns are {', '.join(rows[0])}, expected {', '.join(kinds)}; give another --csv"
        )
    try:
        return [kind(**{key: kinds[key](text) for key, text in row.items()}) for row in rows]
    except (TypeError, ValueError) as error:
        raise SystemExit(f"{file}: a row is damaged ({error}); remove it, its run is made again") from error


def append_row(file: Path, row: Any) -> None:
    """Add a row, and the header to a new file."""
    append_lines(file, [field.name for field in fields(row)], [list(asdict(row).values())])


def append_lines(file: Path, header: list[str], rows: list[list[Any]]) -> None:
    """Add plain rows, and the header to a new file."""
    new = not file.is_file() or not file.stat().st_size
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if new:
            writer.writerow(header)
        writer.writerows(rows)
