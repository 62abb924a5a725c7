"""The table at the end of a SQuAD run."""

from typing import Any

import lightning.pytorch as pl

from recipes.results import RunTable, collect
from slope_pl import sparsity_report


class ResultTable(RunTable):
    """With exact match and F1."""

    def collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float | None) -> dict[str, Any]:
        """Scores are NaN-free numbers or absent."""
        scores, head = trainer.callback_metrics, {}
        if "val/f1" in scores:
            head["exact match / F1"] = f"{scores['val/exact_match']:.2f} / {scores['val/f1']:.2f}"
            head["questions scored"] = f"{scores['val/questions']:,.0f}"
        return collect(trainer, sparsity_report(pl_module), head, seconds=seconds)
