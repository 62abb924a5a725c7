"""Train, evaluate and export BERT-Large on SQuAD v1.1.

    python -m recipes.bert_large.squad fit --config recipes/bert_large/squad.yaml
    python -m recipes.bert_large.squad fit --config recipes/bert_large/squad.yaml --model.slope.adapter_rank 16
    python -m recipes.bert_large.squad fit --config recipes/bert_large/squad_dense.yaml
    python -m recipes.bert_large.squad validate --config recipes/bert_large/squad.yaml --ckpt_path CHECKPOINT
    python -m recipes.bert_large.squad export --ckpt_path CHECKPOINT --folder FOLDER

Every config is laid over base.yaml, and squad_dense.yaml over squad.yaml; any value can be overridden on the command line.
"""

from pathlib import Path

import torch

from recipes.bert_large.finetuning_cli import FineTuningCLI, Outputs
from recipes.bert_large.module import BertSquad
from recipes.cli import RecipeCLI, exporter, run_recipe
from slope_pl.data import SquadDataModule, decode_predictions, write_predictions

PROG = "python -m recipes.bert_large.squad"


class SquadCLI(FineTuningCLI):
    """Without ``test``: SQuAD's test set is not public."""

    stages = ("fit", "validate", "predict")
    advice = "use squad.yaml with sparse checkpoints and squad_dense.yaml with dense ones"

    def write_answers(self, sets: list[Outputs], folder: Path) -> None:
        """In the format of SQuAD's evaluation script."""
        windows = self.datamodule.dev_windows
        (batches,) = sets
        index, start, end = (
            torch.cat([batch[key].float() if "logits" in key else batch[key] for batch in batches]).numpy()
            for key in ("window_index", "start_logits", "end_logits")
        )
        file = folder / "predictions.json"
        write_predictions(file, decode_predictions(windows, start, end, index))
        print(f"Answers: {file}")


def main(arguments: list[str] | None = None) -> RecipeCLI | None:
    """Run a subcommand; see the module's docstring."""
    return run_recipe(
        SquadCLI,
        BertSquad,
        SquadDataModule,
        base=Path(__file__).with_name("base.yaml"),
        prog=PROG,
        description="BERT-Large on SQuAD v1.1, dense or 2:4 sparse. Configs lie over recipes/bert_large/base.yaml.",
        arguments=arguments,
        own={"export": exporter(BertSquad, PROG)},
        lay=True,
    )


if __name__ == "__main__":
    main()
