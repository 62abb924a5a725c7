"""Metric parity: every formula is written out here, and compared with what torchmetrics makes of the same predictions."""

import math

import numpy as np
import pytest
import torch

from slope_pl.data import TASKS, GlueScores, glue_scores
from slope_pl.data.glue_metrics import combine


def stored(task, rows=400, seed=0):
    """Predictions and labels of a model that is right more often than not; classes are unbalanced, scores have ties."""
    draw = np.random.default_rng(seed)
    info = TASKS[task]
    if info.regression:
        gold = np.round(draw.uniform(0, 5, rows), 1)
        return np.round(gold + draw.normal(0, 1.5, rows), 1), gold
    gold = (draw.uniform(size=rows) ** 2 * info.num_labels).astype(np.int64)
    return np.where(draw.uniform(size=rows) < 0.7, gold, draw.integers(0, info.num_labels, rows)), gold


def counts(x, y):
    return (int(((x == a) & (y == b)).sum()) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))


def matthews(x, y):
    tp, tn, fp, fn = counts(x, y)
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / below if below else 0.0  # scikit-learn's rule


def f1(x, y):
    tp, _, fp, fn = counts(x, y)
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0


def accuracy(x, y):
    return float((x == y).mean())


def pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))


def ranks(values):
    """From 1; ties get the mean of their ranks."""
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def spearman(x, y):
    return pearson(ranks(x), ranks(y))


FORMULAS = {"matthews": matthews, "f1": f1, "accuracy": accuracy, "pearson": pearson, "spearman": spearman}
EXPECTED = {
    "cola": {"matthews"},
    "mrpc": {"accuracy", "f1"},
    "qqp": {"accuracy", "f1"},
    "stsb": {"pearson", "spearman"},
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(3))
def test_parity_with_the_formulas(task, seed):
    x, y = stored(task, seed=seed)
    scores = glue_scores(task, torch.from_numpy(x), torch.from_numpy(y))
    assert scores.keys() == EXPECTED.get(task, {"accuracy"})
    for name, value in scores.items():
        assert value.item() == pytest.approx(100 * FORMULAS[name](x, y), abs=1e-4), name


@pytest.mark.parametrize("task", ["cola", "stsb", "mrpc", "mnli"])
def test_parity_with_scikit_learn_and_scipy(task):
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    x, y = stored(task)
    theirs = {
        "matthews": metrics.matthews_corrcoef,
        "f1": metrics.f1_score,
        "accuracy": metrics.accuracy_score,
        "pearson": lambda gold, predicted: stats.pearsonr(predicted, gold).statistic,
        "spearman": lambda gold, predicted: stats.spearmanr(predicted, gold).statistic,
    }
    for name, value in glue_scores(task, torch.from_numpy(x), torch.from_numpy(y)).items():
        assert value.item() == pytest.approx(100 * theirs[name](y, x), abs=1e-4), name


@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb", "rte"])
def test_a_model_that_always_says_the_same(task):
    """CoLA's classes, one answer: Matthews' coefficient is 0 for the benchmark, 2.3 for torchmetrics alone."""
    y = torch.tensor([1.0] * 721 + [0.0] * 322)
    scores = glue_scores(task, torch.ones(1043), y)
    expected = {
        "matthews": 0,
        "accuracy": 100 * 721 / 1043,
        "f1": 100 * 2 * 721 / (2 * 721 + 322),
        "pearson": 0,
        "spearman": 0,
    }
    for name, value in scores.items():
        assert value.item() == pytest.approx(expected[name], abs=1e-4)


def test_large_scores_keep_their_digits():
    x, y = stored("stsb")
    scores = glue_scores("stsb", torch.from_numpy(x + 1000), torch.from_numpy(y))
    assert scores["pearson"].item() == pytest.approx(100 * pearson(x, y), abs=1e-6)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1], [0], r"shapes \(2,\) and \(1,\)"),
        ([], [], "R of at least 1"),
        ([0, 2], [0, 1], "a prediction is 2, expected a class of cola: 0 to 1"),
        ([0, 1], [0, -1], "a label is -1"),
    ],
)
def test_bad_predictions(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        glue_scores("cola", torch.tensor(predictions), torch.tensor(labels))


def test_score_is_the_mean_of_the_tasks_metrics():
    one, two = torch.tensor(80.0), torch.tensor(60.0)
    assert combine(TASKS["mrpc"], {"dev": {"accuracy": one, "f1": two}})["score"] == 70
    found = combine(TASKS["mnli"], {"matched": {"accuracy": one}, "mismatched": {"accuracy": two}})
    assert {k: v.item() for k, v in found.items()} == {"accuracy": 80, "accuracy_mismatched": 60, "score": 70}


def test_each_row_counts_once_in_any_order_and_missing_ones_not():
    x, y = stored("mnli", rows=31)
    logits = torch.nn.functional.one_hot(torch.from_numpy(x), 3).float() * 4 - 1
    scores = GlueScores("mnli", torch.from_numpy(y))
    order = torch.tensor([*range(30, 4, -1), 30, 29, 7])  # rows 0 to 4 never come, three come twice
    for part in order.split(7):
        scores.update(part, logits[part])
    found = scores.compute()
    assert found["accuracy"].item() == pytest.approx(100 * accuracy(x[5:], y[5:]))
    assert found["rows"].item() == 26
    scores.reset()
    assert scores.count.sum() == 0


def test_regression_takes_the_one_output():
    scores = GlueScores("stsb", torch.tensor([0.0, 2.0, 5.0]))
    scores.update(torch.tensor([2, 0, 1]), torch.tensor([[4.0], [1.0], [1.5]]))
    scores.update(torch.tensor([2]), torch.tensor([[4.0]]))  # again, as samplers do
    rows, values = scores.predictions()
    assert rows.tolist() == [0, 1, 2]
    assert values.tolist() == [1.0, 1.5, 4.0]
    assert scores.compute()["spearman"].item() == pytest.approx(100, abs=1e-3)
