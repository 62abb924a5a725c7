"""One variant of a model in training: what ``blocks``, ``steps``, ``peers`` and ``memory`` share."""

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.recorder import Point
from benchmarks.session import Session, autocast
from benchmarks.shapes import BlockShape
from benchmarks.variants import TRANSFORMS
from slope_pl import SparseLinear, sparse_layers

DTYPES = {"bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}
"""Of parameters, residual stream and its gradient."""


class Side:
    """Model, data, optimizer; a step is forward, backward from a fixed random gradient, and AdamW.

    The input requires a gradient, as that of a block in the middle of a model does.

    Args:
        session: device, seed, compiler.
        shape: of a block.
        variant: a name of :data:`benchmarks.variants.TRANSFORMS`.
        precision: as Lightning names it.
        compiled: whether the blocks go through torch.compile.
    """

    def __init__(
        self, session: Session, shape: BlockShape, variant: str, precision: str, compiled: bool = True
    ) -> None:
        options, device = session.options, session.device
        self.device, self.precision = device, precision
        before = allocated(device)
        model = models.build(shape, options.blocks, device, DTYPES[precision], options.seed)
        self.model = TRANSFORMS[variant](model, options.backend)
        del model
        self.call: Any = session.compile(self.model) if compiled else self.model
        self.x, self.dy = (data(session, shape, precision, salt) for salt in (1, 2))
        self.x.requires_grad_()
        self.parameters = [*self.model.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=1e-5,  # so small that the weights stay what they are: hundreds of steps on random data
            fused=device.type == "cuda",
            capturable=options.cuda_graph and device.type == "cuda",
        )
        self.resident = allocated(device) - before  # until the first step; see :meth:`settle`
        self._before = before

    @property
    def layers(self) -> list[SparseLinear]:
        """Sparse ones; none in a dense model."""
        return [*sparse_layers(self.model).values()]

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return torch.bfloat16

    def forward_backward(self, _: int = 0) -> None:
        """Forward and backward with fresh gradients; no optimizer, so operands stay current."""
        self.x.grad = None
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            y = self.call(self.x)
        y.backward(self.dy)

    def step(self, _: int = 0) -> None:
        """A training step; the next forward of a sparse layer remakes its operands, since the weights moved."""
        self.forward_backward()
        self.optimizer.step()

    def settle(self) -> None:
        """One step, after which everything that lasts is there: gradients, moments, operands; ``resident`` counts it.

        Only right while nothing else is made or freed between construction and this call.
        """
        self.step()
        self.resident = allocated(self.device) - self._before

    def peak(self) -> int:
        """Bytes at the highest point of a step, of this side alone."""
        torch.cuda.synchronize(self.device)
        before = allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before + self.resident


def sides(session: Session, point: Point, measure: str, shape: BlockShape) -> dict[str, Side]:
    """The dense and the sparse side of a model, compiled; shared by the suites of a run. A side that fails has a row."""
    made = {}
    for variant in ("dense", "slope"):
        if session.options.wants_variant(variant):
            ready = functools.partial(_ready, session, shape, variant, point.precision)
            key = ("side", shape, variant, point.precision)
            side = session.attempt(point, variant, measure, functools.partial(session.shared, key, ready))
            if side is not None:
                made[variant] = side
    return made


def _ready(session: Session, shape: BlockShape, variant: str, precision: str) -> Side:
    side = Side(session, shape, variant, precision)
    if not session.options.compile_only:
        side.settle()
    return side


def data(session: Session, shape: BlockShape, precision: str, salt: int) -> Tensor:
    """Standard normal ``(batch, length, hidden)``, never zeros: a GPU multiplies zeros faster."""
    generator = torch.Generator(session.device).manual_seed(session.options.seed + salt)
    size = (shape.batch, shape.length, shape.hidden)
    return torch.randn(size, device=session.device, dtype=DTYPES[precision], generator=generator)


def allocated(device: torch.device) -> int:
    """Bytes in use on a GPU; 0 on a CPU, which nobody counts here."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def footprint(shape: BlockShape, blocks: int, precision: str) -> int:
    """A generous guess of a side's bytes at its peak, for deciding how many processes share a GPU."""
    projections = 3 if shape.activation == "swiglu" else 2
    parameters = blocks * shape.hidden * (4 * shape.hidden + projections * shape.intermediate)
    activations = blocks * shape.tokens * (24 * shape.hidden + 3 * projections * shape.intermediate)
    size = 2 if precision == "bf16-true" else 4
    return 3 * size * parameters + 2 * activations + (1 << 30)


def point_of(suite: str, shape: BlockShape, precision: str) -> Point:
    """The columns of a block's rows."""
    return Point(suite, shape.name, shape.hidden, shape.intermediate, shape.tokens, precision)


def count_bytes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """Bytes that an optimizer keeps for a parameter, step counters left out."""
    return sum(
        value.nbytes
        for name, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor) and name != "step"
    )
