"""Whole training steps: forward, backward, fused AdamW, operand refresh, and a hundredth of the re-setup."""

import functools

from benchmarks.options import Options
from benchmarks.recorder import Point
from benchmarks.session import Clock, Session
from benchmarks.shapes import BlockShape, blocks
from benchmarks.suites.case import Case
from benchmarks.timing import Stats
from benchmarks.training import Side, point_of, sides

SUITE = "steps"
RESETUP_STEPS = 100  # optimizer steps between two re-setups: the paper's, and SLoPeConfig's default


def cases(options: Options) -> list[Case]:
    """One a model and precision."""
    return [
        Case(SUITE, shape.name, functools.partial(run, shape=shape, precision=precision), shape.name)
        for shape in blocks(options.quick)
        for precision in options.precisions
    ]


def run(session: Session, shape: BlockShape, precision: str) -> None:
    """The step in turns; then what is special to the sparse side, alone."""
    point = point_of(SUITE, shape, precision)
    made = sides(session, point, "step", shape)
    runs = {name: side.step for name, side in made.items()}
    stats = session.compare(point, "step", runs, seconds=1.5 * session.options.seconds)
    if "slope" in made and not session.options.compile_only:
        _overheads(session, point, made["slope"], stats)
    if session.options.cuda_graph:
        session.compare(point, "step graph", runs, "graph", note="the whole step is one CUDA graph, on both sides")


def _overheads(session: Session, point: Point, side: Side, stats: dict[str, Stats]) -> None:
    layers, seconds = side.layers, session.options.seconds / 5

    def refresh(_: int) -> None:
        for layer in layers:
            layer.refresh_operands(side.dtype)

    def resetup(_: int) -> None:
        for layer in layers:
            layer.refresh_backward_mask()

    note = f"{len(layers)} layers"
    again = session.compare(point, "resetup", {"slope": resetup}, seconds=seconds, note=note)
    # Last: a layer whose refresh was recorded in a graph remakes its operands at every call from then on.
    clock: Clock = "graph" if session.device.type == "cuda" else "eager"
    refreshed = session.compare(point, "refresh", {"slope": refresh}, clock, seconds=seconds, note=note)
    step = stats.get("slope")
    if step is None:
        return
    if "slope" in refreshed:
        share = refreshed["slope"].median / step.median
        session.value(point, "slope", "refresh/step", "ratio", share, note="part of the step already")
    if "slope" in again:
        whole = step.plus(again["slope"].median / RESETUP_STEPS)
        note = "step + re-setup / 100"
        if session.options.wants("step+resetup"):
            session.keep(point, "slope", "step+resetup", whole, stats.get("dense"), note=note)
