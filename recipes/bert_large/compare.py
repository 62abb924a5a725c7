"""Run the SQuAD recipe over methods, rates and seeds, and keep every result in one CSV file.

A run that is in the file already is not made again, so an interrupted comparison goes on where it stopped. Each run is a
process of its own, with the recipe's own command line. ``--report`` prints the table for the README: each method at its own
best rate, mean and spread over seeds.
"""

import argparse
import csv
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import lightning
import torch

HERE = Path(__file__).parent
METHODS: dict[str, list[str]] = {
    "dense": ["--config", str(HERE / "squad_dense.yaml")],
    "2:4, r = 0": ["--config", str(HERE / "squad.yaml")],
    "2:4, r = 4": ["--config", str(HERE / "squad.yaml"), "--model.slope.adapter_rank", "4"],
    "2:4, r = 16": ["--config", str(HERE / "squad.yaml"), "--model.slope.adapter_rank", "16"],
    "2:4 transposable, r = 0": ["--config", str(HERE / "squad.yaml"), "--model.slope.mask", "transposable"],
    "2:4 random, r = 0": ["--config", str(HERE / "squad.yaml"), "--model.slope.mask", "random"],
}


@dataclass(frozen=True)
class Result:
    """One line of the CSV file: a run, its scores, and where it was made."""

    method: str
    rate: float
    seed: int
    exact_match: float
    f1: float
    questions: int
    steps: int
    resetups: int
    woke_at_step: int
    seconds: float
    device: str
    torch: str
    lightning: str
    commit: str


def main() -> None:
    """Parse the command line, run what is missing, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="results; created, or continued")
    parser.add_argument("--config", type=Path, default=HERE / "squad_minilm.yaml", help="what all runs share")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 2e-4, 4e-4], help="peak learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--best-rates", action="store_true", help="only each method's best rate so far in the file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on the one device")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="logs")
    parser.add_argument("--report", action="store_true", help="print the table and run nothing")
    options, overrides = parser.parse_known_args()
    if not options.report:
        wanted = [*grid(options)]
        done = {(r.method, r.rate, r.seed) for r in read(options.csv)}
        missing = [run for run in wanted if run not in done]
        print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done.", flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            waiting = [pool.submit(train, *run, options, overrides) for run in missing]
            for run in as_completed(waiting):
                result = run.result()
                append(options.csv, result)
                print(f"{result.method}, rate {result.rate:g}, seed {result.seed}: EM {result.exact_match:.2f}, "
                      f"F1 {result.f1:.2f}, {result.seconds:.0f} s", flush=True)  # fmt: skip
    print(report(read(options.csv)))


def grid(options: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    """The runs asked for: (method, rate, seed)."""
    if not options.best_rates:
        yield from itertools.product(options.methods, options.rates, options.seeds)
        return
    best = best_rates(read(options.csv))
    for method, seed in itertools.product(options.methods, options.seeds):
        if method not in best:
            raise SystemExit(f"--best-rates: {options.csv} has no run of {method!r} to choose a rate from")
        yield method, best[method], seed


def train(method: str, rate: float, seed: int, options: argparse.Namespace, overrides: list[str]) -> Result:
    """Run one training in a process of its own."""
    folder = options.runs / f"{method.replace(' ', '').replace(',', '-').replace(':', '')}-{rate:g}-{seed}"
    command = [
        *(sys.executable, "-m", "recipes.bert_large.squad", "fit", "--config", str(options.config), *METHODS[method]),
        *("--model.learning_rate", str(rate), "--seed_everything", str(seed), "--data.seed", str(seed)),
        *("--trainer.logger.init_args.save_dir", str(folder), "--trainer.enable_progress_bar", "false"),
        *("--trainer.enable_checkpointing", "false", "--trainer.callbacks", "[recipes.bert_large.results.ResultTable]"),
        *overrides,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with log.open("w") as stream:
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if status:
        raise SystemExit(f"{method}, rate {rate:g}, seed {seed} failed with status {status}; the end of {log}:\n"
                         + "\n".join(log.read_text().splitlines()[-15:]))  # fmt: skip
    file = max(folder.glob("**/result-fit.json"), key=lambda path: path.stat().st_mtime)
    found = json.loads(file.read_text())
    return Result(
        method, rate, seed,
        exact_match=round(found["scores"]["val/exact_match"], 3),
        f1=round(found["scores"]["val/f1"], 3),
        questions=int(found["scores"]["val/questions"]),
        steps=found["steps"],
        resetups=found["resetups"] or 0,
        woke_at_step=-1 if found["woke_at_step"] is None else found["woke_at_step"],
        seconds=round(found["seconds"], 1),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        torch=torch.__version__,
        lightning=lightning.__version__,
        commit=commit(),
    )  # fmt: skip


def commit() -> str:
    """The commit that runs: of the checkout, or SLOPE_COMMIT where the code was copied without its history."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return asked.stdout.strip() or os.environ.get("SLOPE_COMMIT", "unknown")


def read(file: Path) -> list[Result]:
    """All results of a file, in order; none if there is no file."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    kinds = {field.name: field.type for field in fields(Result)}
    return [Result(**{key: kinds[key](text) for key, text in row.items()}) for row in rows]  # type: ignore[operator]


def append(file: Path, result: Result) -> None:
    """Add a line, and the header to a new file."""
    new = not file.is_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Result)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(result))


def best_rates(results: list[Result]) -> dict[str, float]:
    """The rate of highest mean F1 of each method."""
    scores: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        scores[result.method][result.rate].append(result.f1)
    return {method: max(by_rate, key=lambda rate: statistics.mean(by_rate[rate])) for method, by_rate in scores.items()}


def report(results: list[Result]) -> str:
    """The Markdown table: each method at its best rate; all rates tried with their mean F1 beside it."""
    lines = ["| method | rate | seeds | EM | F1 | F1 at every rate tried |", "|---|---|---|---|---|---|"]
    for method, rate in best_rates(results).items():
        own = [r for r in results if r.method == method]
        at_best = [r for r in own if r.rate == rate]
        tried = sorted({r.rate for r in own})
        others = ", ".join(f"{r:g}: {statistics.mean(x.f1 for x in own if x.rate == r):.2f}" for r in tried)
        em, f1 = (_spread([getattr(r, key) for r in at_best]) for key in ("exact_match", "f1"))
        lines.append(f"| {method} | {rate:g} | {len(at_best)} | {em} | {f1} | {others} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
