"""Train GPT-2 by several methods, at several rates, with several seeds, and keep every result in one CSV file.

    python -m recipes.gpt2.compare run --csv my.csv --rates 6e-4 1.2e-3 1.8e-3
    python -m recipes.gpt2.compare run --csv my.csv --best-rates --seeds 0 1 2
    python -m recipes.gpt2.compare report --csv my.csv

A run that is in the file already is not made again, so that an interrupted comparison goes on where it stopped; what was
interrupted within a run is made again from its beginning. With the same seed all methods see the same tokens in the same
order and begin with the same weights. Options that are not the runner's own go to every run (--model.size medium).
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from recipes import launching
from recipes.adapters import FILE as ADAPTERS
from recipes.children import answering_signals
from recipes.gpt2.adapters import append_trace, draw_traces, rank_table, read_traces, split_rank
from recipes.gpt2.launch import data_arguments
from recipes.gpt2.ledger import Curve, Result, append_curve, read, read_curves, run_name
from recipes.gpt2.plans import FAMILIES, HERE, Plan, Queue, known_methods, plans
from recipes.gpt2.report import draw, report
from recipes.gpt2.scoring import Zeroshot, read_scores, score_runs, score_table
from recipes.launching import RunError
from recipes.ledger import append_row
from recipes.meter import CURVE

SECONDS_AROUND_FIT = 20
"""Start of a run's process, reading of the data, and its end; what the file has is the time in fit."""


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; exit status 1 if a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.gpt2.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="make the runs that are missing, then report", allow_abbrev=False)
    reporter = commands.add_parser("report", help="table and loss curves of what is in the file", allow_abbrev=False)
    for command in (runner, reporter):
        command.add_argument("--csv", type=Path, required=True, help="results; curves go into a second file beside it")
    add = runner.add_argument
    add("--family", choices=[*FAMILIES], help="default: novels with a GPU and a text, else tiny")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="with rates of its own as in dense@6e-4,9e-4; default: dense, slope, transposable, srste and fst; 'all'; "
        + known_methods(),
    )
    add("--add", action="append", default=[], metavar="'NAME: CONFIG.yaml ARGUMENTS'", help="a method of your own")
    add("--rates", nargs="+", type=float, help="peak learning rates")
    add("--seeds", nargs="+", type=int, default=[0], help="of weights and order of the data")
    add("--best-rates", action="store_true", help="only each method's best rate so far in the file")
    add("--data", help="a text: file or folder; default: the novels of SLOPE_DATA_DIR")
    add("--tokenizer", help="default: GPT-2's, of SLOPE_DATA_DIR or from the hub")
    add("--runs", type=Path, default=Path("runs/gpt2-compare"), help="logs")
    add(
        "--budget-minutes",
        type=float,
        help="begin no run that would not end by then, going by what such runs took so far",
    )
    add(
        "--in-process",
        action="store_true",
        help="all runs in this process: saves the start of Python and torch",
    )
    add(
        "--gpus",
        nargs="+",
        type=int,
        metavar="GPU",
        help="make runs side by side, one on each of these GPUs (0 1 ...); on one that is named twice, two are scored at "
        "a time, one is trained",
    )
    add("--curve-every", type=int, default=5, help="steps whose mean is one point in the file of the curves")
    add("--checkpoints", action="store_true", help="keep the last checkpoint of every run, below --runs")
    add(
        "--zeroshot",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="score the runs on the paper's zero-shot tasks too, from local files (layout: recipes.gpt2.zeroshot --help) or, "
        "without a FOLDER, those of SLOPE_DATA_DIR or the hub; a file of its own beside the CSV; needs the extra eval",
    )
    add("--tasks", nargs="+", help="for --zeroshot; default: all that are there")
    add(
        "--trace-adapters",
        action="store_true",
        help="how adapters converge after their wake, as a third file and a picture",
    )
    options, overrides = parser.parse_known_args(arguments)
    if options.command == "report":
        if overrides:
            parser.error(f"unknown arguments of report: {' '.join(overrides)}")
        status = 0
    else:
        status = run_all(options, overrides)
    results = read(options.csv)
    ranks = rank_table(results, read_curves(options.csv))
    print(report(results))
    if ranks is not None:
        print(f"\n{ranks}")
    if (scored := score_table(results, read_scores(options.csv))) is not None:
        print(f"\n{scored}")
    print(draw(options.csv))
    if (drawn := draw_traces(options.csv, results)) is not None:
        print(drawn)
    return status


