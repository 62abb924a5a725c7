"""Ways to add the adapters' share, at ranks 16 and 64: a sum of its own, in place by the second product, the layer's."""

import functools

import torch
from torch import Tensor, nn

from benchmarks.options import Options
from benchmarks.session import Session
from benchmarks.shapes import SAMPLE_LINEARS, LinearShape, linears
from benchmarks.suites.case import Case
from benchmarks.suites.linear import Bench
from benchmarks.timing import Run
from benchmarks.variants import slope_linear
from slope_pl import SparseLinear

SUITE = "adapters"
RANKS = (16, 64)  # the paper's for BERT-Large


def cases(options: Options) -> list[Case]:
    """One a sample of shapes."""
    return [
        Case(SUITE, shape.name, functools.partial(run, shape=shape), shape.name)
        for shape in linears(options.quick, SAMPLE_LINEARS)
    ]


def run(session: Session, shape: LinearShape) -> None:
    """Forward without gradients; dense and rank 0 beside them, so that the price of the adapters shows."""
    bench = Bench(session, shape, SUITE)
    runs: dict[str, Run] = {name: bench.forward(layer) for name, layer in bench.layers().items()}
    for rank in RANKS:
        layer = slope_linear(bench.dense, session.options.backend, rank)
        runs[f"slope_r{rank}"] = bench.forward(layer)
        runs[f"sum_r{rank}"] = bench.forward(functools.partial(_sum, bench.slope, layer))
        runs[f"addmm_r{rank}"] = bench.forward(functools.partial(_addmm, bench.slope, layer))
    seconds = 1.5 * session.options.seconds
    session.compare(bench.point, "forward eager", runs, seconds=seconds / 2)
    session.compare(bench.point, "forward graph", runs, "graph", rotate=bench.count, seconds=seconds)


def _adapters(layer: SparseLinear) -> tuple[Tensor, Tensor, float]:
    assert layer.adapter_down is not None
    assert layer.adapter_up is not None
    return layer.adapter_down, layer.adapter_up, 1 / layer.adapter_rank


def _sum(sparse: nn.Module, layer: SparseLinear, x: Tensor) -> Tensor:
    """Two products and a pass over the output that adds them."""
    down, up, scale = _adapters(layer)
    return torch.add(sparse(x), (x @ down.t()) @ up.t(), alpha=scale)


def _addmm(sparse: nn.Module, layer: SparseLinear, x: Tensor) -> Tensor:
    """The second product adds to the output where it lies."""
    down, up, scale = _adapters(layer)
    return sparse(x).addmm_(x @ down.t(), up.t(), alpha=scale)
