"""The runner of comparisons: the runs that are missing, several at a time, after the dense runs that they start from.

A run that is in the CSV file already is not made again. Dense runs whose checkpoint others need (a teacher, weights to start
from, the first stage of a gradual start) are made once and kept below ``--runs``.
"""

import argparse
import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes import launching
from recipes.bert_large.ledger import Result, read
from recipes.bert_large.methods import (
    FADE,
    MASKS,
    STARTS,
    Place,
    Run,
    check_recovered,
    check_starts,
    dense_sibling,
    first_stage,
    method_arguments,
    recovered_checkpoint,
)
from recipes.bert_large.pretrain_checkpoint import read_pretraining_checkpoint
from recipes.bert_large.workers import Workers
from recipes.launching import RunError
from recipes.ledger import append_row

BestRates = Callable[[Sequence[Result]], Mapping[tuple[str, str, str], float]]
_STARTS = "starts"


@dataclass(frozen=True)
class Recipe:
    """A recipe that is compared.

    Attributes:
        module: as after ``python -m``.
        configs: its sparse and its dense config, in this folder.
        table: the callback that leaves a result file.
    """

    module: str
    configs: tuple[str, str]
    table: str


@dataclass(frozen=True)
class Job:
    """What all runs of a comparison share, beside their settings.

    Attributes:
        recipe: what is run.
        place: on what.
        runs: folder of logs and checkpoints.
        in_process: without a process for each run.
        threads: environment of a process for each run.
        deadline: time (as ``time.time``) after which no run begins.
        recovered: folder of the checkpoints that recovered starts begin from.
    """

    recipe: Recipe
    place: Place
    runs: Path
    in_process: bool
    threads: Mapping[str, str]
    deadline: float
    recovered: Path | None = None


@dataclass(frozen=True)
class Start:
    """What a dense run left for others."""

    checkpoint: str
    steps: int
    steps_before: int


# ---------------------------------------------------------------------------------------------------- options


