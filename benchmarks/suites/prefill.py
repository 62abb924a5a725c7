"""Inference over whole prompts: the same blocks, compiled, without gradients."""

import functools
from typing import Any

import torch

from benchmarks import models
from benchmarks.options import Options
from benchmarks.session import Session
from benchmarks.shapes import BlockShape, blocks
from benchmarks.suites.case import Case
from benchmarks.timing import Run
from benchmarks.training import data, point_of
from benchmarks.variants import TRANSFORMS

SUITE = "prefill"
VARIANTS = ("dense", "slope", "slope_r1.56%", "torch_sparse_cusparselt")


def cases(options: Options) -> list[Case]:
    """One a model, weights stored as bf16."""
    return [Case(SUITE, shape.name, functools.partial(run, shape=shape), shape.name) for shape in blocks(options.quick)]


def run(session: Session, shape: BlockShape) -> None:
    """All variants in turns."""
    point = point_of(SUITE, shape, "bf16-true")
    x = data(session, shape, "bf16-true", 1)
    runs: dict[str, Run] = {}
    for variant in VARIANTS:
        if session.options.wants_variant(variant):
            made = session.attempt(point, variant, "forward", functools.partial(_inference, session, shape, variant, x))
            if made is not None:
                runs[variant] = made
    session.compare(point, "forward", runs)


def _inference(session: Session, shape: BlockShape, variant: str, x: torch.Tensor) -> Run:
    options = session.options
    model = models.build(shape, options.blocks, session.device, torch.bfloat16, options.seed)
    call: Any = session.compile(TRANSFORMS[variant](model, options.backend).eval().requires_grad_(False))

    def run(_: int) -> object:
        with torch.no_grad():
            return call(x)

    return run
