"""What one call costs the host: the whole time of a small layer, and the floor of every eager model."""

import functools

import torch

from benchmarks.options import Options
from benchmarks.session import Session
from benchmarks.shapes import TINY_LINEARS, LinearShape
from benchmarks.suites import cslt
from benchmarks.suites.case import Case
from benchmarks.suites.linear import Bench
from benchmarks.timing import Run
from benchmarks.variants import pruned

SUITE = "host"
# The GPU needs a few microseconds for it, less than any call takes the host: so the queue never fills.
SHAPE = LinearShape("128x128", 64, 128, 128)


def cases(options: Options) -> list[Case]:
    """One tiny layer."""
    shape = TINY_LINEARS[0] if options.quick else SHAPE
    return [Case(SUITE, shape.name, functools.partial(run, shape=shape), shape.name)]


def run(session: Session, shape: LinearShape) -> None:
    """Calls with and without recording for the backward, forward with backward, and PyTorch's own sparse product."""
    bench = Bench(session, shape, SUITE)
    forward: dict[str, Run] = {name: bench.forward(layer) for name, layer in bench.layers().items()}
    if session.options.wants_variant(cslt.DEFAULT):
        peer = session.attempt(bench.point, cslt.DEFAULT, "forward no_grad", lambda: _peer(bench))
        if peer is not None:
            forward[cslt.DEFAULT] = peer
    session.compare(bench.point, "forward no_grad", forward, "host")
    x = bench.x[0].detach().requires_grad_()
    recording: dict[str, Run] = {name: lambda _, layer=layer: layer(x) for name, layer in bench.layers().items()}  # type: ignore[misc]
    session.compare(bench.point, "forward grad", recording, "host")
    training: dict[str, Run] = {name: bench.training(layer) for name, layer in bench.layers().items()}
    session.compare(bench.point, "forward+backward", training, "host")


@torch.no_grad()
def _peer(bench: Bench) -> Run:
    packed, bias = torch._cslt_compress(pruned(bench.dense.weight)), bench.dense.bias.detach()
    return lambda i: cslt.multiply(bench.x[i % bench.count], packed, bias, 0)
