"""Square tiling of wide layers (paper, section on upsample weights): one product of W, or one a square tile of its rows.

The tiles' outputs are left apart in one variant, the least that tiling can cost, and joined in the other, as a user of
the layer needs them.
"""

import functools

import torch
from torch import Tensor, nn

from benchmarks.options import Options
from benchmarks.session import Session
from benchmarks.shapes import LinearShape, linears
from benchmarks.suites.case import Case
from benchmarks.suites.linear import Bench
from benchmarks.timing import Run
from benchmarks.variants import slope_linear
from slope_pl import SparseLinear

SUITE = "tiling"


def cases(options: Options) -> list[Case]:
    """Layers at least twice as wide as they are deep."""
    return [
        Case(SUITE, shape.name, functools.partial(run, shape=shape), shape.name)
        for shape in linears(options.quick)
        if shape.d_out >= 2 * shape.d_in
    ]


def run(session: Session, shape: LinearShape) -> None:
    """Forward without gradients; by plain calls first, for recorded layers look after their operands at every call."""
    bench = Bench(session, shape, SUITE)
    tiles = square_tiles(bench.dense, session.options.backend)
    runs: dict[str, Run] = {name: bench.forward(layer) for name, layer in bench.layers().items()}
    runs["slope_tiles"] = bench.forward(lambda x: [tile(x) for tile in tiles][-1])
    runs["slope_tiles_joined"] = bench.forward(functools.partial(joined, tiles))
    session.compare(bench.point, "forward eager", runs, seconds=session.options.seconds / 2)
    session.compare(bench.point, "forward graph", runs, "graph", rotate=bench.count, seconds=session.options.seconds)


@torch.no_grad()
def square_tiles(dense: nn.Linear, backend: str) -> list[SparseLinear]:
    """Sparse layers of ``d_in`` rows each (the last one of what is left), over the same weights."""
    made = []
    for start in range(0, dense.out_features, dense.in_features):
        rows = slice(start, min(start + dense.in_features, dense.out_features))
        tile = nn.Linear(dense.in_features, rows.stop - rows.start, bias=dense.bias is not None, device="meta")
        tile.weight = nn.Parameter(dense.weight[rows].clone())
        if dense.bias is not None:
            tile.bias = nn.Parameter(dense.bias[rows].clone())
        made.append(slope_linear(tile, backend))
    return made


def joined(tiles: list[SparseLinear], x: Tensor) -> Tensor:
    """What the untiled layer gives."""
    return torch.cat([tile(x) for tile in tiles], dim=-1)