def run_all(options: argparse.Namespace, overrides: list[str]) -> int:
    """Make the runs that are missing; the number of failed ones, at most 1."""
    began = time.perf_counter()
    if options.tasks and options.zeroshot is None:
        raise SystemExit("--tasks has no effect without --zeroshot")
    zeroshot = None
    if options.zeroshot is not None:
        zeroshot = Zeroshot.of(options.zeroshot, options.tasks, keep=options.checkpoints)
        options.checkpoints = True  # until they are scored
    location = data_arguments(options.data, options.tokenizer)
    name = options.family or ("novels" if location and torch.cuda.is_available() else "tiny")
    wanted = plans(name, options, overrides)
    results = read(options.csv)
    done = {(r.settings, r.rate, r.seed) for r in results}
    missing = [plan for plan in wanted if plan.key not in done]
    print(f"{name}: {len(wanted)} runs, {len(wanted) - len(missing)} of them done.", flush=True)
    if options.trace_adapters:
        _name_untraced(options.csv, results, wanted)
    if name == "tiny" and options.data is None:
        location = []  # the bundled stories
    if options.in_process and options.gpus:
        raise SystemExit(
            "--in-process with --gpus: runs side by side are processes of their own; leave one of them out"
        )
    lanes = [Lane.on_gpu(gpu, options.runs) for gpu in options.gpus or ()] or [Lane({})]
    seconds: dict[str, float] = {}
    for result in results:
        seconds[result.settings] = max(result.seconds + SECONDS_AROUND_FIT, seconds.get(result.settings, 0.0))
    queue = Queue(missing, options.budget_minutes, began, seconds)
    with ThreadPoolExecutor(len(lanes)) as pool:
        for work in [pool.submit(Worker(queue, lane, location, options).work) for lane in lanes]:
            work.result()
    if queue.plans:
        print(
            f"Budget: {(time.perf_counter() - began) / 60:.1f} min are used, a run takes {queue.longest / 60:.1f}; "
            f"{len(queue.plans)} left."
        )
    if options.trace_adapters and queue.longest and not queue.traced:
        print(
            "--trace-adapters had no effect: no run of this sitting left a trace (rank 0, dense, or adapters never awake)."
        )
    if zeroshot is not None:
        budget = options.budget_minutes, began
        environments = [lane.environment for lane in lanes]
        queue.failed += score_runs(
            wanted, options.csv, lambda plan: run_folder(plan, options), zeroshot, environments, budget
        )
    if failed := queue.failed:
        print(f"{len(failed)} runs failed: {'; '.join(failed)}. The same command makes them again.")
    return min(len(failed), 1)


@dataclass(frozen=True)
class Lane:
    """Where runs are made one after the other.

    Attributes:
        environment: set for the runs' processes.
        turn: lock by which a run that gets ready waits for the one that trains; without, none is begun before.
    """

    environment: Mapping[str, str]
    turn: Path | None = None

    @classmethod
    def on_gpu(cls, index: int, runs: Path) -> "Lane":
        """One whose lock is the GPU's: lanes that share it, also those of another runner with these ``runs``, train in turn."""
        environment = launching.one_gpu(index)
        return cls(environment, runs / f"gpu-{environment['CUDA_VISIBLE_DEVICES']}.lock")


class _Run(NamedTuple):
    plan: Plan
    outcome: "Future[tuple[Result, Curve, Path, float]]"
    """With the seconds that it took of its lane."""


class Worker:
    """Makes the runs of a lane until the queue gives none.

    Args:
        queue: of all lanes.
        lane: its own.
        location: arguments that say where the text is.
        options: of the runner.
    """

    def __init__(self, queue: Queue, lane: Lane, location: Sequence[str], options: argparse.Namespace) -> None:
        self._queue, self._lane, self._location, self._options = queue, lane, location, options

    def work(self) -> None:
        """Make them; where the lane has a lock, the next one begins to get ready with the one before it."""
        with ThreadPoolExecutor(2) as pool:
            while (plan := self._queue.take()) is not None:
                current: _Run | None = self._begin(pool, plan)
                while current is not None:
                    following = self._following(current.plan)
                    ready = None if following is None else self._begin(pool, following)
                    self._finish(current)
                    current = ready

    def _begin(self, pool: ThreadPoolExecutor, plan: Plan) -> "_Run":
        def run() -> tuple[Result, Curve, Path, float]:
            began = time.perf_counter()
            result, curve, trace = train(
                plan, self._location, self._options, self._lane.environment, turn=self._lane.turn
            )
            took = time.perf_counter() - began
            # What waits for its turn takes no time of its own before.
            return result, curve, trace, min(took, result.seconds + SECONDS_AROUND_FIT) if self._lane.turn else took

        return _Run(plan, pool.submit(run))

    def _following(self, plan: Plan) -> Plan | None:
        """What is to get ready while ``plan`` runs."""
        if self._lane.turn is None:
            return None
        expected = self._queue.expected(plan)
        return None if expected is None else self._queue.take(free_at=time.perf_counter() + expected)

    def _finish(self, run: "_Run") -> None:
        queue, label = self._queue, run.plan.label
        try:
            result, curve, trace, seconds = run.outcome.result()
        except RunError as error:
            queue.failed.append(label)
            print(f"{label} FAILED: {error}", flush=True)
            return
        with queue.lock:
            append_curve(self._options.csv, curve)  # first: a run counts as done once its row is there
            queue.traced += append_trace(self._options.csv, result.run, trace)
            append_row(self._options.csv, result)
            queue.took(run.plan, seconds)
        print(
            f"{label}: loss {result.val_loss:.4f}, {result.tokens_per_second:,.0f} tokens/s, {result.seconds:.0f} s",
            flush=True,
        )


