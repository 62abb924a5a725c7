"""Pretrain, evaluate and export GPT-2, dense or 2:4 sparse.

    python -m recipes.gpt2.pretrain fit --config recipes/gpt2/tiny.yaml
    python -m recipes.gpt2.pretrain fit --config recipes/gpt2/novels_slope.yaml --data.source FOLDER
    python -m recipes.gpt2.pretrain validate --config recipes/gpt2/tiny.yaml --ckpt_path CHECKPOINT
    python -m recipes.gpt2.pretrain generate --ckpt_path CHECKPOINT --prompt "There was once"
    python -m recipes.gpt2.pretrain export --ckpt_path CHECKPOINT --folder FOLDER

Every config is laid over base.yaml, and ``novels_slope.yaml`` over ``novels.yaml`` beside it: the part of a file's name
before an underscore names the file under it. Any value can be overridden on the command line.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch

from recipes.checkpoints import refuse_foreign
from recipes.cli import RecipeCLI, checkpoint_parser, exporter, run_recipe
from recipes.gpt2.module import METHODS, TOKENIZER_KEY, GPT2Pretraining
from recipes.gpt2.sampling import continue_text
from slope_pl.checkpoint import load_module, read_checkpoint
from slope_pl.data import DataUnavailableError, TextDataModule, load_bpe, save_bpe

PROG = "python -m recipes.gpt2.pretrain"


class PretrainCLI(RecipeCLI):
    """With the names of all methods."""

    silent = ("weights", "gpt2", "size")
    advice = "give the config that the checkpoint was made with (config.yaml in its run's folder)"

    @staticmethod
    def kind(settings: dict[str, Any]) -> str:
        """The method."""
        found = (METHODS[name] for name in ("slope", "srste", "fst") if settings.get(name) is not None)
        return next(found, METHODS["dense"])


def add_tokenizer(ckpt_path: str, folder: str) -> None:
    """Put the training's tokenizer beside an exported model, its end of text into config.json; say so if it is not there."""
    known = read_checkpoint(ckpt_path, optimizer=False, verify=False)[TOKENIZER_KEY]  # it has just been exported
    try:
        tokenizer = load_bpe(known["source"], known["end_of_text"])
    except (DataUnavailableError, ValueError) as error:
        print(f"Without its tokenizer {known['source']}: {error}")
        return
    save_bpe(tokenizer, folder)
    config = Path(folder) / "config.json"
    ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    content = json.loads(config.read_text(encoding="utf-8")) | ends
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def generate(arguments: list[str]) -> None:
    """Continue a text with a checkpoint."""
    parser = checkpoint_parser(f"{PROG} generate", generate.__doc__)
    parser.add_argument("--prompt", type=list[str], default=[""], help='texts to continue; "" begins a document')
    parser.add_argument("--tokens", type=int, default=100, help="how many to add at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int | None, default=40, help="sample among so many; null: among all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--tokenizer", type=str | None, default=None, help="default: the one of the training")
    options = parser.parse_args(arguments)
    refuse_foreign(options.ckpt_path, inspect.signature(GPT2Pretraining.__init__).parameters, PROG)
    module = load_module(GPT2Pretraining, options.ckpt_path).eval()
    known = read_checkpoint(options.ckpt_path, optimizer=False, verify=False)[TOKENIZER_KEY]
    tokenizer = load_bpe(options.tokenizer or known["source"], known["end_of_text"])
    module = module.to("cuda" if torch.cuda.is_available() else "cpu")
    assert module.net is not None
    sampling = {"temperature": options.temperature, "top_k": options.top_k, "seed": options.seed}
    with torch.autocast(module.device.type, torch.bfloat16, enabled=module.device.type == "cuda"):
        texts = continue_text(module.net, tokenizer, options.prompt, options.tokens, **sampling)
    for prompt, text in zip(options.prompt, texts, strict=True):
        print(f"{prompt}{text}\n")


def main(arguments: list[str] | None = None) -> RecipeCLI | None:
    """Run a subcommand; see the module's docstring."""
    return run_recipe(
        PretrainCLI,
        GPT2Pretraining,
        TextDataModule,
        base=Path(__file__).with_name("base.yaml"),
        prog=PROG,
        description="GPT-2 pretraining, dense or 2:4 sparse. Configs lie over recipes/gpt2/base.yaml, and "
        "novels_slope.yaml over novels.yaml. Text from a checkpoint: generate --help.",
        arguments=arguments,
        own={"export": exporter(GPT2Pretraining, PROG, add_tokenizer), "generate": generate},
        lay=True,
    )


if __name__ == "__main__":
    main()
