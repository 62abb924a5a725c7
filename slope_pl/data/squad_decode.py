"""From logits to answers, and from answers to SQuAD's exact match and F1.

Decoding follows BERT's ``run_squad.py``: the 20 best starts and the 20 best ends of each window are paired, pairs that
make no sense are dropped, and the pairs of all windows of a question compete. One difference: positions that cannot
start or end an answer (question, special tokens, padding) are removed before the 20 best are taken, not after, so they
take no places. The answer is cut from the original context by character offsets.

Scores come from `torchmetrics`. It agrees with the published v1.1 script except that a prediction and a gold answer
that are both empty after normalisation (such as "." and "the") get F1 1 and not 0.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text.squad import squad
from torchmetrics.utilities import dim_zero_cat

from slope_pl.data.squad import SquadExample
from slope_pl.data.squad_windows import SquadWindows

_SCORE_CHUNK = 512  # torchmetrics adds in float32; short sums, joined in float64, stay exact to 1e-5 of a point


@dataclass(frozen=True, slots=True)
class Span:
    """A candidate answer.

    Attributes:
        text: ``context[char_start:char_end]``.
        char_start: First character in the context.
        char_end: One past the last character.
        score: Start logit plus end logit.
    """

    text: str
    char_start: int
    char_end: int
    score: float


@dataclass(frozen=True, slots=True)
class NBest:
    """The candidates for a question, best first, no text twice.

    Attributes:
        spans: Up to ``n_best`` candidates; empty when no span is valid.
    """

    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The best answer; ``""`` when there is none."""
        return self.spans[0].text if self.spans else ""


def decode_predictions(
    windows: SquadWindows,
    start_logits: NDArray[np.floating],
    end_logits: NDArray[np.floating],
    window_index: NDArray[np.integer] | None = None,
    n_best: int = 20,
    max_answer_length: int = 30,
) -> dict[str, NBest]:
    """Find the best answer spans of each question.

    A span starts and ends at context tokens of one window, its end is not before its start, it has at most
    ``max_answer_length`` tokens, and its start token has its fullest context in that window. Among equal scores the
    span that starts first wins, then the shorter one. Logits that are not finite never take part.

    Args:
        windows: The windows, ``W`` of them.
        start_logits: Shape ``(N, max_length)``, any float type.
        end_logits: The same.
        window_index: Window of each row, int ``(N,)``; all windows in order when not given. A window that occurs more
            than once counts once, the last row. A question is answered only if all its windows occur.
        n_best: Starts, ends and answers that are kept.
        max_answer_length: Longest answer, tokens.

    Returns:
        The candidates for each question whose windows are all there, in the order of the questions.

    Raises:
        ValueError: Shapes do not fit, a window index is out of range, a limit is below 1, or two questions share an id.
    """
    row_of = _rows(windows, start_logits, end_logits, window_index)
    if n_best < 1 or max_answer_length < 1:
        raise ValueError(f"n_best is {n_best} and max_answer_length is {max_answer_length}, expected 1 or more")
    predictions: dict[str, NBest] = {}
    for e in complete_questions(windows, row_of >= 0):
        example, context = windows.examples[e], windows.context_of[e]
        if example.id in predictions:
            raise ValueError(f"two questions have the id {example.id!r}, but predictions are keyed by id")
        offset = len(windows.question_tokens[e]) + 2
        parts = []
        for w, own in zip(range(*windows.first_window[e : e + 2]), windows.max_context(e), strict=True):
            row, shift = row_of[w], windows.window_start[w]
            cut = slice(offset, offset + windows.window_length[w])
            score, first, last = _pairs(start_logits[row, cut], end_logits[row, cut], own, n_best, max_answer_length)
            parts.append((score, first + shift, last + shift))
        score, first, last = (np.concatenate(column) for column in zip(*parts, strict=True))
        spans = windows.context_spans[context]
        best: dict[str, Span] = {}
        for i in np.lexsort((last, first, -score)):
            begin, end = int(spans[first[i], 0]), int(spans[last[i], 1])
            text = example.context[begin:end]
            if text not in best:
                best[text] = Span(text, begin, end, float(score[i]))
                if len(best) == n_best:
                    break
        predictions[example.id] = NBest(tuple(best.values()))
    return predictions


def complete_questions(windows: SquadWindows, seen: NDArray[np.bool_]) -> list[int]:
    """Indices of the questions all of whose windows were seen; ``seen`` is bool ``(W,)``."""
    missing = np.bincount(windows.example_of[~seen], minlength=windows.questions)
    return np.flatnonzero(missing == 0).tolist()


def _rows(
    windows: SquadWindows,
    start_logits: NDArray[np.floating],
    end_logits: NDArray[np.floating],
    window_index: NDArray[np.integer] | None,
) -> NDArray[np.int64]:
    """Row of the logits for each window, -1 where there is none; int64 ``(W,)``."""
    index = np.arange(len(windows)) if window_index is None else np.asarray(window_index)
    expected = (len(index), windows.max_length)
    for name, logits in (("start_logits", start_logits), ("end_logits", end_logits)):
        if logits.shape != expected:
            raise ValueError(f"{name} has shape {logits.shape}, expected (windows, max_length) = {expected}")
    if len(index) and not 0 <= index.min() <= index.max() < len(windows):
        raise ValueError(f"window_index holds {index.min()} to {index.max()}, expected 0 to {len(windows) - 1}")
    row_of = np.full(len(windows), -1, np.int64)
    row_of[index] = np.arange(len(index))
    return row_of