def add_options(parser: argparse.ArgumentParser, rates: str, sweep: str) -> None:
    """Options of all runners."""
    add = parser.add_argument
    add("--methods", nargs="+", choices=["dense", "sparse"], default=["dense", "sparse"])
    add("--masks", nargs="+", choices=list(MASKS), default=["magnitude"], help="of the sparse runs")
    add("--ranks", nargs="+", type=int, default=[0], help="of the adapters of the sparse runs (default: 0)")
    add("--starts", nargs="+", default=["plain"], metavar="START", help="of the sparse runs: plain (default), or some of "
        + "; ".join(f"{name}: {text}" for name, text in STARTS.items()) + "; joined by + (teacher+gradual)")  # fmt: skip
    add(
        "--recovered",
        type=Path,
        metavar="FOLDER",
        help="checkpoints that recovered starts begin from: MASK-rRANK.ckpt or MASK.ckpt",
    )
    add("--fade", type=float, help=f"share of the first stage's steps in a gradual start (default: {FADE:g})")
    add("--sparse-arguments", nargs="+", default=[""], metavar="'ARGUMENTS'",
        help="for the sparse runs alone; each makes runs of its own, '' is none")  # fmt: skip
    add("--rates", nargs="+", type=float, help=f"peak learning rates; default: {rates}")
    add("--sweep", action="store_true", help=f"instead of --rates: {sweep}")
    add("--best-rates", action="store_true",
        help="instead of --rates: the best so far of each task and method; adapters not run yet: that of r = 0")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0], help="of the head, the order and the subset of the data")
    add("--jobs", type=int, default=1, help="runs at a time on the one device")
    add("--in-process", action="store_true",
        help="many runs a process (with --jobs: in each of so many): saves the start of Python and torch")  # fmt: skip
    add("--budget-minutes", type=float, help="begin no run after so many minutes")
    add("--prepare", action="store_true",
        help="make only the dense runs that others start from; recovered checkpoints need not be there yet")  # fmt: skip
    add("--dry-run", action="store_true", help="list the runs that are missing and make none")
    add("--report", action="store_true", help="print the table and run nothing")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Stop at contradictions."""
    if sum(map(bool, (options.rates, options.sweep, options.best_rates))) > 1:
        parser.error("--rates, --sweep and --best-rates exclude each other")
    if options.jobs < 1:
        parser.error(f"--jobs: {options.jobs}, expected 1 or more")
    if options.fade is not None and not 0 < options.fade <= 1:
        parser.error(f"--fade: {options.fade:g}, expected a share above 0 and at most 1")
    if wrong := [rank for rank in options.ranks if rank < 0]:
        parser.error(f"--ranks: {wrong[0]}, expected 0 or more")
    if options.fade is not None and not any("gradual" in start.split("+") for start in options.starts):
        parser.error(f"--fade {options.fade:g} has no effect without a gradual start: add --starts gradual")
    recovers = "sparse" in options.methods and any("recovered" in start.split("+") for start in options.starts)
    if options.recovered is not None and not recovers:
        parser.error(f"--recovered {options.recovered} has no effect without a recovered start: add --starts recovered")
    fade = FADE if options.fade is None else options.fade
    options.starts = check_starts(options.starts, fade, options.recovered)


def runs(
    options: argparse.Namespace, place: Place, tasks: Sequence[str], rates: Sequence[float], best_rates: BestRates
) -> Iterator[Run]:
    """The runs asked for; seeds and rates outermost, so that a cut comparison has all tasks and methods.

    Raises:
        SystemExit: for a rate out of range, or none to choose from; weights that cannot be read, or do not fit the methods.
    """
    place.check_methods(options.methods, options.starts if "sparse" in options.methods else [])
    methods = [("dense", "none", 0, "plain", "")] if "dense" in options.methods else []
    if "sparse" in options.methods:
        methods += [
            ("sparse", mask, rank, start, own)
            for mask, rank, start, own in itertools.product(
                options.masks, options.ranks, options.starts, options.sparse_arguments
            )
            if rank or "early" not in start.split("+")
        ]
    if wrong := [rate for rate in rates if not 0 < rate < 1]:
        raise SystemExit(f"--rates: {wrong[0]:g} is no learning rate; numbers above 0 and below 1 are expected")
    best = best_rates(read(options.csv)) if options.best_rates else {}
    for seed, rate in itertools.product(options.seeds, [0.0] if options.best_rates else rates):
        for task, (method, mask, rank, start, own) in itertools.product(tasks, methods):
            run = Run(task, method, mask, rank, start, rate, seed, own, place.settings)
            yield replace(run, rate=_best(run, best, options.csv)) if options.best_rates else run


def _best(run: Run, best: Mapping[tuple[str, str, str], float], file: Path) -> float:
    for candidate in (run, replace(run, rank=0, start=run.without("early"))):
        if (key := (run.settings, run.task, candidate.label)) in best:
            return best[key]
    raise SystemExit(f"--best-rates: {file} has no run of {run.task}, {run.label} to choose from")


# ---------------------------------------------------------------------------------------------------- running


def run_all(
    options: argparse.Namespace,
    recipe: Recipe,
    place: Place,
    wanted: Sequence[Run],
    dense_rates: Mapping[str, float],
    threads: Mapping[str, str],
) -> int:
    """Make the runs that are missing; 1 if any failed.

    Args:
        options: of the command line.
        recipe: what is run.
        place: on what.
        wanted: the runs.
        dense_rates: by task: rate of the dense runs that others start from.
        threads: environment of a process for each run.
    """
    threads = {**launching.share_of_threads(options.jobs), **threads}
    deadline = float("inf") if options.budget_minutes is None else time.time() + 60 * options.budget_minutes
    job = Job(recipe, place, options.runs.absolute(), options.in_process, threads, deadline, options.recovered)
    done = {result.run for result in read(options.csv)}
    wanted = list(dict.fromkeys(wanted))  # --seeds 0 0
    missing = [run for run in wanted if run not in done]
    if not options.prepare:
        check_recovered(missing, options.recovered)
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done.", flush=True)
    stages = _stages(missing, dense_rates)
    if before := [run for stage in stages for run in stage if _start_of(job, run) is None]:
        print(f"{len(before)} dense runs that others start from come first.", flush=True)
    if options.prepare and not before:
        print("--prepare: none of these runs starts from a dense one that is not there yet.", flush=True)
    if options.dry_run:
        for run in [*before, *([] if options.prepare else missing)]:
            print(f"  {run}")
        return 0
    failed: list[str] = []
    left = 0
    workers: Workers[Run, Result | None] = Workers(options.jobs, options.in_process)
    for stage, batch in enumerate(stages if options.prepare else [*stages, missing]):
        last = stage == len(stages)
        todo = [run for run in batch if (run not in done if last else _start_of(job, run) is None)]
        for run, result in workers.outcomes(
            make, {run: (run, job, dense_rates.get(run.task, 0.0), not last) for run in todo}
        ):
            if isinstance(result, RunError):
                failed.append(str(run))
                print(f"{run} FAILED: {result}", flush=True)
            elif result is None:
                left += 1
            else:
                if run.method != "fade" and run not in done:
                    append_row(options.csv, result)
                    done.add(run)
                print(f"{run}: score {result.score:.2f}, {result.samples_per_second:,.0f} rows/s, "
                      f"{result.seconds:.0f} s", flush=True)  # fmt: skip
    if left:
        print(f"The {options.budget_minutes:g} minutes are over, {left} runs are left. The same command goes on.")
    if failed:
        print(f"{len(failed)} runs failed: {'; '.join(failed)}. The same command makes them again.")
    return min(len(failed), 1)


def _stages(missing: Sequence[Run], dense_rates: Mapping[str, float]) -> list[list[Run]]:
    """Dense siblings, then first stages: the runs that others start from, each once."""
    siblings = [dense_sibling(run, dense_rates[run.task]) for run in missing if run.starts & {"teacher", "tuned"}]
    faded = [first_stage(run) for run in missing if "gradual" in run.starts]
    return [list(dict.fromkeys(siblings)), list(dict.fromkeys(faded))]


def make(run: Run, job: Job, dense_rate: float, keep: bool) -> Result | None:
    """Make one run and read what it left; None after the deadline.

    Args:
        run: of any method.
        job: what all runs share.
        dense_rate: of the dense run that it starts from.
        keep: whether its checkpoint is for others.

    Raises:
        RunError: it failed, or a run that it starts from did.
    """
    if time.time() > job.deadline:
        return None
    sibling = _needed(job, dense_sibling(run, dense_rate)) if run.starts & {"teacher", "tuned"} else None
    arguments, before = [], 0
    if "gradual" in run.starts:
        faded = _needed(job, first_stage(run))
        arguments += ["--model.weights", faded.checkpoint]
        before = faded.steps + faded.steps_before
    elif sibling is not None and "tuned" in run.starts:
        arguments += ["--model.weights", sibling.checkpoint]
        before = sibling.steps
    elif "recovered" in run.starts:
        assert job.recovered is not None, "checked before"
        recovered = recovered_checkpoint(run, job.recovered)
        arguments += ["--model.weights", str(recovered)]
        before = read_pretraining_checkpoint(recovered).step
    if sibling is not None and "teacher" in run.starts:
        arguments += ["--model.teacher.checkpoint", sibling.checkpoint]
    found = train(run, job, arguments, keep)
    result = Result.of(found, run, before)
    if keep:
        start = {"checkpoint": found["checkpoint"], "steps": found["steps"], "steps_before": before}
        _start_file(job, run).write_text(json.dumps(start) + "\n", encoding="utf-8")
    return result


def train(run: Run, job: Job, more: Sequence[str], keep: bool) -> dict[str, Any]:
    """Run the recipe; the content of its result file."""
    folder = _folder(job, run, keep)
    arguments = [*command_line(run, job, folder, keep), *more]

    def main(given: list[str]) -> object:
        # Imported where it is called, because a process of its own mostly does that.
        return importlib.import_module(job.recipe.module).main(given)

    return launching.train_and_read(job.recipe.module, main, arguments, folder, job.in_process, job.threads)[1]


def command_line(run: Run, job: Job, folder: Path, keep: bool) -> list[str]:
    """Arguments of the recipe for one run, without what it starts from."""
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        # The masks of a fade are in the state of its callback, which weights alone leave out.
        "init_args": {
            "save_last": True,
            "save_top_k": 0,
            "every_n_epochs": 1,
            "save_weights_only": run.method == "dense",
        },
    }
    callbacks = [{"class_path": job.recipe.table}, *([saver] if keep else [])]
    task = [] if run.task == "squad" else ["--data.task", run.task]
    return [
        *("fit", *job.place.config_arguments(), *method_arguments(run, job.recipe.configs)),
        *job.place.command_line(),
        *("--trainer.callbacks", json.dumps(callbacks)),
        *("--trainer.enable_checkpointing", str(keep).lower(), "--trainer.enable_progress_bar", "false"),
        # Hundreds of runs: one file each is enough, and it asks for no further package.
        *("--trainer.logger.class_path", "lightning.pytorch.loggers.CSVLogger"),
        *("--trainer.logger.init_args.save_dir", str(folder), *task),
        *("--model.learning_rate", repr(run.rate), "--seed_everything", str(run.seed), "--data.seed", str(run.seed)),
    ]


def _folder(job: Job, run: Run, keep: bool) -> Path:
    return job.runs / _STARTS / run.name if keep else job.runs / run.name


def _start_file(job: Job, run: Run) -> Path:
    return _folder(job, run, keep=True) / "start.json"


def _start_of(job: Job, run: Run) -> Start | None:
    """What a dense run left, if it was made."""
    file = _start_file(job, run)
    if not file.is_file():
        return None
    start = Start(**json.loads(file.read_text(encoding="utf-8")))
    return start if Path(start.checkpoint).is_file() else None


def _needed(job: Job, run: Run) -> Start:
    start = _start_of(job, run)
    if start is None:
        raise RunError(f"{run}, which it starts from, is not there")
    return start
