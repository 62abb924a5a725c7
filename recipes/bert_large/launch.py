"""`make bert-large`: decide what this machine can do, say so, train, then validate the checkpoint.

With a GPU and data and weights at hand (from the hub, or given), the real recipe runs: squad.yaml. Otherwise the same
BERT-Large runs for a few dozen steps on the bundled sample: squad_sample.yaml. Everything after ``--`` goes to the training
command, for example ``-- --model.slope.adapter_rank 64``.
"""

import argparse
import sys
from pathlib import Path

import torch

from recipes import launching
from recipes.children import answering_signals
from recipes.launching import ROOT

HERE = Path(__file__).parent


def main() -> int:
    """Run fit and validate; the exit status is that of the first command that failed, 1 if their scores differ."""
    parser = argparse.ArgumentParser(
        prog="make bert-large", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="a folder with train*.json and dev*.json, or a hub data set (make: DATA=...)")
    parser.add_argument(
        "--weights",
        help="a folder with config.json and model.safetensors, a hub id, or a checkpoint (make: WEIGHTS=...)",
    )
    parser.add_argument("--runs", default="runs", help="where logs and checkpoints go")
    known, rest = parser.parse_known_args()
    rest = [argument for argument in rest if argument != "--"]
    overrides = [*plan(known.data, known.weights), "--trainer.logger.init_args.save_dir", known.runs, *rest]
    status, fitted, checkpoint = launching.fit(run, known.runs, overrides)
    if fitted is None:
        return status
    if not checkpoint:
        print("This run wrote no checkpoint; there is nothing to validate.")
        return 0
    status, validated = launching.validate(run, known.runs, overrides, checkpoint)
    return status if validated is None else compare(fitted, validated, checkpoint)


def plan(data: str | None, weights: str | None) -> list[str]:
    """Arguments of the recipe for this machine, with a printed reason."""
    gpu = torch.cuda.is_available()
    hub = launching.hub_is_reachable()
    needs_hub = [what for what, given in (("data", data), ("weights", weights)) if given is None]
    real = gpu and (hub or not needs_hub)
    config = HERE / ("squad.yaml" if real else "squad_sample.yaml")
    found = f"GPU: {torch.cuda.get_device_name() if gpu else 'none'}; hub: {'reachable' if hub else 'not reachable'}"
    print(f"{found}. Running {config.relative_to(ROOT)}.")
    if not real:
        missing = "a GPU" if not gpu else f"the hub, or your own {' and '.join(needs_hub)} (DATA=..., WEIGHTS=...)"
        where = "the bundled sample" if data is None else f"{data}, in short windows"
        print(
            f"The real recipe needs {missing}; this is the whole path on {where}: BERT-Large at full size, a few steps."
        )
        if weights is None:
            print("NOTE: training starts from RANDOM weights, so the scores below are those of an untrained model.")
        if data is not None and weights is None:
            print(
                "NOTE: your data is read with the vocabulary of the bundled sample; --data.tokenizer in ARGS names another."
            )
    arguments = ["--config", str(config.relative_to(ROOT))]
    if data is not None:
        arguments += ["--data.source", data]
    if weights is not None:
        arguments += ["--model.weights", weights]
        if not weights.endswith(".ckpt"):  # a pretraining checkpoint holds no vocabulary
            arguments += ["--data.tokenizer", weights]
    return arguments


def run(subcommand: str, arguments: list[str]) -> int:
    """Run the recipe's own command line."""
    # glibc raises this threshold as it sees large blocks freed, then keeps them in a heap that fragments: 7.5 GB at the peak
    # instead of 6. A fixed one gives them back.
    defaults = {} if torch.cuda.is_available() else {"MALLOC_MMAP_THRESHOLD_": str(16 << 20)}
    return launching.run("recipes.bert_large.squad", subcommand, arguments, defaults)


def compare(fitted: Path, validated: Path, checkpoint: str) -> int:
    """Say whether the checkpoint gives the scores that training ended with."""
    words = "F1 at the end of training", "of the checkpoint"
    same = launching.same_scores(fitted, validated, "val/f1", words, 4)
    print(f"Checkpoint  {checkpoint}\nLogs        tensorboard --logdir {fitted.parent}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(answering_signals(main))
