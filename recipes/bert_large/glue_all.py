"""Run the GLUE recipe over tasks, methods, ranks, masks, rates and seeds, and keep every result in one CSV file.

    make glue DATA=folder
    python -m recipes.bert_large.glue_all --tasks cola rte --ranks 0 4 16 64 --sweep
    python -m recipes.bert_large.glue_all --best-rates --seeds 0 1 2
    python -m recipes.bert_large.glue_all --csv my.csv --report

A run that is in the file already is not made again, so an interrupted comparison goes on where it stopped. Each run is the
recipe's own command line, in a process of its own or (--in-process) in one of a few. At the end it prints each method at its
own best rate, beside the published table. Without a GPU, data or weights it says what is missing and makes short runs of a
small model. Options that are not the runner's own go to every run (--trainer.max_epochs 5).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from recipes.bert_large import comparison
from recipes.bert_large.glue_plan import RATES, choose_place, choose_tasks
from recipes.bert_large.glue_report import best_rates, report
from recipes.bert_large.ledger import read
from recipes.children import answering_signals
from slope_pl.data.glue_tasks import TASKS

RECIPE = comparison.Recipe(
    "recipes.bert_large.glue", ("glue.yaml", "glue_dense.yaml"), "recipes.bert_large.glue_results.GlueTable"
)


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
    add("--weights", help="a folder with config.json and model.safetensors and vocab.txt, a hub id, or a checkpoint of "
        "recipes.bert_large.pretrain (.ckpt, and --data.tokenizer)")  # fmt: skip
    add("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help=f"default: all there are of {', '.join(TASKS)}")
    comparison.add_options(parser, _first_rates(), _sweeps())
    options, overrides = parser.parse_known_args(arguments)
    overrides = [argument for argument in overrides if argument != "--"]
    comparison.check_options(parser, options)
    options.csv = options.csv or options.runs / "results.csv"
    status = 0 if options.report else run_all(options, overrides)
    if options.dry_run:
        return status
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


def run_all(options: argparse.Namespace, overrides: list[str]) -> int:
    """Make the runs that are missing; 1 if any failed."""
    place = choose_place(options.config, options.data, options.weights, options.runs)
    place = replace(place, arguments=(*place.arguments, *overrides))
    tasks = choose_tasks(options.tasks, place.data)
    rates = options.rates or (sorted(RATES[place.config]) if options.sweep else RATES[place.config][:1])
    wanted = list(comparison.runs(options, place, tasks, rates, best_rates))
    best = best_rates(read(options.csv))
    dense_rates = {task: best.get((place.settings, task, "dense"), rates[0]) for task in tasks}
    # A model of two layers gives several threads nothing to do but wait for each other.
    threads = {"OMP_NUM_THREADS": "1"} if place.config == "glue_sample.yaml" else {}
    return comparison.run_all(options, RECIPE, place, wanted, dense_rates, threads)


if __name__ == "__main__":
    sys.exit(answering_signals(main))
