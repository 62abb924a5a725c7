"""Pretrain BERT-Large in two phases, dense or 2:4 sparse, evaluate and export it.

    python -m recipes.bert_large.pretrain fit --config recipes/bert_large/pretrain_phase1.yaml
    python -m recipes.bert_large.pretrain fit --config recipes/bert_large/pretrain_phase2.yaml --model.start_from CHECKPOINT
    python -m recipes.bert_large.pretrain fit --config recipes/bert_large/pretrain_tiny.yaml
    python -m recipes.bert_large.pretrain validate --config recipes/bert_large/pretrain_phase2.yaml --ckpt_path CHECKPOINT
    python -m recipes.bert_large.pretrain export --ckpt_path CHECKPOINT --folder FOLDER

Every config is laid over pretrain_base.yaml, and pretrain_phase1_dense.yaml over pretrain_phase1.yaml; any value can be
overridden on the command line.
"""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI

from recipes.bert_large.pretrain_module import BertPretraining
from slope_pl import CheckpointError
from slope_pl.data import MlmDataModule

BASE = str(Path(__file__).with_name("pretrain_base.yaml"))


class PretrainCLI(LightningCLI):
    """Lightning's command line over one base config."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Of Lightning's, those that mean something here."""
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate")}

    def before_fit(self) -> None:
        """A run that continues from a checkpoint does not read other weights first."""
        self.model.restores_checkpoint = self.config[self.subcommand].ckpt_path is not None

    before_validate = before_fit

    def _parse_ckpt_path(self) -> None:
        """Take the model's settings from the checkpoint, as Lightning does, but say where they replace the given ones."""
        given = self._model_settings()
        super()._parse_ckpt_path()
        used = self._model_settings()
        if (given.get("slope") is None) != (used.get("slope") is None):
            kinds = ["dense" if settings.get("slope") is None else "2:4 sparse" for settings in (used, given)]
            raise CheckpointError(
                f"the checkpoint is of a {kinds[0]} model, the configuration is {kinds[1]}: resume with the config that the "
                "checkpoint was made with; to begin phase 2 from phase 1's checkpoint use --model.start_from, not --ckpt_path"
            )
        for key in used:
            if key not in ("weights", "bert", "start_from") and used[key] != given.get(key):
                print(f"From the checkpoint: model.{key} = {used[key]} (not {given.get(key)})", file=sys.stderr)

    def _model_settings(self) -> dict[str, Any]:
        section = self.config.get(self.config.get("subcommand") or "", {})
        return dict(section["model"].as_dict()) if "model" in section else {}


def with_siblings(arguments: list[str]) -> list[str]:
    """Put ``--config pretrain_phase1.yaml`` before ``--config pretrain_phase1_dense.yaml``, where that file is."""
    laid: list[str] = []
    after_flag = False
    for argument in arguments:
        flag, _, joined = argument.partition("=")
        given = argument if after_flag else joined if flag in ("--config", "-c") else ""
        for under in _under(Path(given)) if given else []:
            if str(under) not in laid:
                at = len(laid) - after_flag
                laid[at:at] = ["--config", str(under)]
        laid.append(argument)
        after_flag = argument in ("--config", "-c")
    return laid


def _under(config: Path) -> list[Path]:
    """What a config is laid over, the lowest first: the files whose names it continues after an underscore."""
    parts = config.stem.split("_")
    shorter = [config.with_name("_".join(parts[:n]) + config.suffix) for n in range(1, len(parts))]
    return [path for path in shorter if path.is_file()]


def export(arguments: list[str]) -> None:
    """Write a checkpoint as a dense Hugging Face model."""
    parser = ArgumentParser(prog="python -m recipes.bert_large.pretrain export", description=export.__doc__)
    parser.add_argument("--ckpt_path", type=str, required=True, help="a checkpoint of this recipe, dense or sparse")
    parser.add_argument("--folder", type=str, required=True, help="where config.json and model.safetensors go")
    options = parser.parse_args(arguments)
    module = BertPretraining.load_from_checkpoint(options.ckpt_path, map_location="cpu", weights_only=True)
    module.export(options.folder)
    print(f"Dense Hugging Face model: {options.folder}")


def main(arguments: list[str] | None = None) -> PretrainCLI | None:
    """Run a subcommand; see the module's docstring."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["export"]:
        export(given[1:])
        return None
    laid = with_siblings(given)
    if arguments is None:
        sys.argv[1:] = laid  # and not args=, which Lightning warns of; processes that it starts begin with these, too
    else:
        arguments = laid
    # Without allow_abbrev=False the misspelt --trainer.max_step would be taken for --trainer.max_steps.
    parser_options: dict[str, Any] = {
        "allow_abbrev": False,
        "prog": "python -m recipes.bert_large.pretrain",
        "description": "BERT pretraining, dense or 2:4 sparse, in two phases. Configs lie over "
        "recipes/bert_large/pretrain_base.yaml, and any value can be overridden. The settings of the sparse method: "
        "fit --model.slope.help. A checkpoint as a dense Hugging Face folder: export --help.",
    }
    for name in PretrainCLI.subcommands():
        parser_options[name] = {"default_config_files": [BASE]}
    return PretrainCLI(
        BertPretraining,
        MlmDataModule,
        args=arguments,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_kwargs=parser_options,
    )


if __name__ == "__main__":
    main()
