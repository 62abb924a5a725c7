"""A unit of work that may fail without taking the others along."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.session import Session


@dataclass(frozen=True)
class Case:
    """What one model or layer needs.

    Attributes:
        suite: it belongs to.
        name: as ``--only`` takes it.
        run: does it.
        group: cases of one group run one after the other and share models; memory is given back between groups.
    """

    suite: str
    name: str
    run: Callable[[Session], None]
    group: str = ""
