"""`make gpt2`: decide what this machine can do, say so, train, then validate the checkpoint in a second process.

With a GPU and a text (DATA=folder or file; without it the novels of SLOPE_DATA_DIR, where that is set), GPT-2 small is
trained 2:4 sparse on it for 40M tokens: novels_slope.yaml. Otherwise a small GPT-2 is trained on the bundled stories, to the
end: tiny.yaml. Everything after ``--`` goes to the training command, for example ``-- --model.slope.adapter_rank 16``.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from recipes import launching
from recipes.children import answering_signals
from recipes.launching import ROOT

HERE = Path(__file__).parent


def main() -> int:
    """Run fit and validate; the exit status is that of the first command that failed, 1 if their losses differ."""
    parser = argparse.ArgumentParser(
        prog="make gpt2", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data", help="a text: a file or a folder of .txt or .jsonl, also .xz and .gz (make: DATA=...)"
    )
    parser.add_argument(
        "--tokenizer",
        help="folder of a GPT-2 tokenizer, or a hub id (make: TOKENIZER=...); default: see data_arguments",
    )
    parser.add_argument("--runs", default="runs", help="where logs and checkpoints go")
    known, rest = parser.parse_known_args()
    rest = [argument for argument in rest if argument != "--"]
    overrides = [*plan(known.data, known.tokenizer), "--trainer.logger.init_args.save_dir", known.runs, *rest]
    status, fitted, checkpoint = launching.fit(run, known.runs, overrides)
    if fitted is None:
        return status
    if not checkpoint:
        print("This run wrote no checkpoint; there is nothing to validate.")
        return 0
    status, validated = launching.validate(run, known.runs, overrides, checkpoint)
    return status if validated is None else compare(fitted, validated, checkpoint)


def plan(data: str | None, tokenizer: str | None) -> list[str]:
    """Arguments of the recipe for this machine, with a printed reason."""
    gpu = torch.cuda.is_available()
    arguments = data_arguments(data, tokenizer)
    real = gpu and bool(arguments)
    config = (HERE / ("novels_slope.yaml" if real else "tiny.yaml")).relative_to(ROOT)
    print(f"GPU: {torch.cuda.get_device_name() if gpu else 'none'}. Running {config}.")
    if real:
        return ["--config", str(config), *arguments]
    missing = "a text (DATA=folder or file)" if gpu else "a GPU"
    print(f"GPT-2 small needs {missing}; this is the whole path with a small GPT-2 on the bundled stories.")
    if data is not None or tokenizer is not None:
        print("NOTE: your text is left aside; to train the small model on it, name it in ARGS=--data.source ...")
    return ["--config", str(config)]


def data_arguments(data: str | None, tokenizer: str | None) -> list[str]:
    """Where the text of the novels configs is: as given, else in SLOPE_DATA_DIR; none if there is none.

    A tokenizer that is not given is SLOPE_DATA_DIR's, else the recipe's (the hub's gpt2).
    """
    shared = os.environ.get("SLOPE_DATA_DIR")
    novels = Path(shared or "") / "text" / "novels.txt.xz"
    vocabulary = Path(shared or "") / "tokenizers" / "gpt2-encoder.json"
    if data is None:
        if not shared or not novels.is_file():
            return []
        data = str(novels)
    if tokenizer is None and shared and vocabulary.is_file():
        tokenizer = str(vocabulary)
    return ["--data.source", data, *(["--data.tokenizer", tokenizer] if tokenizer else [])]


def run(subcommand: str, arguments: list[str]) -> int:
    """Run the recipe's own command line."""
    return launching.run("recipes.gpt2.pretrain", subcommand, arguments, launching.one_thread())


def compare(fitted: Path, validated: Path, checkpoint: str) -> int:
    """Say whether the checkpoint gives the loss that training ended with."""
    words = "Loss at the end of training", "of the checkpoint"
    same = launching.same_scores(fitted, validated, "val/loss", words, 6)
    prompt = "--prompt '[\"There was once\"]'"
    print(
        f"Checkpoint  {checkpoint}\nLogs        tensorboard --logdir {fitted.parent}\nLoss curve  {fitted.parent}/loss.svg"
        f"\nMore text   python -m recipes.gpt2.pretrain generate --ckpt_path {checkpoint} {prompt}"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(answering_signals(main))
