"""What the project demands of one H200, beside what was measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.rows import Row


@dataclass(frozen=True)
class Target:
    """One line of the table "What it must reach".

    Attributes:
        title: for the reader.
        suite: of the rows it looks at.
        measure: likewise.
        must: the bound.
        aim: a stricter one, or None.
        at_least: whether larger is better.
        case: one model; None for the worst of all cases.
        precision: of the rows.
        against: another variant: the value is slope's median over its median.
        median: the value is the median rather than the ratio to dense.
        chosen: which rows count, all unless given.
    """

    title: str
    suite: str
    measure: str
    must: float
    aim: float | None = None
    at_least: bool = False
    case: str | None = None
    precision: str = "bf16-true"
    against: str | None = None
    median: bool = False
    chosen: Callable[[Row], bool] = lambda row: True


@dataclass(frozen=True)
class Verdict:
    """A target beside its measurement: the value, whose it is, and the verdict in words."""

    target: Target
    value: float | None
    case: str
    words: str


_SPMM = "SpMM kernel over cuSPARSELt's at its best algorithm, graph replay"
_TRAINING = {
    "gpt2-small": (1.10, 1.12),
    "bert-large": (1.15, 1.18),
    "1536": (1.17, 1.20),
    "llama-3-8b": (1.22, 1.27),
    "opt-13b": (1.23, 1.28),
    "opt-66b": (1.23, 1.28),
}
_PREFILL = {
    "gpt2-small": 1.18,
    "bert-large": 1.27,
    "1536": 1.27,
    "llama-3-8b": 1.35,
    "opt-13b": 1.35,
    "opt-66b": 1.32,
}

TARGETS = (
    Target("host time of a forward, no grad (us)", "host", "forward no_grad", 20, 15, median=True),
    Target("host time of a forward, recording (us)", "host", "forward grad", 20, 15, median=True),
    *(
        Target(f"{_SPMM}: {name}, every shape", "layers", f"{name} graph", 1.03, against="torch_sparse_best")
        for name in ("forward", "dgrad")
    ),
    # An aim without a demand of its own: where K is small, CUTLASS measured 10 to 19 % faster than cuSPARSELt.
    *(
        Target(f"{_SPMM}: {name}, K <= 1024", "layers", f"{name} graph", 1.03, 0.9, against="torch_sparse_best", chosen=small)
        for name, small in (("forward", lambda row: row.d_in <= 1024), ("dgrad", lambda row: row.d_out <= 1024))
    ),
    Target("operand refresh over a copy of its bytes, bf16 weights", "refresh", "refresh/copy", 2, median=True),
    Target("operand refresh over a copy of its bytes, fp32 weights", "refresh", "refresh/copy", 2, median=True,
           precision="bf16-mixed"),
    Target("operand refresh as share of a step", "steps", "refresh/step", 0.02, median=True),
    *(
        Target(f"training step against dense: {name}", "steps", "step+resetup", must, aim, at_least=True, case=name)
        for name, (must, aim) in _TRAINING.items()
    ),
    *(
        Target(f"prefill against dense: {name}", "prefill", "forward", must, at_least=True, case=name)
        for name, must in _PREFILL.items()
    ),
    Target("training memory of a weight, bf16 with fp32 Adam, of dense", "memory", "training, fp32 Adam", 0.63, 0.60),
    Target("training memory of a weight, fp32 under bf16-mixed, of dense", "memory", "training, fp32 Adam", 0.66,
           precision="bf16-mixed"),
    Target("stored inference weight, of dense", "memory", "inference", 0.57),
)  # fmt: skip


def verdict(target: Target, rows: Sequence[Row]) -> Verdict:
    """Judge a target by rows that hold each number once."""
    asked = [
        row
        for row in rows
        if (row.suite, row.measure, row.precision) == (target.suite, target.measure, target.precision)
    ]
    asked = [row for row in asked if (target.case is None or row.case == target.case) and target.chosen(row)]
    asked = [row for row in asked if not row.case.startswith("tiny")]  # of --quick
    values: list[tuple[float, str]] = []
    for row in asked:
        value = _value(target, row, asked) if row.variant == "slope" else None
        if value is not None:
            values.append((value, row.case))
    if not values:
        return Verdict(target, None, "", "not measured")
    value, case = min(values) if target.at_least else max(values)
    return Verdict(target, value, "" if target.case else case, _words(target, value))


def _value(target: Target, row: Row, rows: Sequence[Row]) -> float | None:
    if target.median:
        return row.median
    if target.against is None:
        return row.ratio
    others = [r.median for r in rows if (r.case, r.tokens, r.variant) == (row.case, row.tokens, target.against)]
    return row.median / others[0] if row.median is not None and others and others[0] else None


def _words(target: Target, value: float) -> str:
    if _reaches(value, target.must, target.at_least):
        return "met, aim too" if target.aim is not None and _reaches(value, target.aim, target.at_least) else "met"
    return f"missed by {100 * abs(value - target.must) / target.must:.3g} %"


def _reaches(value: float, bound: float, at_least: bool) -> bool:
    return value >= bound if at_least else value <= bound


def judged(rows: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """Title, demand, aim, measured value with the worst case's name, verdict; one a target."""
    lines = []
    for target in TARGETS:
        found = verdict(target, rows)
        sign = ">=" if target.at_least else "<="
        aim = "" if target.aim is None else f"{target.aim:g}"
        measured = "-" if found.value is None else f"{found.value:.3g}" + (f" ({found.case})" if found.case else "")
        lines.append((target.title, f"{sign} {target.must:g}", aim, measured, found.words))
    return lines


def text(rows: Sequence[Row]) -> str:
    """For a terminal: the targets that these rows can judge."""
    lines = [line for line in judged(rows) if line[4] != "not measured"]
    if not lines:
        return "== targets: these rows judge none"
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    body = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(["== targets: demand, aim, measured (worst case)", *body])


def markdown(rows: Sequence[Row]) -> str:
    """For the README: all targets."""
    lines = ["| measure | must | aim | measured (worst case) | |", "|---|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(line) + " |" for line in judged(rows)])
