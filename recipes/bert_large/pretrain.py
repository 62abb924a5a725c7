"""Pretrain BERT-Large in two phases, dense or 2:4 sparse, evaluate and export it.

    python -m recipes.bert_large.pretrain fit --config recipes/bert_large/pretrain_phase1.yaml
    python -m recipes.bert_large.pretrain fit --config recipes/bert_large/pretrain_phase2.yaml --model.start_from CHECKPOINT
    python -m recipes.bert_large.pretrain fit --config recipes/bert_large/pretrain_tiny.yaml
    python -m recipes.bert_large.pretrain validate --config recipes/bert_large/pretrain_phase2.yaml --ckpt_path CHECKPOINT
    python -m recipes.bert_large.pretrain export --ckpt_path CHECKPOINT --folder FOLDER

Every config is laid over pretrain_base.yaml, and pretrain_phase1_dense.yaml over pretrain_phase1.yaml; any value can be
overridden on the command line.
"""

from pathlib import Path

from recipes.bert_large.pretrain_module import BertPretraining
from recipes.cli import RecipeCLI, exporter, run_recipe
from slope_pl.data import MlmDataModule

PROG = "python -m recipes.bert_large.pretrain"


class PretrainCLI(RecipeCLI):
    """Two phases: the second begins from the first one's checkpoint, which is not resuming it."""

    silent = ("weights", "bert", "start_from")
    advice = (
        "resume with the config that the checkpoint was made with; to begin phase 2 from phase 1's checkpoint use "
        "--model.start_from, not --ckpt_path"
    )


def main(arguments: list[str] | None = None) -> RecipeCLI | None:
    """Run a subcommand; see the module's docstring."""
    return run_recipe(
        PretrainCLI,
        BertPretraining,
        MlmDataModule,
        base=Path(__file__).with_name("pretrain_base.yaml"),
        prog=PROG,
        description="BERT pretraining in two phases, dense or 2:4 sparse. Configs lie over "
        "recipes/bert_large/pretrain_base.yaml.",
        arguments=arguments,
        own={"export": exporter(BertPretraining, PROG)},
        lay=True,
    )


if __name__ == "__main__":
    main()
