"""Turn a checkpoint of one strategy into what another one resumes from.

python -m slope_pl.checkpoint convert runs/step=500.ckpt full.ckpt
"""

import argparse
import importlib
import sys
from typing import Any

from slope_pl.checkpoint.convert import KINDS, SOURCES, checkpoint_kind, convert
from slope_pl.errors import SLoPeError


def _class(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        example = "recipes.gpt2.module.GPT2Pretraining"
        raise argparse.ArgumentTypeError(f"{name}: {error}; expected for example {example}") from error


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m slope_pl.checkpoint", description=__doc__)
    command = parser.add_subparsers(required=True, metavar="convert").add_parser(
        "convert", help="write a checkpoint in another form; the source stays"
    )
    command.add_argument("source", help=SOURCES)
    command.add_argument("target", help="file or folder to write; must not be there yet")
    command.add_argument("--to", choices=KINDS, default="full", help="default: full, which every strategy resumes from")
    command.add_argument("--module", type=_class, help="for huggingface: dotted name of the LightningModule's class")
    given = parser.parse_args(arguments)
    try:
        kind = checkpoint_kind(given.source)
        target = convert(given.source, given.target, given.to, given.module)
    except (SLoPeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{target}: {given.to}, from {kind} {given.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
