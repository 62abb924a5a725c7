"""Every layer shape: forward, input gradient, and forward with the whole backward of one linear layer with bias."""

import functools
from collections.abc import Callable

from torch import nn

from benchmarks import graphs
from benchmarks.options import Options
from benchmarks.session import Session
from benchmarks.shapes import LinearShape, linears
from benchmarks.suites import cslt
from benchmarks.suites.case import Case
from benchmarks.suites.linear import Bench
from benchmarks.timing import Run

SUITE = "layers"
Product = Callable[[nn.Module], Run]


def cases(options: Options) -> list[Case]:
    """One a shape."""
    return [Case(SUITE, s.name, functools.partial(run, shape=s), s.name) for s in linears(options.quick)]


def run(session: Session, shape: LinearShape) -> None:
    """Each product by plain calls (``eager``) and replayed from a CUDA graph (``graph``: the kernels alone).

    While a graph of forward and backward is recorded, sparse layers record the making of their backward operand too, as a
    training step needs it; eager calls here find it current.
    """
    bench = Bench(session, shape, SUITE)
    seconds = session.options.seconds / 3
    products: dict[str, Product] = {
        "forward": bench.forward,
        "dgrad": bench.dgrad,
        "forward+backward": bench.training,
    }
    for name, product in products.items():
        measure = f"{name} eager"
        if session.options.wants(measure):
            session.compare(bench.point, measure, _runs(session, bench, measure, product), seconds=seconds)
    # Only now: a layer that was once recorded in a graph remakes its operands at every call.
    for name, product in products.items():
        measure = f"{name} graph"
        if not session.options.wants(measure):
            continue
        with graphs.on_capture_stream(session.device):
            runs = _runs(session, bench, measure, product)
        peers, note = (
            ({}, "") if name == "forward+backward" else cslt.candidates(session, bench, measure, name == "dgrad")
        )
        session.compare(bench.point, measure, runs | peers, "graph", rotate=bench.count, seconds=seconds, note=note)


def _runs(session: Session, bench: Bench, measure: str, product: Product) -> dict[str, Run]:
    made: dict[str, Run] = {}
    for variant, layer in bench.layers().items():
        if session.options.wants_variant(variant):
            one = session.attempt(bench.point, variant, measure, functools.partial(product, layer))
            if one is not None:
                made[variant] = one
    return made
