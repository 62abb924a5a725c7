"""Rows as tables: a line a case, a column a measure and variant; for the terminal and for Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.rows import Row

Line = tuple[str, int, str]  # case, tokens, precision
Column = tuple[str, str]  # measure, variant
WEIGHTS = "memory of a weight"  # as good as the same for every shape
CLOCKS = ("eager", "graph")
ORDER = (
    "refresh",
    "adapters",
    "decode",
    "tiling",
    "layers",
    "host",
    "peers",
    "memory",
    "blocks",
    "prefill",
    "steps",
)  # tables


@dataclass(frozen=True)
class Table:
    """What belongs side by side.

    Attributes:
        title: suite, and the clock or kind where a suite has several.
        lines: of the table, in order of appearance.
        columns: likewise.
        cells: the rows that have a number.
    """

    title: str
    lines: list[Line]
    columns: list[Column]
    cells: dict[tuple[Line, Column], Row]


def tables(rows: Sequence[Row]) -> list[Table]:
    """All tables of some rows, which hold each number once."""
    titles: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: ORDER.index(row.suite)):
        if row.median is not None:
            titles.setdefault(_title(row), []).append(row)
    made = []
    for title, own in titles.items():
        cells = {(_line(row), (row.measure, row.variant)): row for row in own}
        lines, columns = [*dict.fromkeys(line for line, _ in cells)], [*dict.fromkeys(column for _, column in cells)]
        made.append(Table(title, lines, columns, cells))
    return made


def without_number(rows: Sequence[Row]) -> list[Row]:
    """Failures and what was skipped."""
    return [row for row in rows if row.median is None]


def _title(row: Row) -> str:
    clock = row.measure.rpartition(" ")[2]
    if clock in CLOCKS:
        return f"{row.suite}, {clock}"
    if row.suite == "memory":
        return WEIGHTS if row.metric == "bits" else "memory of a step"
    return row.suite


def _line(row: Row) -> Line:
    return row.case, row.tokens, row.precision


def text(rows: Sequence[Row]) -> str:
    """For a terminal: ratios where there are any, else the number; headings are stacked to keep columns narrow."""
    return "\n\n".join([*(_text_table(table) for table in tables(rows)), *_text_failures(without_number(rows))])


def _text_table(table: Table) -> str:
    # A dense column would be ones wherever it is compared with, so it shows only where it is all there is.
    columns = [column for column in table.columns if column[1] != "dense"] or table.columns
    heads = [_stack(measure, variant) for measure, variant in columns]
    height = max(len(head) for head in heads)
    padded = [[""] * (height - len(head)) + head for head in heads]
    body = [["", "", "", *words] for words in zip(*padded, strict=True)]
    lines = [[line[0], str(line[1]), line[2], *(_short(table.cells.get((line, column))) for column in columns)]
             for line in table.lines]  # fmt: skip
    body += _merged(lines) if table.title == WEIGHTS else lines
    if len({line[2] for line in table.lines}) == 1:  # said once, in the title
        body = [[*cells[:2], *cells[3:]] for cells in body]
    widths = [max(len(cells[i]) for cells in body) for i in range(len(body[0]))]
    aligned = (
        " ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        for cells in body
    )
    same = f", {table.lines[0][2]}" if len(body[0]) == len(columns) + 2 else ""
    return "\n".join([f"== {table.title}{same}", *(line.rstrip() for line in aligned)])


def _merged(body: list[list[str]]) -> list[list[str]]:
    """Cases that agree in precision and every cell on one line."""
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for cells in body:
        groups.setdefault(tuple(cells[2:]), []).append(cells)
    return [own[0] if len(own) == 1 else [f"{len(own)} alike", "", *cells] for cells, own in groups.items()]


def _stack(measure: str, variant: str) -> list[str]:
    """A heading in short words, one below the other."""
    words = [word for word in measure.split() if word not in CLOCKS]
    return [*words, *variant.replace("torch_sparse", "torch-sparse").split("_")]


def _short(row: Row | None) -> str:
    if row is None or row.median is None:
        return "-"
    return (
        quantity(row.median, row.metric).replace(" ", "")
        if row.ratio is None or row.variant == "dense"
        else f"{row.ratio:.3f}"
    )


def _text_failures(rows: Sequence[Row]) -> list[str]:
    """Each reason once, with how often it came."""
    reasons: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = row.suite, row.variant, row.note[:110]
        reasons[key] = reasons.get(key, 0) + 1
    lines = [f"{suite} {variant}: {note} (x{count})" for (suite, variant, note), count in reasons.items()]
    return ["\n".join(["== no number", *lines])] if lines else []


def markdown(table: Table) -> str:
    """With medians, and ratios behind them."""
    sized = any(line[2] != table.lines[0][2] for line in table.lines)
    head = ["case", "tokens", *(["precision"] if sized else [])]
    heads = [*head, *(f"{measure}: {variant}" for measure, variant in table.columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for line in table.lines:
        own = [line[0], str(line[1]), *([line[2]] if sized else [])]
        cells = [_long(table.cells.get((line, column))) for column in table.columns]
        lines.append("| " + " | ".join([*own, *cells]) + " |")
    return "\n".join(lines)


def _long(row: Row | None) -> str:
    if row is None or row.median is None:
        return "-"
    shown = "" if row.ratio is None or row.variant == "dense" else f" ({row.ratio:.3f})"
    return quantity(row.median, row.metric) + shown


def quantity(value: float, metric: str) -> str:
    """A number with its unit; bytes as GB or MB, powers of ten."""
    if metric == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
    return f"{value:.3g}" if metric == "ratio" else f"{value:.3g} {metric}"


def markdown_failures(rows: Sequence[Row]) -> str:
    """Everything that has no number, and why."""
    lines = ["| suite | case | measure | variant | why |", "|---|---|---|---|---|"]
    for row in rows:
        why = row.note.replace("|", "\\|")
        lines.append(f"| {row.suite} | {row.case} | {row.measure} | {row.variant} | {why} |")
    return "\n".join(lines)
