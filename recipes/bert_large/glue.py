"""Train, evaluate and export BERT-Large on a task of GLUE.

    python -m recipes.bert_large.glue fit --config recipes/bert_large/glue.yaml --data.task cola
    python -m recipes.bert_large.glue fit --config recipes/bert_large/glue.yaml --data.task rte --model.slope.adapter_rank 16
    python -m recipes.bert_large.glue fit --config recipes/bert_large/glue_dense.yaml --data.task cola
    python -m recipes.bert_large.glue validate --config recipes/bert_large/glue.yaml --data.task cola --ckpt_path CHECKPOINT
    python -m recipes.bert_large.glue export --ckpt_path CHECKPOINT --folder FOLDER

Every config is laid over glue_base.yaml; any value can be overridden on the command line. glue_all.py runs all tasks.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from recipes.bert_large.finetuning_cli import FineTuningCLI, Outputs
from recipes.bert_large.glue_module import BertGlue
from recipes.cli import RecipeCLI, exporter, run_recipe
from slope_pl import CheckpointError
from slope_pl.checkpoint import saved_settings
from slope_pl.data import GlueDataModule, GlueScores

PROG = "python -m recipes.bert_large.glue"
EPOCHS, EPOCHS_OF = 3, {"cola": 5}  # published


class GlueCLI(FineTuningCLI):
    """With a task that data and model share."""

    stages = ("fit", "validate", "predict")
    advice = "use glue.yaml with sparse checkpoints and glue_dense.yaml with dense ones"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The model's head is the task's."""
        parser.link_arguments("data.task", "model.task")

    def before_instantiate_classes(self) -> None:
        """The published number of epochs depends on the task, which a config cannot say."""
        section = self.config[self.subcommand]
        trainer = section.trainer
        if self.subcommand == "fit" and trainer.max_epochs is None and trainer.max_steps == -1 and not trainer.max_time:
            trainer.max_epochs = EPOCHS_OF.get(section.data.task, EPOCHS)

    def _parse_ckpt_path(self) -> None:
        """Refuse a checkpoint of the other kind, or of another task, before its settings are taken over."""
        section = self.config.get(self.config.get("subcommand") or "", {})
        path = section.get("ckpt_path")
        if path and Path(path).exists():
            _check_kind(saved_settings(path), self._model_settings(), task=section["data"].task)
        super()._parse_ckpt_path()

    def write_answers(self, sets: list[Outputs], folder: Path) -> None:
        """As GLUE's server takes them: index and prediction, a file for each evaluation set."""
        for (split, rows), own in zip(self.datamodule.dev_rows.items(), sets, strict=True):
            scores = GlueScores(self.model.task, torch.from_numpy(rows.labels))
            for batch in own:
                scores.update(batch["row_index"], batch["logits"])
            file = folder / (
                f"{self.model.info.folder}.tsv" if len(sets) == 1 else f"{self.model.info.folder}-{split}.tsv"
            )
            labels = self.model.info.labels
            lines = ["index\tprediction"]
            for index, value in zip(*(part.tolist() for part in scores.predictions()), strict=True):
                lines.append(f"{index}\t{labels[value] if labels else f'{value:.9g}'}")
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"Answers: {file}")


def _check_kind(saved: dict[str, Any], given: dict[str, Any], task: str) -> None:
    if "task" not in saved:
        return  # not of this recipe: loading it says what is wrong
    if saved["task"] != task:
        raise CheckpointError(
            f"the checkpoint is of {saved['task']}, the task is {task}: use --data.task {saved['task']}"
        )
    kinds = [GlueCLI.kind(settings) for settings in (saved, given)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"the checkpoint is of a {kinds[0]} model, the configuration is {kinds[1]}: {GlueCLI.advice}"
        )


def main(arguments: list[str] | None = None) -> RecipeCLI | None:
    """Run a subcommand; see the module's docstring."""
    return run_recipe(
        GlueCLI,
        BertGlue,
        GlueDataModule,
        base=Path(__file__).with_name("glue_base.yaml"),
        prog=PROG,
        description="BERT-Large on a task of GLUE, dense or 2:4 sparse. Configs lie over recipes/bert_large/glue_base.yaml.",
        arguments=arguments,
        own={"export": exporter(BertGlue, PROG)},
    )


if __name__ == "__main__":
    main()
