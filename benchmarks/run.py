"""Measure slope_pl against dense training and its peers, in one run on one GPU.

  python -m benchmarks.run all --out benchmarks/results/bench.csv            everything
  python -m benchmarks.run steps prefill --only 'gpt2*' bert-large          two suites, some models
  python -m benchmarks.run layers --rows 'forward graph' --seconds 3        one measure, more samples
  python -m benchmarks.run steps --precision bf16-mixed --cuda-graph        fp32 parameters; the step as one graph
  python -m benchmarks.run blocks prefill --compile-only --jobs 8           fill Inductor's cache, time nothing
  python -m benchmarks.run all --quick --device cpu --compiler eager        does it run? (numbers mean nothing)

Each number is appended to the CSV at once, with percentiles, versions, GPU and commit; what fails has a row that says why.
`python -m benchmarks.report` makes the tables and plots of benchmarks/README.md from it.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from benchmarks import tables, targets, warm
from benchmarks.options import COMPILERS, PRECISIONS, Options
from benchmarks.recorder import first_line
from benchmarks.rows import latest
from benchmarks.session import Session
from benchmarks.suites import COMPILED, SUITES, Case
from slope_pl.ops import BACKEND_NAMES

TABLE_CHARACTERS = 11000


def parser() -> argparse.ArgumentParser:
    """The command line; each option says what it is for."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("suites", nargs="+", choices=[*SUITES, "all"], metavar="SUITE", help=", ".join([*SUITES, "all"]))
    made.add_argument("--out", type=Path, help="CSV to append to; without it numbers are only printed")
    made.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="cases (models, layers) to run")
    made.add_argument(
        "--rows", nargs="+", default=[], metavar="PATTERN", help="measures to take, e.g. 'dgrad graph' step"
    )
    made.add_argument(
        "--variants", nargs="+", default=[], metavar="PATTERN", help="variants beside dense, e.g. 'slope*'"
    )
    made.add_argument("--precision", nargs="+", default=["bf16-true"], choices=PRECISIONS,
                      help="of blocks, steps and peak memory: parameters in bf16, or in fp32 under autocast")  # fmt: skip
    made.add_argument("--blocks", type=int, default=1, help="transformer blocks of a model (default 1)")
    made.add_argument("--seconds", type=float, default=0.7, help="roughly, a comparison; small ones take a part of it")
    made.add_argument("--cuda-graph", action="store_true", help="steps: capture the whole step as well, on both sides")
    made.add_argument("--backend", default="auto", choices=BACKEND_NAMES, help="of the sparse layers")
    made.add_argument("--compiler", default="inductor", choices=COMPILERS, help="of whole blocks, on all sides")
    made.add_argument("--compile-only", action="store_true", help="compile every block, time nothing, write nothing")
    made.add_argument("--jobs", type=int, default=8, help="processes of --compile-only")
    made.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument("--seed", type=int, default=0, help="of weights and data")
    made.add_argument("--verbose", action="store_true", help="tracebacks of what failed")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit status is 1 if a case failed as a whole."""
    given = parser().parse_args(arguments)
    logging.basicConfig(level=logging.DEBUG if given.verbose else logging.INFO, format="%(message)s", stream=sys.stdout)
    for name in ("torch", "matplotlib", "slope_pl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here; `--device cpu --quick` shows that the suites run")
    options = Options(
        device=given.device, quick=given.quick, only=tuple(given.only), rows=tuple(given.rows),
        variants=tuple(given.variants), precisions=tuple(given.precision), blocks=given.blocks, seconds=given.seconds,
        cuda_graph=given.cuda_graph, backend=given.backend, compiler=given.compiler, compile_only=given.compile_only,
        seed=given.seed,
    )  # fmt: skip
    suites = [name for name in SUITES if name in given.suites or "all" in given.suites]
    if options.compile_only:
        suites = [name for name in suites if name in COMPILED]
        if not suites:
            raise SystemExit(
                f"--compile-only: nothing to compile in {given.suites}; suites that do: {', '.join(COMPILED)}"
            )
        if given.jobs > 1:
            return 1 if warm.fill(suites, options, given.jobs) else 0
    cases = plan(suites, options)
    if not cases:
        raise SystemExit(f"--only {' '.join(given.only)} matches no case of {', '.join(suites)}")
    return 1 if measure(Session(options, given.out), cases) else 0


def plan(suites: Sequence[str], options: Options) -> list[Case]:
    """Cases asked for, those of one group together, groups in order of first appearance."""
    cases = [case for name in suites for case in SUITES[name](options) if options.wants_case(case.name)]
    order = {group: i for i, group in reversed([*enumerate(case.group for case in cases)])}
    return sorted(cases, key=lambda case: order[case.group])


def measure(session: Session, cases: Sequence[Case]) -> int:
    """Run cases one after the other, then print the table; returns how many failed as a whole."""
    began, failed, group = time.perf_counter(), 0, cases[0].group
    print(session.environment, flush=True)
    for count, case in enumerate(cases, 1):
        if case.group != group:
            session.release()
            group = case.group
        print(f"[{count}/{len(cases)}, {time.perf_counter() - began:.0f} s] {case.suite} {case.name}", flush=True)
        torch.manual_seed(session.options.seed)
        try:
            case.run(session)
        except Exception as error:  # the next case may well run
            failed += 1
            session.lost(case.suite, case.name, first_line(error))
            logging.getLogger(__name__).debug("traceback", exc_info=True)
            if context_is_lost(session):
                session.lost(
                    case.suite, case.name, f"the CUDA context is gone; {len(cases) - count} cases were not run"
                )
                break
    session.release()
    if not session.options.compile_only:
        show(session)
    inductor, without = counters["inductor"], [row for row in session.rows if row.note.startswith("failed")]
    print(
        f"{len(session.rows)} rows, {len(without)} of them failures, {time.perf_counter() - began:.0f} s; "
        f"Inductor's cache: {inductor['fxgraph_cache_hit']} hits, {inductor['fxgraph_cache_miss']} misses"
        + (f"; first failure: {without[0].case} {without[0].variant}: {without[0].note}" if without else "")
    )
    return failed


def context_is_lost(session: Session) -> bool:
    """Whether a kernel died and took the CUDA context along."""
    if session.device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def show(session: Session) -> None:
    """Tables and targets, the most wanted last: remote machines return the end of the output only."""
    measured = latest(session.rows)
    text = f"{tables.text(measured)}\n\n{targets.text(measured)}"
    cut = len(text) - TABLE_CHARACTERS
    print("\n" + (text if cut <= 0 else f"({cut} characters left out; all of it is in the CSV)\n{text[cut:]}") + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
