"""The table at the end of a GLUE run."""

from typing import Any

import lightning.pytorch as pl

from recipes.bert_large.glue_module import BertGlue
from recipes.bert_large.results import FineTuningTable

LABELS = {
    "matthews": "Matthews' coefficient x 100",
    "accuracy": "accuracy",
    "accuracy_mismatched": "accuracy, mismatched",
    "f1": "F1",
    "pearson": "Pearson's r x 100",
    "spearman": "Spearman's rho x 100",
}


class GlueTable(FineTuningTable):
    """With the task's metrics."""

    def head(self, pl_module: pl.LightningModule, scores: dict[str, float]) -> dict[str, str]:
        """As its base class."""
        assert isinstance(pl_module, BertGlue)
        head = {LABELS[name]: f"{scores[name]:.2f}" for name in pl_module.info.metrics if name in scores}
        if scores:
            if len(head) > 1:
                head["score (their mean)"] = f"{scores['score']:.2f}"
            head["rows scored"] = f"{scores['rows']:,.0f}"
        return head

    def collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float | None) -> dict[str, Any]:
        """Scores without the prefix ``val/``, and the task."""
        assert isinstance(pl_module, BertGlue)
        result = super().collect(trainer, pl_module, seconds)
        scores = {name.removeprefix("val/"): value for name, value in result["scores"].items()}
        return result | {"task": pl_module.task, "scores": scores}

    def title(self, pl_module: pl.LightningModule, result: dict[str, Any]) -> str:
        """With the task."""
        assert isinstance(pl_module, BertGlue)
        return f"{result['stage']}: {pl_module.info.folder}, {result['model']}"
