"""Making both operands of a weight from its values, against the bytes that have to move; and the 100-step re-setup."""

import functools

import torch

from benchmarks.options import Options
from benchmarks.session import Clock, Session
from benchmarks.shapes import LinearShape, linears
from benchmarks.suites.case import Case
from benchmarks.suites.linear import Bench
from benchmarks.timing import copies_beyond_l2
from benchmarks.variants import slope_linear
from slope_pl import SparseLinear

SUITE = "refresh"


def cases(options: Options) -> list[Case]:
    """One a shape and stored dtype."""
    return [
        Case(SUITE, shape.name, functools.partial(run, shape=shape, dtype=dtype), shape.name)
        for shape in linears(options.quick)
        for dtype in (torch.bfloat16, torch.float32)
    ]


def run(session: Session, shape: LinearShape, dtype: torch.dtype) -> None:
    """Times, bytes over measured copy bandwidth, and shares of the layer's own forward and backward."""
    device = session.device
    bench = Bench(session, shape, SUITE, dtype=dtype)
    point, layer = bench.point, bench.slope
    rate = session.copy_rate
    layer.refresh_operands(torch.bfloat16)
    moved = refresh_bytes(layer)
    copies = copies_beyond_l2(moved, device) - 1
    layers = [layer, *(slope_linear(bench.dense, session.options.backend) for _ in range(copies))]
    turns = len(layers)

    def refresh(i: int) -> None:
        layers[i % turns].refresh_operands(torch.bfloat16)

    seconds = session.options.seconds / 5
    # First, and alone: a layer whose refresh was once recorded in a graph remakes its operands at every call.
    linear = (
        {}
        if dtype is torch.float32
        else session.compare(point, "forward+backward", {"slope": bench.training(layer)}, seconds=seconds)
    )
    resetup = session.compare(
        point, "resetup", {"slope": lambda i: layers[i % turns].refresh_backward_mask()}, seconds=seconds
    )
    clock: Clock = "graph" if device.type == "cuda" else "eager"
    refreshed = session.compare(point, "refresh", {"slope": refresh}, clock, rotate=turns, seconds=seconds)
    session.value(point, "device", "copy bandwidth", "GB/s", rate, note="bytes read and written")
    session.value(point, "slope", "refresh bytes", "bytes", float(moved))
    if "slope" in refreshed:
        floor = moved / rate / 1e6
        note = f"time over {floor:.4g} ms, which a copy of these bytes takes"
        session.value(point, "slope", "refresh/copy", "ratio", refreshed["slope"].median / floor, note=note)
    for name, stats, often in (("refresh", refreshed, 1), ("resetup", resetup, 100)):
        if "slope" in stats and "slope" in linear:
            # Attention, norms and the optimizer of a step come on top of this.
            share = stats["slope"].median / often / linear["slope"].median
            session.value(point, "slope", f"{name}/linear", "ratio", share, note=f"once in {often} steps")


def refresh_bytes(layer: SparseLinear) -> int:
    """Bytes that a refresh must move: values and both index arrays read, the values of both operands written.

    Metadata stay while the masks do. A forward operand in whose storage the values live needs nothing: it is recognised
    by what ``operand_bytes`` leaves out.
    """
    entries = layer.in_features * layer.out_features
    kept = entries  # bytes of the kept half as bf16: two for every second entry
    whole_operand = kept + entries // 8
    written = kept if layer.operand_bytes() < 2 * whole_operand else 2 * kept
    return layer.values.nbytes + layer.indices.nbytes + layer.backward_indices.nbytes + written
