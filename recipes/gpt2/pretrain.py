"""Pretrain, evaluate and export GPT-2, dense or 2:4 sparse.

    python -m recipes.gpt2.pretrain fit --config recipes/gpt2/tiny.yaml
    python -m recipes.gpt2.pretrain fit --config recipes/gpt2/novels_slope.yaml --data.source FOLDER
    python -m recipes.gpt2.pretrain validate --config recipes/gpt2/tiny.yaml --ckpt_path CHECKPOINT
    python -m recipes.gpt2.pretrain generate --ckpt_path CHECKPOINT --prompt "There was once"
    python -m recipes.gpt2.pretrain export --ckpt_path CHECKPOINT --folder FOLDER

Every config is laid over base.yaml, and ``novels_slope.yaml`` over ``novels.yaml`` beside it: the part of a file's name
before the first underscore names the file under it. Any value can be overridden on the command line.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI

from recipes.gpt2.module import METHODS, TOKENIZER_KEY, GPT2Pretraining
from recipes.gpt2.sampling import continue_text
from slope_pl import CheckpointError
from slope_pl.data import TextDataModule, load_bpe

BASE = str(Path(__file__).with_name("base.yaml"))


class PretrainCLI(LightningCLI):
    """Lightning's command line over one base config."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Of Lightning's, those that mean something here."""
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate")}

    def before_fit(self) -> None:
        """A run that continues from a checkpoint does not read pretrained weights first."""
        self.model.restores_checkpoint = self.config[self.subcommand].ckpt_path is not None

    before_validate = before_fit

    def _parse_ckpt_path(self) -> None:
        """Take the model's settings from the checkpoint, as Lightning does, but say where they replace the given ones."""
        given = self._model_settings()
        super()._parse_ckpt_path()
        used = self._model_settings()
        kinds = [_kind(settings) for settings in (used, given)]
        if kinds[0] != kinds[1]:
            raise CheckpointError(
                f"the checkpoint is of a {kinds[0]} model, the configuration is {kinds[1]}: give the config that the "
                "checkpoint was made with (config.yaml in its run's folder)"
            )
        for key in used:
            if key not in ("weights", "gpt2", "size") and used[key] != given.get(key):
                print(f"From the checkpoint: model.{key} = {used[key]} (not {given.get(key)})", file=sys.stderr)

    def _model_settings(self) -> dict[str, Any]:
        section = self.config.get(self.config.get("subcommand") or "", {})
        return dict(section["model"].as_dict()) if "model" in section else {}


def _kind(settings: dict[str, Any]) -> str:
    return next(
        (METHODS[name] for name in ("slope", "srste", "fst") if settings.get(name) is not None), METHODS["dense"]
    )


def with_families(arguments: list[str]) -> list[str]:
    """Put ``--config novels.yaml`` before ``--config novels_slope.yaml``, where that file is."""
    laid: list[str] = []
    flag = ""
    for argument in arguments:
        name, _, joined = argument.partition("=")
        given = argument if flag else joined if name in ("--config", "-c") else ""
        family, underscore, _ = Path(given).stem.partition("_")
        under = str(Path(given).parent / f"{family}.yaml")
        if given and underscore and Path(under).is_file() and under not in laid:
            before = len(laid) - bool(flag)
            laid[before:before] = ["--config", under]
        laid.append(argument)
        flag = argument if argument in ("--config", "-c") else ""
    return laid


def _checkpoint_parser(name: str, description: str | None) -> ArgumentParser:
    parser = ArgumentParser(prog=f"python -m recipes.gpt2.pretrain {name}", description=description)
    parser.add_argument("--ckpt_path", type=str, required=True, help="a checkpoint of this recipe, dense or sparse")
    return parser


def _load(checkpoint: str) -> GPT2Pretraining:
    module = GPT2Pretraining.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    return module.eval()


def export(arguments: list[str]) -> None:
    """Write a checkpoint as a dense Hugging Face model."""
    parser = _checkpoint_parser("export", export.__doc__)
    parser.add_argument("--folder", type=str, required=True, help="where config.json and model.safetensors go")
    options = parser.parse_args(arguments)
    _load(options.ckpt_path).export(options.folder)
    print(f"Dense Hugging Face model: {options.folder}")


def generate(arguments: list[str]) -> None:
    """Continue a text with a checkpoint."""
    parser = _checkpoint_parser("generate", generate.__doc__)
    parser.add_argument("--prompt", type=list[str], default=[""], help='texts to continue; "" begins a document')
    parser.add_argument("--tokens", type=int, default=100, help="how many to add at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int | None, default=40, help="sample among so many; null: among all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--tokenizer", type=str | None, default=None, help="default: the one of the training")
    options = parser.parse_args(arguments)
    known = torch.load(options.ckpt_path, map_location="cpu", weights_only=True, mmap=True)[TOKENIZER_KEY]
    tokenizer = load_bpe(options.tokenizer or known["source"], known["end_of_text"])
    module = _load(options.ckpt_path).to("cuda" if torch.cuda.is_available() else "cpu")
    assert module.net is not None
    sampling = {"temperature": options.temperature, "top_k": options.top_k, "seed": options.seed}
    with torch.autocast(module.device.type, torch.bfloat16, enabled=module.device.type == "cuda"):
        texts = continue_text(module.net, tokenizer, options.prompt, options.tokens, **sampling)
    for prompt, text in zip(options.prompt, texts, strict=True):
        print(f"{prompt}{text}\n")


def main(arguments: list[str] | None = None) -> PretrainCLI | None:
    """Run a subcommand; see the module's docstring."""
    given = sys.argv[1:] if arguments is None else arguments
    own = {"export": export, "generate": generate}
    if given and given[0] in own:
        own[given[0]](given[1:])
        return None
    laid = with_families(given)
    if arguments is None:
        sys.argv[1:] = laid  # and not args=, which Lightning warns of; processes that it starts begin with these, too
    else:
        arguments = laid
    # Without allow_abbrev=False the misspelt --trainer.max_step would be taken for --trainer.max_steps.
    parser_options: dict[str, Any] = {
        "allow_abbrev": False,
        "prog": "python -m recipes.gpt2.pretrain",
        "description": "GPT-2 pretraining, dense or 2:4 sparse. Configs lie over recipes/gpt2/base.yaml, and novels_slope.yaml "
        "over novels.yaml; any value can be overridden. The settings of the sparse method: fit --model.slope.help. Text from "
        "a checkpoint: generate --help. A checkpoint as a dense Hugging Face folder: export --help.",
    }
    for name in PretrainCLI.subcommands():
        parser_options[name] = {"default_config_files": [BASE]}
    return PretrainCLI(
        GPT2Pretraining,
        TextDataModule,
        args=arguments,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_kwargs=parser_options,
    )


if __name__ == "__main__":
    main()