def _name_untraced(file: Path, results: Sequence[Result], wanted: Sequence[Plan]) -> None:
    keys, traces = {plan.key for plan in wanted}, read_traces(file)
    untraced = [
        f"{r.method}, rate {r.rate:g}, seed {r.seed}"
        for r in results
        if (r.settings, r.rate, r.seed) in keys and r.run not in traces and (split_rank(r.settings) or ("", 0))[1]
    ]
    if untraced:
        print(
            f"Done without --trace-adapters, and not made again: {'; '.join(untraced)}. Another --csv makes them anew."
        )


def command_line(
    plan: Plan,
    location: Sequence[str],
    folder: Path,
    checkpoints: bool,
    trace: bool = False,
    turn: Path | None = None,
) -> list[str]:
    """Arguments of recipes.gpt2.pretrain for one run."""
    config, *arguments = shlex.split(plan.settings)
    tracing = ["recipes.adapters.AdapterTrace"] if trace else []
    waiting = [] if turn is None else [{"class_path": "recipes.turns.Turn", "init_args": {"file": str(turn)}}]
    callbacks = [*waiting, "recipes.meter.Meter", *tracing, "recipes.gpt2.results.ResultTable"]
    return [
        *("fit", "--config", str(HERE / config), *location),
        *("--trainer.callbacks", json.dumps(callbacks)),
        *("--trainer.enable_checkpointing", str(checkpoints).lower(), "--trainer.enable_progress_bar", "false"),
        *("--trainer.logger.init_args.save_dir", str(folder), "--model.sample_tokens", "0"),
        *arguments,
        *("--model.learning_rate", repr(plan.rate), "--seed_everything", str(plan.seed), "--data.seed", str(plan.seed)),
    ]


def run_folder(plan: Plan, options: argparse.Namespace) -> Path:
    """Where a run's logs and checkpoints go."""
    words = "".join(c if c.isalnum() or c in "=." else "-" for c in f"{plan.method}-{plan.rate:g}-{plan.seed}")
    return Path(options.runs).absolute() / f"{words}-{run_name(*plan.key)}"


def train(
    plan: Plan,
    location: Sequence[str],
    options: argparse.Namespace,
    environment: Mapping[str, str],
    turn: Path | None = None,
) -> tuple[Result, Curve, Path]:
    """Make one run and read what it left; the path is that of its adapters' trace, if it left one.

    Args:
        plan: the run.
        location: arguments that say where the text is.
        options: of the runner.
        environment: set for the run's process.
        turn: lock that it waits for before it trains.
    """
    folder = run_folder(plan, options)
    arguments = command_line(
        plan, location, folder, options.checkpoints, options.trace_adapters, turn and turn.absolute()
    )
    threads = {**launching.share_of_threads(len(options.gpus or [0])), **launching.one_thread()}
    file, found = launching.train_and_read(
        "recipes.gpt2.pretrain", pretrain, arguments, folder, options.in_process, threads, environment
    )
    result = Result.of(
        found, family=plan.family, method=plan.method, settings=plan.settings, rate=plan.rate, seed=plan.seed
    )
    return result, Curve.of(file.with_name(CURVE), result, options.curve_every), file.with_name(ADAPTERS)


def pretrain(arguments: list[str]) -> object:
    """The recipe's own command line; imported where it is called, because a process of its own mostly does that."""
    from recipes.gpt2.pretrain import main as recipe

    return recipe(arguments)


if __name__ == "__main__":
    sys.exit(answering_signals(main))
