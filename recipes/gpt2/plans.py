"""Which runs a comparison of GPT-2's methods is made of, and the order in which they are taken."""

import argparse
import itertools
import math
import re
import shlex
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.gpt2.ledger import Result, best_rates, read

HERE = Path(__file__).parent
_SIZE = re.compile(r"--model\.size[ =]\S+")


@dataclass(frozen=True)
class Family:
    """Runs that can be compared with each other.

    Attributes:
        methods: name -> config of this folder, and arguments to it.
        rates: peak learning rates tried by default.
    """

    methods: dict[str, str]
    rates: tuple[float, ...]


def _ranks(name: str, config: str, option: str, ranks: Sequence[int] = (0, 4, 16)) -> dict[str, str]:
    return {f"{name} r={rank}": f"{config} --model.{option}.adapter_rank {rank}" for rank in ranks}


FAMILIES = {
    "novels": Family(
        {
            "dense": "novels_dense.yaml",
            **_ranks("slope", "novels_slope.yaml", "slope"),
            **_ranks("random", "novels_slope.yaml --model.slope.mask random", "slope"),
            **_ranks("transposable", "novels_transposable.yaml", "slope"),
            **_ranks("srste", "novels_srste.yaml", "srste"),
            "fst": "novels_fst.yaml",
        },
        rates=(6e-4, 1.2e-3, 1.8e-3),
    ),
    "tiny": Family(
        {
            "dense": "tiny_dense.yaml",
            "slope r=4": "tiny.yaml",
            "transposable r=4": "tiny_transposable.yaml",
            "srste r=0": "tiny_srste.yaml",
            "fst": "tiny_fst.yaml",
        },
        rates=(1e-3, 2e-3, 4e-3),
    ),
}
# What is compared if nothing is said: the methods of the paper and of our own lead; on a laptop, those that take a minute.
DEFAULT = {
    "novels": ("dense", "slope r=0", "slope r=16", "transposable r=0", "transposable r=16", "srste r=0", "fst"),
    "tiny": ("dense", "slope r=4", "transposable r=4"),
}


def known_methods() -> str:
    """For ``--help``: every family's methods."""
    return "; ".join(f"{name}: {', '.join(family.methods)}" for name, family in FAMILIES.items())


@dataclass(frozen=True)
class Plan:
    """One run that is wanted."""

    family: str
    method: str
    settings: str
    """Config and arguments, those for all runs included; with rate and seed, what makes it the same run."""
    rate: float
    seed: int

    @property
    def key(self) -> tuple[str, float, int]:
        """What makes it the same run."""
        return self.settings, self.rate, self.seed

    @property
    def label(self) -> str:
        """How it is called on the screen."""
        return f"{self.method}, rate {self.rate:g}, seed {self.seed}"


def plans(name: str, options: argparse.Namespace, overrides: Sequence[str]) -> list[Plan]:
    """The runs asked for; rates and seeds outermost, so that a cut comparison has all methods."""
    known = dict(FAMILIES[name].methods)
    own = _once("--add", [_own_method(text) for text in options.add])
    if clash := sorted(own.keys() & known.keys()):
        raise SystemExit(f"--add: {', '.join(clash)} is one of the methods already; choose another name")
    known |= own
    methods = options.methods or ([*own] or [*DEFAULT[name]])
    given = _once("--methods", [_with_rates(text) for text in ([*known] if methods == ["all"] else methods)])
    if unknown := [method for method in given if method not in known]:
        raise SystemExit(f"--methods: {', '.join(map(repr, unknown))} unknown; {name} has {', '.join(known)}")
    settings = {method: " ".join([known[method], shlex.join(overrides)]).strip() for method in given}
    rates = options.rates or list(FAMILIES[name].rates)
    if wrong := [rate for rate in itertools.chain(rates, *given.values()) if not 0 < rate < 1]:
        raise SystemExit(f"--rates: {wrong[0]:g} is no learning rate; numbers above 0 and below 1 are expected")
    for option, numbers in (
        ("--seeds", options.seeds),
        ("--rates", rates),
        *((f"--methods {m}", r) for m, r in given.items()),
    ):
        _once(option, [(str(number), None) for number in numbers])
    if not options.best_rates:
        own_rates = {method: tried or rates for method, tried in given.items()}
        longest = max(map(len, own_rates.values()))
        grid = [(m, r[i]) for i in range(longest) for m, r in own_rates.items() if i < len(r)]
        return [Plan(name, m, settings[m], rate, seed) for seed in options.seeds for m, rate in grid]
    if twice := [method for method, tried in given.items() if tried]:
        raise SystemExit(f"--best-rates: {', '.join(twice)} came with rates of its own; leave one of them out")
    best = best_rates(read(options.csv))
    if absent := [method for method in given if settings[method] not in best]:
        raise SystemExit(f"--best-rates: {options.csv} has no run of {', '.join(absent)} to choose a rate from")
    return [
        Plan(name, method, settings[method], best[settings[method]], seed)
        for seed, method in itertools.product(options.seeds, given)
    ]


