"""How adapters came to be what they are at the end: cosines to the final value, by layer and by kind of layer, as CSV."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = {
    "attn.c_attn": "c_attn",
    "attn.c_proj": "c_proj (attn)",
    "mlp.c_fc": "c_fc",
    "mlp.c_proj": "c_proj (mlp)",
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention output",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "attention.q_lin": "query",  # DistilBERT's names
    "attention.k_lin": "key",
    "attention.v_lin": "value",
    "attention.out_lin": "attention output",
    "ffn.lin1": "intermediate",
    "ffn.lin2": "output",
}


class Adapter(NamedTuple):
    """The two factors of one layer at one step."""

    down: Tensor
    """``(r, d_in)``."""
    up: Tensor
    """``(d_out, r)``."""


@dataclass(frozen=True)
class Cosines:
    """Of one adapter to its final value; nan where a vector is zero, as ``up`` is at the wake, or not finite."""

    down: float
    up: float
    product: float
    """Of ``up @ down``, which is what the layer adds: it does not change where the factors trade places."""
    down_change: float
    """Of what ``down`` has moved since the first value known. It begins as noise of deviation 1, so that ``down`` itself is
    close to its final value from the start."""


@dataclass(frozen=True)
class Point:
    """One layer, or the mean of one kind of layers, at one step."""

    step: int
    since_wake: int
    kind: str
    layer: str
    """Name in the model; of a mean, how many layers: ``11 layers``."""
    cosine_down: float
    cosine_up: float
    cosine_product: float
    cosine_down_change: float
    product_share: float
    """Norm of ``up @ down / r`` over the norm of the sparse weight."""


def layer_kind(name: str) -> str:
    """What the layers of one place in every block have in common.

    Their name after the block's number, said shortly for GPT-2 (c_attn, c_proj (attn), c_fc, c_proj (mlp)) and BERTs (query,
    key, value, attention output, intermediate, output); the last two parts of a name without a number.
    """
    parts = [part for part in name.split(".") if not part.startswith("_")]  # those of wrappers: _orig_mod
    while parts and parts[-1].isdigit():
        parts = parts[:-1]
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    kind = ".".join(parts[numbers[-1] + 1 :] if numbers else parts[-2:])
    return KINDS.get(kind, kind)


def product_inner(a: Adapter, b: Adapter) -> float:
    """``<a.up @ a.down, b.up @ b.down>`` from two r x r matrices: the products are never formed."""
    up = a.up.double().t() @ b.up.double()
    down = a.down.double() @ b.down.double().t()
    return float((up * down).sum())


def cosines(now: Adapter, final: Adapter, first: Adapter) -> Cosines:
    """Of one adapter to its final value; ``first`` is the value that ``down`` has moved from."""
    product = _ratio(product_inner(now, final), product_inner(now, now), product_inner(final, final))
    return Cosines(
        down=_cosine(now.down.double(), final.down.double()),
        up=_cosine(now.up.double(), final.up.double()),
        product=product,
        down_change=_cosine(now.down.double() - first.down.double(), final.down.double() - first.down.double()),
    )


def product_norm(adapter: Adapter) -> float:
    """Frobenius norm of ``up @ down / r``, the scale that a layer adds it with."""
    return math.sqrt(max(product_inner(adapter, adapter), 0.0)) / adapter.down.shape[0]


def _cosine(a: Tensor, b: Tensor) -> float:
    return _ratio(float((a * b).sum()), float((a * a).sum()), float((b * b).sum()))


def _ratio(inner: float, square_a: float, square_b: float) -> float:
    if not (square_a > 0 and square_b > 0 and math.isfinite(inner)):
        return math.nan
    return max(-1.0, min(1.0, inner / math.sqrt(square_a) / math.sqrt(square_b)))


def means_by_kind(points: Iterable[Point]) -> list[Point]:
    """The mean over the layers of a kind, at every step; of a cosine that some layers lack, over the others."""
    groups: dict[tuple[int, int, str], list[Point]] = defaultdict(list)
    for point in points:
        groups[point.step, point.since_wake, point.kind].append(point)
    return [
        Point(
            *key,
            f"{len(own)} layer{'s' * (len(own) > 1)}",
            *(_mean([getattr(p, name) for p in own]) for name in VALUES),
        )
        for key, own in groups.items()
    ]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """The points of at most ``most`` steps, evenly chosen in their order, the first and the last among them."""
    steps = sorted({point.step for point in points})
    if len(steps) > most:
        places = torch.linspace(0, len(steps) - 1, most).round().int().tolist()
        steps = [steps[i] for i in places]
    chosen = set(steps)
    return [point for point in points if point.step in chosen]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


# ------------------------------------------------------------------------------------------------ CSV

COLUMNS = [field.name for field in fields(Point)]
VALUES = COLUMNS[4:]


def cells(point: Point) -> list[str]:
    """One row; an empty cell for what is undefined."""
    head, values = astuple(point)[:4], astuple(point)[4:]
    return [*map(str, head), *("" if math.isnan(value) else f"{value:.7g}" for value in values)]


def from_cells(row: dict[str, str]) -> Point:
    """The other way."""
    values = (float(row[name] or "nan") for name in VALUES)
    return Point(int(row["step"]), int(row["since_wake"]), row["kind"], row["layer"], *values)


def write(file: Path, points: Iterable[Point]) -> None:
    """A new file with one row a point."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(map(cells, points))


def read(file: Path) -> list[Point]:
    """The points of a file."""
    with file.open(newline="", encoding="utf-8") as stream:
        return [from_cells(row) for row in csv.DictReader(stream)]
