"""Bytes: what a sparse weight keeps in training and in inference, and the peak of whole training steps."""

import functools

import torch
from torch import Tensor, nn

from benchmarks.options import Options
from benchmarks.recorder import Point
from benchmarks.session import Session
from benchmarks.shapes import BlockShape, LinearShape, blocks, linears
from benchmarks.suites.case import Case
from benchmarks.training import DTYPES, count_bytes, point_of, sides
from benchmarks.variants import slope_linear
from slope_pl import SparseLinear

SUITE = "memory"


def cases(options: Options) -> list[Case]:
    """Static ones first, one a weight; then peaks, one a model, in the group of the model's training suites."""
    static = [
        Case(SUITE, shape.name, functools.partial(weight, shape=shape, precision=precision), shape.name)
        for shape in linears(options.quick)
        for precision in DTYPES
    ]
    peaks = [
        Case(SUITE, shape.name, functools.partial(peak, shape=shape, precision=precision), shape.name)
        for shape in blocks(options.quick)
        for precision in options.precisions
    ]
    return peaks if options.compile_only else static + peaks


def weight(session: Session, shape: LinearShape, precision: str) -> None:
    """Count every tensor that one weight keeps after a training step; the bias, the same on both sides, is left out."""
    point = Point(SUITE, shape.name, shape.d_in, shape.d_out, shape.tokens, precision)
    dense = nn.Linear(shape.d_in, shape.d_out, bias=False, device=session.device, dtype=DTYPES[precision])
    layer = slope_linear(dense, session.options.backend)
    entries = shape.d_in * shape.d_out
    layer.refresh_operands(torch.bfloat16, backward=False)
    inference = layer.operand_bytes()
    layer.refresh_operands(torch.bfloat16)
    parts = {"dense": _trained(dense.weight), "slope": _trained(layer.values)}
    parts["slope"] |= {
        "indices": layer.indices.nbytes,
        "backward_indices": layer.backward_indices.nbytes,
        "operands": layer.operand_bytes(),
    }
    # The paper's accounting: both moments in fp32, whatever the weights are. torch's AdamW has no such setting, so these
    # bytes are counted, not allocated: eight a trained value.
    fp32_moments = {"dense": 8 * entries, "slope": 8 * layer.values.numel()}
    totals = {
        "training, fp32 Adam": {name: sum(p.values()) - p["adam"] + fp32_moments[name] for name, p in parts.items()},
        "training, torch AdamW": {name: sum(p.values()) for name, p in parts.items()},
    }
    for measure, total in totals.items():
        for name, size in total.items():
            note = ", ".join(f"{key} {8 * part / entries:.3g}" for key, part in parts[name].items() if key != "adam")
            adam = fp32_moments[name] if "fp32" in measure else parts[name]["adam"]
            note += f", adam {8 * adam / entries:.3g}"
            session.value(point, name, measure, "bits", 8 * size / entries, 8 * total["dense"] / entries, note)
    if precision == "bf16-true":
        _inference_rows(session, point, layer, inference)


def _inference_rows(session: Session, point: Point, layer: SparseLinear, forward_operand: int) -> None:
    entries = point.d_in * point.d_out
    state = layer.values.nbytes + layer.indices.nbytes
    for measure, size, note in (
        ("inference", layer.values.nbytes + (forward_operand or layer.indices.nbytes), "values and metadata"),
        ("checkpoint, inference", state, "values, indices"),
        ("checkpoint, training", state + layer.backward_indices.nbytes, "values, indices, backward indices"),
    ):
        session.value(point, "dense", measure, "bits", 16, 16)
        session.value(point, "slope", measure, "bits", 8 * size / entries, 16, note)


def _trained(weight: Tensor) -> dict[str, int]:
    """Bytes of a weight, its gradient and its moments after one step of AdamW."""
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-5, fused=weight.is_cuda)
    optimizer.step()
    parts = {"values": weight.nbytes, "gradient": weight.grad.nbytes, "adam": count_bytes(optimizer, weight)}
    weight.grad = None
    return parts


def peak(session: Session, shape: BlockShape, precision: str) -> None:
    """Highest number of bytes in use during a step, activations included, and what stays between steps."""
    point = point_of(SUITE, shape, precision)
    if session.device.type != "cuda":
        session.skip(point, "slope", "peak of a step", "only a GPU's allocator counts")
        return
    made = sides(session, point, "peak of a step", shape)
    if session.options.compile_only:
        for side in made.values():
            side.forward_backward()
        return
    peaks = {name: float(side.peak()) for name, side in made.items()}
    for name, side in made.items():
        dense = made.get("dense")
        session.value(point, name, "peak of a step", "bytes", peaks[name], peaks.get("dense"))
        session.value(
            point, name, "between steps", "bytes", float(side.resident), float(dense.resident) if dense else None,
            "weights, gradients, moments, operands, input",
        )  # fmt: skip
