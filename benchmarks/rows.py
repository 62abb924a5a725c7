"""The CSV file: one line a measured number, with everything needed to judge it."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measured number and where it comes from.

    Attributes:
        time: UTC, ISO 8601.
        suite: which suite made it.
        case: model or layer.
        d_in: of the layer; of a block the width of its residual stream.
        d_out: of the layer; of a block the width of its MLP.
        tokens: rows of the input.
        precision: as Lightning names it (``bf16-true``, ``bf16-mixed``), or the dtype.
        variant: who is measured: ``dense``, ``slope`` ...
        measure: what is measured: ``forward``, ``step`` ...
        metric: unit of the three numbers: ms, us, bytes, bits (a weight) or GB/s.
        median: the number.
        p10: tenth percentile of the samples.
        p90: ninetieth percentile.
        n: samples.
        ratio: against ``dense`` of the same run. Times: dense / this, above 1 is faster. Bytes and bits: this / dense, below
            1 is smaller. Empty where there is no dense counterpart.
        gpu: name of the GPU, or of the processor.
        driver: of the GPU.
        torch: version.
        cuda: version torch was built for.
        cusparselt: version that torch loads.
        slope_pl: version.
        commit: of this code; ``+dirty`` where files differ from it.
        seed: of weights and data.
        note: conditions, or why there is no number.
    """

    time: str
    suite: str
    case: str
    d_in: int
    d_out: int
    tokens: int
    precision: str
    variant: str
    measure: str
    metric: str
    median: float | None
    p10: float | None
    p90: float | None
    n: int
    ratio: float | None
    gpu: str
    driver: str
    torch: str
    cuda: str
    cusparselt: str
    slope_pl: str
    commit: str
    seed: int
    note: str


_WHOLE = ("d_in", "d_out", "tokens", "n", "seed")
_REAL = ("median", "p10", "p90", "ratio")


def append(file: Path, row: Row) -> None:
    """Add a line, and the header to a new file.

    Raises:
        ValueError: if the file has other columns: it was written by another version of this code.
    """
    names = [field.name for field in fields(Row)]
    new = not file.is_file() or file.stat().st_size == 0
    file.parent.mkdir(parents=True, exist_ok=True)
    if not new:
        with file.open(newline="", encoding="utf-8") as stream:
            found = next(csv.reader(stream))
        if found != names:
            raise ValueError(f"{file} has the columns {found}, expected {names}; write to another file")
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names)
        if new:
            writer.writeheader()
        values = asdict(row)
        writer.writerow({key: _text(value) for key, value in values.items()})


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read(files: Sequence[Path]) -> list[Row]:
    """All rows of several files, in order of time."""
    rows = []
    for file in files:
        with file.open(newline="", encoding="utf-8") as stream:
            rows += [_row(record) for record in csv.DictReader(stream)]
    return sorted(rows, key=lambda row: row.time)


def _row(record: dict[str, str]) -> Row:
    values: dict[str, object] = dict(record)
    values.update({key: int(record[key]) for key in _WHOLE})
    values.update({key: float(record[key]) if record[key] else None for key in _REAL})
    return Row(**values)  # type: ignore[arg-type]


def latest(rows: Sequence[Row]) -> list[Row]:
    """The newest row of everything that was measured more than once on the same GPU; a newer failure counts."""
    newest: dict[tuple[object, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row.time):
        newest[row.gpu, row.suite, row.case, row.tokens, row.precision, row.variant, row.measure] = row
    return list(newest.values())
