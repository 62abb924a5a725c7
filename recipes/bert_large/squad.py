"""Train, evaluate and export BERT-Large on SQuAD v1.1.

    python -m recipes.bert_large.squad fit --config recipes/bert_large/squad.yaml
    python -m recipes.bert_large.squad fit --config recipes/bert_large/squad.yaml --model.slope.adapter_rank 16
    python -m recipes.bert_large.squad fit --config recipes/bert_large/squad_dense.yaml
    python -m recipes.bert_large.squad validate --config recipes/bert_large/squad.yaml --ckpt_path CHECKPOINT
    python -m recipes.bert_large.squad export --ckpt_path CHECKPOINT --folder FOLDER

Every config is laid over base.yaml; any value can be overridden on the command line.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI

from recipes.bert_large.module import BertSquad
from slope_pl import CheckpointError
from slope_pl.data import SquadDataModule, decode_predictions, write_predictions

BASE = str(Path(__file__).with_name("base.yaml"))


class SquadCLI(LightningCLI):
    """Lightning's command line over one base config."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without ``test``: SQuAD's test set is not public."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "test"}

    def before_fit(self) -> None:
        """A run that continues from a checkpoint does not read pretrained weights first."""
        self._note_checkpoint()

    before_validate = before_predict = before_fit

    def _parse_ckpt_path(self) -> None:
        """Take the model's settings from the checkpoint, as Lightning does, but say where they replace the given ones."""
        given = self._model_settings()
        super()._parse_ckpt_path()
        used = self._model_settings()
        if (given.get("slope") is None) != (used.get("slope") is None):
            kinds = ["dense" if settings.get("slope") is None else "2:4 sparse" for settings in (used, given)]
            raise CheckpointError(
                f"the checkpoint is of a {kinds[0]} model, the configuration is {kinds[1]}: use "
                "squad.yaml with sparse checkpoints and squad_dense.yaml with dense ones"
            )
        for key in used:
            if key not in ("weights", "bert") and used[key] != given.get(key):
                print(f"From the checkpoint: model.{key} = {used[key]} (not {given.get(key)})", file=sys.stderr)

    def _model_settings(self) -> dict[str, Any]:
        section = self.config.get(self.config.get("subcommand") or "", {})
        return dict(section["model"].as_dict()) if "model" in section else {}

    def _note_checkpoint(self) -> None:
        self.model.restores_checkpoint = self.config[self.subcommand].ckpt_path is not None

    def after_predict(self) -> None:
        """Write the answers in the format of SQuAD's evaluation script."""
        windows = self.datamodule.dev_windows
        batches = self.trainer.predict_loop.predictions
        index, start, end = (
            torch.cat([batch[key].float() if "logits" in key else batch[key] for batch in batches]).numpy()
            for key in ("window_index", "start_logits", "end_logits")
        )
        file = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "predictions.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(file, decode_predictions(windows, start, end, index))
        print(f"Answers: {file}")


def export(arguments: list[str]) -> None:
    """Write a checkpoint as a dense Hugging Face model."""
    parser = ArgumentParser(prog="python -m recipes.bert_large.squad export", description=export.__doc__)
    parser.add_argument("--ckpt_path", type=str, required=True, help="a checkpoint of this recipe, dense or sparse")
    parser.add_argument("--folder", type=str, required=True, help="where config.json and model.safetensors go")
    options = parser.parse_args(arguments)
    module = BertSquad.load_from_checkpoint(options.ckpt_path, map_location="cpu", weights_only=True)
    module.export(options.folder)
    print(f"Dense Hugging Face model: {options.folder}")


def main(arguments: list[str] | None = None) -> SquadCLI | None:
    """Run a subcommand; see the module's docstring."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["export"]:
        export(given[1:])
        return None
    # Without allow_abbrev=False the misspelt --trainer.max_step would be taken for --trainer.max_steps.
    parser_options: dict[str, Any] = {
        "allow_abbrev": False,
        "prog": "python -m recipes.bert_large.squad",
        "description": "BERT-Large on SQuAD v1.1, dense or 2:4 sparse. Configs lie over recipes/bert_large/base.yaml, and any "
        "value can be overridden. The settings of the sparse method: fit --model.slope.help. A checkpoint as a dense "
        "Hugging Face folder: export --help.",
    }
    for name in SquadCLI.subcommands():
        parser_options[name] = {"default_config_files": [BASE]}
    return SquadCLI(
        BertSquad,
        SquadDataModule,
        args=arguments,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_kwargs=parser_options,
    )


if __name__ == "__main__":
    main()
