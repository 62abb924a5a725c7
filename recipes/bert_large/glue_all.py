"""Run the GLUE recipe over tasks, methods, ranks, masks, rates and seeds, and keep every result in one CSV file.

    make glue DATA=folder
    python -m recipes.bert_large.glue_all --tasks cola rte --ranks 0 4 16 64 --sweep
    python -m recipes.bert_large.glue_all --best-rates --seeds 0 1 2
    python -m recipes.bert_large.glue_all --csv my.csv --report

A run that is in the file already is not made again, so an interrupted comparison goes on where it stopped. Each run is a
process of its own, with the recipe's own command line. At the end it prints each method at its own best rate, beside the
published table. Without a GPU, data or weights it says what is missing and makes short runs of a small model. Options that
are not the runner's own go to every run (--trainer.max_epochs 5).
"""

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from recipes import launching
from recipes.bert_large.glue_ledger import Result, Run, append, read
from recipes.bert_large.glue_plan import HERE, RATES, Place, choose_place, choose_tasks
from recipes.bert_large.glue_report import best_rates, report
from recipes.launching import RunError
from slope_pl.data.glue_tasks import TASKS
from slope_pl.sparsity import MASK_KINDS


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are missing, then report; exit status 1 if a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.bert_large.glue_all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--csv", type=Path, help="results; created, or continued (default: results.csv in --runs)")
    add("--runs", type=Path, default=Path("runs/glue"), help="logs (default: runs/glue)")
    add("--config", choices=list(RATES), help="what all runs share; default: what this machine can do")
    add("--data", help="a folder with CoLA/train.tsv ..., or a hub id; default: SLOPE_DATA_DIR/glue, or the hub")
    add("--weights", help="a folder with config.json and model.safetensors and vocab.txt, or a hub id")
    add("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help=f"default: all there are of {', '.join(TASKS)}")
    add("--methods", nargs="+", choices=["dense", "sparse"], default=["dense", "sparse"])
    add("--masks", nargs="+", choices=list(MASK_KINDS), default=["magnitude"], help="of the sparse runs")
    add("--ranks", nargs="+", type=int, default=[0], help="of the adapters of the sparse runs (default: 0)")
    add("--sparse-arguments", default="", metavar="'ARGUMENTS'", help="for the sparse runs alone")
    add("--rates", nargs="+", type=float, help=f"peak learning rates; default: {_first_rates()}")
    add("--sweep", action="store_true", help=f"instead of --rates: {_sweeps()}")
    add("--best-rates", action="store_true", help="instead of --rates: the best so far of each task and method")
    add("--seeds", nargs="+", type=int, default=[0], help="of the head, the order and the subset of the data")
    add("--jobs", type=int, default=1, help="runs at a time on the one device")
    add("--in-process", action="store_true", help="all runs in this process: saves the start of Python and torch")
    add("--budget-minutes", type=float, help="begin no run after so many minutes")
    add("--report", action="store_true", help="print the table and run nothing")
    options, overrides = parser.parse_known_args(arguments)
    overrides = [argument for argument in overrides if argument != "--"]
    if options.in_process and options.jobs > 1:
        parser.error("--in-process makes one run at a time; leave out --jobs or --in-process")
    if sum(map(bool, (options.rates, options.sweep, options.best_rates))) > 1:
        parser.error("--rates, --sweep and --best-rates exclude each other")
    options.csv = options.csv or options.runs / "results.csv"
    status = 0 if options.report else run_all(options, overrides)
    text = report(read(options.csv))
    print("\n" + text)
    if not options.report:
        options.csv.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        print(f"\nResults  {options.csv}\nTable    {options.csv.with_suffix('.md')}")
    return status


def _first_rates() -> str:
    return ", ".join(f"{rates[0]:g} ({name})" for name, rates in RATES.items())


def _sweeps() -> str:
    return "; ".join(f"{' '.join(f'{rate:g}' for rate in sorted(rates))} ({name})" for name, rates in RATES.items())


def run_all(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Make the runs that are missing; 1 if any failed."""
    began = time.perf_counter()
    place = choose_place(options.config, options.data, options.weights, options.runs)
    place = Place(place.config, place.data, place.weights, (*place.arguments, *overrides))
    wanted = list(runs(options, place))
    done = {result.run for result in read(options.csv)}
    missing = [run for run in wanted if run not in done]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done.", flush=True)
    failed, left = [], 0

    def make(run: Run) -> Result | None:
        if options.budget_minutes is not None and time.perf_counter() - began > 60 * options.budget_minutes:
            return None
        return train(run, place, options)

    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = {pool.submit(make, run): run for run in missing}
        try:
            for future in as_completed(waiting):
                run = waiting[future]
                try:
                    result = future.result()
                except RunError as error:
                    failed.append(str(run))
                    print(f"{run} FAILED: {error}", flush=True)
                    continue
                if result is None:
                    left += 1
                    continue
                append(options.csv, result)
                print(f"{run}: score {result.score:.2f}, {result.samples_per_second:,.0f} rows/s, "
                      f"{result.seconds:.0f} s", flush=True)  # fmt: skip
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not begin the runs that wait
            raise
    if left:
        print(f"The {options.budget_minutes:g} minutes are over, {left} runs are left. The same command goes on.")
    if failed:
        print(f"{len(failed)} runs failed: {'; '.join(failed)}. The same command makes them again.")
    return min(len(failed), 1)


def runs(options: argparse.Namespace, place: Place) -> Iterator[Run]:
    """The runs asked for; seeds and rates outermost, so that a cut comparison has all tasks and methods."""
    methods = [("dense", "none", 0, "")] if "dense" in options.methods else []
    if "sparse" in options.methods:
        methods += [("sparse", m, rank, options.sparse_arguments) for m in options.masks for rank in options.ranks]
    tasks = choose_tasks(options.tasks, place.data)
    rates = options.rates or (sorted(RATES[place.config]) if options.sweep else RATES[place.config][:1])
    if wrong := [rate for rate in rates if not 0 < rate < 1]:
        raise SystemExit(f"--rates: {wrong[0]:g} is no learning rate; numbers above 0 and below 1 are expected")
    best = best_rates(read(options.csv)) if options.best_rates else {}
    for seed, rate in itertools.product(options.seeds, [0.0] if options.best_rates else rates):
        for task, (method, mask, rank, own) in itertools.product(tasks, methods):
            run = Run(task, method, mask, rank, rate, seed, own, place.settings)
            if options.best_rates:
                key = run.settings, task, run.label
                if key not in best:
                    raise SystemExit(f"--best-rates: {options.csv} has no run of {task}, {run.label} to choose from")
                run = replace(run, rate=best[key])
            yield run


def command_line(run: Run, place: Place, folder: Path) -> list[str]:
    """Arguments of recipes.bert_large.glue for one run."""
    sparse = run.method == "sparse"
    method = ["--config", str(HERE / ("glue.yaml" if sparse else "glue_dense.yaml"))]
    if sparse:
        method += ["--model.slope.mask", run.mask, "--model.slope.adapter_rank", str(run.rank)]
        method += shlex.split(run.arguments)
    return [
        *("fit", *method, *place.command_line()),
        *("--trainer.callbacks", "[recipes.bert_large.glue_results.GlueTable]"),
        *("--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false"),
        *("--trainer.logger.init_args.save_dir", str(folder), "--data.task", run.task),
        *("--model.learning_rate", repr(run.rate), "--seed_everything", str(run.seed), "--data.seed", str(run.seed)),
    ]


def train(run: Run, place: Place, options: argparse.Namespace) -> Result:
    """Make one run and read what it left."""
    name = f"{run.task}-{run.label}-{run.rate:g}-{run.seed}".replace(" ", "").replace(",", "-").replace(":", "")
    folder = options.runs.absolute() / name
    # A model of two layers gives several threads nothing to do but wait for each other.
    threads = {"OMP_NUM_THREADS": "1"} if place.config == "glue_sample.yaml" else {}
    arguments = command_line(run, place, folder)
    _, found = launching.train_and_read("recipes.bert_large.glue", glue, arguments, folder, options.in_process, threads)
    return Result.of(found, run)


def glue(arguments: list[str]) -> object:
    """The recipe's own command line; imported where it is called, because a process of its own mostly does that."""
    from recipes.bert_large.glue import main as recipe

    return recipe(arguments)


if __name__ == "__main__":
    sys.exit(main())
