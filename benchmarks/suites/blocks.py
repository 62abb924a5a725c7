"""Whole transformer blocks, compiled: forward and backward, no optimizer."""

import functools

from benchmarks.options import Options
from benchmarks.session import Session
from benchmarks.shapes import BlockShape, blocks
from benchmarks.suites.case import Case
from benchmarks.training import point_of, sides

SUITE = "blocks"
MEASURE = "forward+backward"


def cases(options: Options) -> list[Case]:
    """One a model and precision."""
    return [
        Case(SUITE, shape.name, functools.partial(run, shape=shape, precision=precision), shape.name)
        for shape in blocks(options.quick)
        for precision in options.precisions
    ]


def run(session: Session, shape: BlockShape, precision: str) -> None:
    """Dense against sparse in turns; operands are current throughout, as within an accumulation of gradients."""
    point = point_of(SUITE, shape, precision)
    made = sides(session, point, MEASURE, shape)
    session.compare(point, MEASURE, {name: side.forward_backward for name, side in made.items()})
