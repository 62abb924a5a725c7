"""Other people's 2:4 training layers in the same blocks; one that crashes is a row that says so."""

import functools

from benchmarks.options import Options
from benchmarks.session import Session
from benchmarks.shapes import TARGET_BLOCKS, BlockShape, blocks
from benchmarks.suites.case import Case
from benchmarks.timing import Run
from benchmarks.training import Side, point_of, sides

SUITE = "peers"
MEASURE = "forward+backward"
TORCHAO = "torchao_semisparse"


def cases(options: Options) -> list[Case]:
    """One a model, weights stored as bf16."""
    return [
        Case(SUITE, shape.name, functools.partial(run, shape=shape), shape.name)
        for shape in blocks(options.quick, TARGET_BLOCKS)
    ]


def run(session: Session, shape: BlockShape) -> None:
    """Dense compiled and eager, slope compiled, torchao's layer eager and compiled: all in turns."""
    point = point_of(SUITE, shape, "bf16-true")
    runs: dict[str, Run] = {name: side.forward_backward for name, side in sides(session, point, MEASURE, shape).items()}
    for name, variant, compiled in (
        ("dense_eager", "dense", False),
        (f"{TORCHAO}_eager", TORCHAO, False),
        (f"{TORCHAO}_compiled", TORCHAO, True),
    ):
        if session.options.wants_variant(name):
            make = functools.partial(Side, session, shape, variant, "bf16-true", compiled)
            side = session.attempt(point, name, MEASURE, make)
            if side is not None:
                runs[name] = side.forward_backward
    session.compare(point, MEASURE, runs)
