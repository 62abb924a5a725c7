"""`make bert-pretrain`: decide what this machine can do, say so, then both phases of pretraining and a validation.

With a GPU and a text (DATA=folder, file or hub id) BERT-Large is pretrained 2:4 sparse on it: pretrain_phase1.yaml, then
pretrain_phase2.yaml from its checkpoint (with --start_from CHECKPOINT, phase 2 alone). Otherwise a small BERT is pretrained on
the bundled stories, to the end of both phases. Everything after ``--`` goes to both training commands.
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
    """Run both phases and a validation; the status is that of the first command that failed, 1 if the losses differ."""
    parser = argparse.ArgumentParser(
        prog="make bert-pretrain",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", help="a text: a file or folder of .txt or .jsonl, or a hub id (make: DATA=...)")
    parser.add_argument("--tokenizer", help="a vocab.txt, a folder, or a hub id (make: TOKENIZER=...)")
    parser.add_argument("--start_from", help="a checkpoint of phase 1: leave phase 1 out (make: START=...)")
    parser.add_argument("--runs", default="runs", help="where logs and checkpoints go")
    known, rest = parser.parse_known_args()
    rest = [argument for argument in rest if argument != "--"]
    phases = plan(known.data, known.tokenizer)
    shared = ["--trainer.logger.init_args.save_dir", known.runs, *rest]
    checkpoint, fitted = known.start_from, None
    for number, arguments in enumerate(phases, 1):
        if number == 1 and checkpoint is not None:
            continue
        start = [] if checkpoint is None else ["--model.start_from", checkpoint]
        status, fitted, checkpoint = launching.fit(run, known.runs, [*arguments, *start, *shared])
        if fitted is None:
            return status
        if not checkpoint:
            print("This run wrote no checkpoint; the chain ends here.")
            return 0
    assert checkpoint is not None
    assert fitted is not None
    status, validated = launching.validate(run, known.runs, [*phases[-1], *shared], checkpoint)
    return status if validated is None else compare(fitted, validated, checkpoint)


def plan(data: str | None, tokenizer: str | None) -> list[list[str]]:
    """Arguments of the two phases for this machine, with a printed reason."""
    gpu = torch.cuda.is_available()
    real = gpu and data is not None
    names = (
        ("pretrain_phase1.yaml", "pretrain_phase2.yaml")
        if real
        else ("pretrain_tiny.yaml", "pretrain_tiny_phase2.yaml")
    )
    print(
        f"GPU: {torch.cuda.get_device_name() if gpu else 'none'}. Running {names[0]}, then {names[1]} from its checkpoint."
    )
    own: list[str] = []
    if real:
        # The subset of the recipe is Wikipedia's.
        own = ["--data.source", str(data), "--data.subset", "null"]
        own += ["--data.tokenizer", tokenizer] if tokenizer else []
    else:
        missing = "a text (DATA=folder, file or hub id)" if gpu else "a GPU"
        print(f"BERT-Large needs {missing}; this is the whole path with a small BERT on the bundled stories.")
        if data is not None or tokenizer is not None:
            print("NOTE: your text is left aside; to train the small model on it, name it in ARGS=--data.source ...")
    return [["--config", str((HERE / name).relative_to(ROOT)), *own] for name in names]


def run(subcommand: str, arguments: list[str]) -> int:
    """Run the recipe's own command line."""
    return launching.run("recipes.bert_large.pretrain", subcommand, arguments, launching.one_thread())


def compare(fitted: Path, validated: Path, checkpoint: str) -> int:
    """Say whether the checkpoint gives the loss that training ended with."""
    words = "Loss at the end of phase 2", "of its checkpoint"
    same = launching.same_scores(fitted, validated, "val/loss", words, 6)
    print(f"Checkpoint  {checkpoint}\nLogs        tensorboard --logdir {fitted.parent.parent}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(answering_signals(main))
