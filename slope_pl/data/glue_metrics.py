"""GLUE's metrics, from 0 to 100 (correlations from -100), computed by torchmetrics on all rows at once.

Two things that a direct call gets wrong are settled here. Accuracy is over rows, not the mean over classes. And where a
model answers the same for every row, Matthews' coefficient is 0, as in scikit-learn, whose number GLUE reports
(torchmetrics 1.9 gives 2.3 on CoLA's development set), and so are the correlations, which have no value then.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_f1_score, binary_matthews_corrcoef, multiclass_accuracy
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

from slope_pl.data.glue_tasks import TaskInfo, task_info


def glue_scores(task: str, predictions: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Score the predictions for one evaluation set.

    Args:
        task: A name of `TASKS`.
        predictions: Class numbers ``(R,)``, or STS-B's scores ``(R,)``, one row or more.
        labels: The gold ones, ``(R,)``.

    Returns:
        The task's metrics by name, as float64 scalars; ``accuracy`` alone for either set of MNLI.

    Raises:
        ValueError: The shapes differ, there is no row, or a class is out of range.
    """
    info = task_info(task)
    if predictions.shape != labels.shape or predictions.dim() != 1 or not len(labels):
        shapes = f"{tuple(predictions.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"predictions and labels have shapes {shapes}, expected (R,) for both with R of at least 1")
    constant = bool((predictions == predictions[0]).all() or (labels == labels[0]).all())
    zero = torch.zeros((), dtype=torch.float64, device=labels.device)
    if info.regression:
        if constant:
            return {"pearson": zero, "spearman": zero.clone()}
        # float32 loses digits where the mean is large beside the spread.
        x, y = predictions.double(), labels.double()
        return {"pearson": 100 * pearson_corrcoef(x, y), "spearman": 100 * spearman_corrcoef(x, y)}
    x, y = predictions.long(), labels.long()
    for name, values in (("prediction", x), ("label", y)):
        if values.min() < 0 or values.max() >= info.num_labels:
            wrong = values[(values < 0) | (values >= info.num_labels)][0]
            raise ValueError(f"a {name} is {wrong}, expected a class of {task}: 0 to {info.num_labels - 1}")
    scores: dict[str, Tensor] = {}
    for name in info.metrics:
        if name == "matthews":
            scores[name] = zero if constant else 100 * binary_matthews_corrcoef(x, y).double()
        elif name == "f1":
            scores[name] = 100 * binary_f1_score(x, y).double()
        elif name == "accuracy":
            found = multiclass_accuracy(x, y, num_classes=info.num_labels, average="micro")
            scores[name] = 100 * found.double()
    return scores


def combine(info: TaskInfo, by_split: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of a task over its evaluation sets, and ``score``, the one number GLUE averages: their mean.

    Metrics of a second set (MNLI's mismatched one) get its name: ``accuracy_mismatched``.
    """
    first = next(iter(info.dev))
    scores = {
        name if split == first else f"{name}_{split}": value
        for split, found in by_split.items()
        for name, value in found.items()
    }
    present = [scores[name] for name in info.metrics if name in scores]
    return {**scores, "score": torch.stack(present).mean()}


class GlueScores(Metric):
    """Collects logits by row number, then scores them.

    Each row counts once, however often it comes: samplers repeat rows to give every rank as many. Rows that never came
    (``limit_val_batches``) are left out.

    Args:
        task: A name of `TASKS`.
        labels: Gold labels of the evaluation set, ``(R,)``.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, task: str, labels: Tensor) -> None:
        super().__init__()
        self.info = task_info(task)
        self.labels = labels
        self.add_state("total", torch.zeros(len(labels), self.info.num_labels), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(labels)), dist_reduce_fx="sum")

    def update(self, row_index: Tensor, logits: Tensor) -> None:
        """Take the logits ``(B, num_labels)`` of the rows ``row_index`` ``(B,)``."""
        self.total.index_add_(0, row_index, logits.detach().float())
        self.count.index_add_(0, row_index, torch.ones_like(row_index, dtype=self.count.dtype))

    def predictions(self) -> tuple[Tensor, Tensor]:
        """Row numbers seen, and for each the class or the score."""
        rows = self.count.nonzero().squeeze(1)
        if self.info.regression:
            return rows, (self.total[rows] / self.count[rows, None]).squeeze(1)
        return rows, self.total[rows].argmax(1)

    def compute(self) -> dict[str, Tensor]:
        """The metrics, and ``rows``, the number of rows they are over."""
        rows, predicted = self.predictions()
        gold = self.labels.to(predicted.device)[rows]
        return {**glue_scores(self.info.name, predicted, gold), "rows": self.count.gt(0).sum().double()}
