"""Few tokens at a time: the weight is read for every call, and a GEMM is bound by its bytes."""

import functools

import torch
from torch import Tensor, nn

from benchmarks.options import Options
from benchmarks.recorder import Point
from benchmarks.session import Clock, Session
from benchmarks.shapes import DECODE_TOKENS, DECODE_WEIGHTS, TINY_LINEARS, LinearShape
from benchmarks.suites.case import Case
from benchmarks.timing import Run, copies_beyond_l2
from benchmarks.variants import slope_linear

SUITE = "decode"


def cases(options: Options) -> list[Case]:
    """One a weight; token counts share its copies."""
    weights = TINY_LINEARS if options.quick else DECODE_WEIGHTS
    return [Case(SUITE, shape.name, functools.partial(run, shape=shape), shape.name) for shape in weights]


def run(session: Session, shape: LinearShape) -> None:
    """Calls take turns over copies of the weight, so that none finds its own in the L2 cache."""
    torch.manual_seed(session.options.seed)
    device = session.device
    count = copies_beyond_l2(shape.d_in * shape.d_out, device)  # of the sparse one, the smaller
    dense = [nn.Linear(shape.d_in, shape.d_out, device=device, dtype=torch.bfloat16) for _ in range(count)]
    layers: dict[str, list[nn.Module]] = {
        "dense": [*dense],
        "slope": [slope_linear(layer, session.options.backend) for layer in dense],
    }
    seconds = session.options.seconds / 4
    counts = DECODE_TOKENS[:3] if session.options.quick else DECODE_TOKENS
    # Eager calls first: a layer that was once recorded in a graph looks after its operands at every call.
    clocks: tuple[Clock, Clock] = ("eager", "graph")
    for clock in clocks:
        for tokens in counts:
            x = torch.randn(tokens, shape.d_in, device=device, dtype=torch.bfloat16)
            point = Point(SUITE, shape.name, shape.d_in, shape.d_out, tokens, "bf16-true")
            runs = {name: _forward(copies, x) for name, copies in layers.items()}
            session.compare(point, f"forward {clock}", runs, clock, rotate=count, seconds=seconds)


def _forward(copies: list[nn.Module], x: Tensor) -> Run:
    def run(i: int) -> Tensor:
        with torch.no_grad():
            return copies[i % len(copies)](x)

    return run