def _pairs(
    start: NDArray[np.floating], end: NDArray[np.floating], own: NDArray[np.bool_], n_best: int, max_answer_length: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Score, first and last token of the valid pairs among the best starts and ends of one window."""
    starts = np.where(own & np.isfinite(start), start, -np.inf).astype(np.float64)
    ends = np.where(np.isfinite(end), end, -np.inf).astype(np.float64)
    # Stable, so that of equal logits the earlier token is kept.
    i = np.argsort(-starts, kind="stable")[:n_best, None]
    j = np.argsort(-ends, kind="stable")[None, :n_best]
    score = starts[i] + ends[j]
    valid = (j >= i) & (j - i < max_answer_length) & np.isfinite(score)
    i, j = np.broadcast_arrays(i, j)
    return score[valid], i[valid], j[valid]


def write_predictions(path: str | os.PathLike[str], predictions: Mapping[str, NBest]) -> None:
    """Write the file that SQuAD's evaluation script reads: a JSON object from id to answer text, UTF-8."""
    text = json.dumps({key: nbest.text for key, nbest in predictions.items()}, ensure_ascii=False, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


def score_predictions(predictions: Mapping[str, str], examples: Sequence[SquadExample]) -> dict[str, float]:
    """Compute exact match and F1, the best over the gold answers, averaged over questions.

    Args:
        predictions: Answer text for each question's id.
        examples: The questions to score.

    Returns:
        ``exact_match`` and ``f1``, from 0 to 100; both NaN when there are no questions.

    Raises:
        ValueError: A question has no prediction.
    """
    total = {"exact_match": 0.0, "f1": 0.0}
    for i in range(0, len(examples), _SCORE_CHUNK):
        chunk = examples[i : i + _SCORE_CHUNK]
        for example in chunk:
            if example.id not in predictions:
                raise ValueError(f"no prediction for question {example.id!r} ({example.question!r})")
        scores = squad(
            [{"id": e.id, "prediction_text": predictions[e.id]} for e in chunk],
            [
                {"id": e.id, "answers": {"text": [a.text for a in e.answers], "answer_start": [0] * len(e.answers)}}
                for e in chunk
            ],
        )
        for key in total:
            total[key] += float(scores[key]) * len(chunk)
    return {key: value / len(examples) if examples else float("nan") for key, value in total.items()}


class SquadSpans(Metric):
    """Exact match and F1 over all windows of a data set, gathered over batches and ranks.

    Windows that come twice (a distributed sampler repeats some to give all ranks the same number) count once. Questions
    with a missing window (a sanity check, ``limit_val_batches``) are left out; ``questions`` says how many were scored.

    Args:
        windows: The windows that ``window_index`` counts.
        n_best: As in `decode_predictions`.
        max_answer_length: As in `decode_predictions`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    window_index: list[Tensor]
    start_logits: list[Tensor]
    end_logits: list[Tensor]

    def __init__(self, windows: SquadWindows, n_best: int = 20, max_answer_length: int = 30) -> None:
        super().__init__()
        self.windows = windows
        self.n_best = n_best
        self.max_answer_length = max_answer_length
        for name in ("window_index", "start_logits", "end_logits"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, window_index: Tensor, start_logits: Tensor, end_logits: Tensor) -> None:
        """Add a batch.

        Args:
            window_index: int64 ``(B,)``, as in the batches of `slope_pl.data.SquadDataModule`.
            start_logits: ``(B, max_length)``, any float type; kept as float32.
            end_logits: The same.

        Raises:
            ValueError: Shapes do not fit.
        """
        expected = (len(window_index), self.windows.max_length)
        for name, logits in (("start_logits", start_logits), ("end_logits", end_logits)):
            if tuple(logits.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(logits.shape)}, expected (B, max_length) = {expected}")
        self.window_index.append(window_index.detach().long())
        self.start_logits.append(start_logits.detach().float())
        self.end_logits.append(end_logits.detach().float())

    def predictions(self) -> dict[str, NBest]:
        """Decode what this process has seen (everything, inside `compute`)."""
        if len(self.window_index) == 0:
            return {}
        index, start, end = (
            dim_zero_cat(state).cpu().numpy() for state in (self.window_index, self.start_logits, self.end_logits)
        )
        return decode_predictions(self.windows, start, end, index, self.n_best, self.max_answer_length)

    def compute(self) -> dict[str, Tensor]:
        """Score the questions all of whose windows were seen.

        Returns:
            ``exact_match`` and ``f1``, float32 scalars from 0 to 100 (NaN when no question is complete), and
            ``questions``, an int64 scalar.
        """
        predictions = {key: nbest.text for key, nbest in self.predictions().items()}
        examples = [example for example in self.windows.examples if example.id in predictions]
        scores: dict[str, Tensor] = {
            key: torch.tensor(value, dtype=torch.float32, device=self.device)
            for key, value in score_predictions(predictions, examples).items()
        }
        return scores | {"questions": torch.tensor(len(examples), device=self.device)}