def _once(option: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of pairs; an error if a key is there twice, of which the second would count, or a run be made twice."""
    keys = [key for key, _ in pairs]
    if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        raise SystemExit(f"{option}: {', '.join(twice)} is there twice; leave one of them out")
    return dict(pairs)


def _with_rates(text: str) -> tuple[str, list[float]]:
    """A method, and the rates that it is to be tried at if it came with some: ``dense@6e-4,9e-4``."""
    method, _, rates = text.partition("@")
    try:
        return method.strip(), [float(rate) for rate in rates.split(",")] if rates else []
    except ValueError:
        raise SystemExit(f"--methods {text!r}: METHOD or METHOD@RATE,RATE is expected") from None


def _own_method(text: str) -> tuple[str, str]:
    name, colon, settings = text.partition(":")
    config = shlex.split(settings)[:1]
    if not colon or not name.strip() or not config or not (HERE / config[0]).is_file():
        raise SystemExit(f"--add {text!r}: 'NAME: CONFIG.yaml ARGUMENTS' is expected, with a config of {HERE.name}/")
    return name.strip(), settings.strip()


def shared_arguments(results: Sequence[Result]) -> dict[str, str]:
    """What a run was given beside its method's own arguments (``--model.size medium``), by its settings; "" for nothing.

    A method of the reader's own (``--add``) has its arguments in front of those, which are told by the other methods, and a
    size in any case: no other size can be compared with it.
    """
    given: dict[str, str] = {}
    for result in results:
        family = FAMILIES.get(result.family)
        own = family.methods.get(result.method) if family else None
        if own is not None and f"{result.settings} ".startswith(f"{own} "):
            given[result.settings] = result.settings.removeprefix(own).strip()
    known = sorted({text for text in given.values() if text}, key=len, reverse=True)
    for result in results:
        ends = (text for text in known if result.settings.endswith(f" {text}"))
        size = _SIZE.search(result.settings)
        given.setdefault(result.settings, next(ends, size[0] if size else ""))
    return given


def labels(results: Sequence[Result]) -> dict[str, str]:
    """A name for each settings, the method's; where several share that, with the arguments that tell them apart."""
    shared, names = shared_arguments(results), {result.settings: result.method for result in results}
    found = {}
    for settings, method in names.items():
        twins = [other for other, name in names.items() if name == method]
        apart = len({shared[other] for other in twins}) == len(twins)
        arguments = shared[settings] if apart else settings.partition(" ")[2]
        found[settings] = f"{method} (`{arguments}`)" if len(twins) > 1 and arguments else method
    return found


class Queue:
    """The runs still to make, for one or several lanes.

    Args:
        plans: in order.
        budget_minutes: begin no run that would not end by then; None for no limit.
        began: by ``time.perf_counter()``.
        seconds: what runs of the same settings took, by settings. One of which nothing is known takes as long as the longest
            of this sitting so far.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        budget_minutes: float | None,
        began: float,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        self.plans, self.failed, self.longest, self.traced = list(plans), list[str](), 0.0, 0
        self.lock = threading.Lock()
        self._end = math.inf if budget_minutes is None else began + 60 * budget_minutes
        self._seconds = dict(seconds or {})

    def take(self, free_at: float = -math.inf) -> Plan | None:
        """The next run that would end in time, if there is one; the first run of a sitting is always begun.

        Args:
            free_at: when another run ends that it has to wait for, by ``time.perf_counter()``.
        """
        with self.lock:
            left = self._end - max(time.perf_counter(), free_at)
            first = not self.longest and math.isinf(free_at)
            for plan in self.plans:
                known = self._known(plan)
                if first or left == math.inf or (known is not None and known <= left):
                    self.plans.remove(plan)
                    return plan
            return None

    def expected(self, plan: Plan) -> float | None:
        """Seconds that a run will take, if that is known; without a limit it does not matter."""
        with self.lock:
            return 0.0 if self._end == math.inf else self._known(plan)

    def _known(self, plan: Plan) -> float | None:
        return self._seconds.get(plan.settings, self.longest or None)

    def took(self, plan: Plan, seconds: float) -> None:
        """Remember how long a run took, start and end of its process included."""
        self.longest = max(self.longest, seconds)
        self._seconds[plan.settings] = max(seconds, self._seconds.get(plan.settings, 0.0))
