"""What a run was asked for."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

PRECISIONS = ("bf16-true", "bf16-mixed")
COMPILERS = ("inductor", "aot_eager", "eager", "none")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of one run; the command line is :mod:`benchmarks.run`.

    Attributes:
        device: ``cuda`` or ``cpu``.
        quick: tiny shapes, a few samples: shows that everything runs, measures nothing.
        only: patterns of cases to run; empty for all.
        rows: patterns of measures to take; empty for all.
        variants: patterns of variants beside ``dense``; empty for all.
        precisions: of the training suites.
        blocks: transformer blocks of a model, one after the other.
        seconds: roughly, of each comparison, all its candidates together.
        cuda_graph: whether ``steps`` also captures the whole step on both sides.
        backend: of the sparse layers, as ``SLoPeConfig`` takes it.
        compiler: backend of torch.compile for whole blocks; ``none`` leaves them eager.
        compile_only: run every compiled function once and time nothing.
        seed: of weights and data.
    """

    device: str = "cuda"
    quick: bool = False
    only: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("bf16-true",)
    blocks: int = 1
    seconds: float = 0.7
    cuda_graph: bool = False
    backend: str = "auto"
    compiler: str = "inductor"
    compile_only: bool = False
    seed: int = 0

    def wants_case(self, name: str) -> bool:
        """Whether a case was asked for."""
        return _matches(name, self.only)

    def wants(self, measure: str) -> bool:
        """Whether a measure was asked for."""
        return _matches(measure, self.rows)

    def wants_variant(self, variant: str) -> bool:
        """Whether a variant was asked for; the dense one, which all are compared with, unless only compiling."""
        return _matches(variant, self.variants) or (variant == "dense" and not self.compile_only)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
