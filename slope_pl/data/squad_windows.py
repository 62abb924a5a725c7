"""Cut questions and contexts into windows of a fixed number of tokens, as BERT did for SQuAD.

A window is ``[CLS] question [SEP] part of the context [SEP]``. A context too long for one window gets several, whose
starts lie ``doc_stride`` tokens apart. Source: Devlin et al. 2019, "BERT", and its ``run_squad.py``. Two things differ
from that program: answers are placed by character offsets instead of by re-tokenising words, so an answer that begins
or ends inside a token takes the whole token; and a training question is never dropped.

Tokens are stored once for each context and each question. Windows are three integers each and are put together when a
batch is asked for: the 10,833 windows of the dev set take 4 MB instead of 100 MB as padded int64 arrays.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from slope_pl.data.pair_tokenizer import PairTokenizer, as_pair
from slope_pl.data.squad import SquadExample

_CHUNK = 512  # texts a call to the tokeniser: enough for all its threads, small enough for a moving bar
_QUIET_SECONDS = 2.0  # no progress bar for less


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of different lengths in one array.

    Attributes:
        flat: All rows, one after the other, shape ``(total, ...)``.
        starts: Row ``i`` is ``flat[starts[i] : starts[i + 1]]``; int64 of shape ``(rows + 1,)``.
    """

    flat: NDArray[Any]
    starts: NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Sequence[NDArray[Any]], empty: NDArray[Any]) -> "Ragged":
        """Join rows; ``empty`` gives the type and the trailing shape."""
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        return cls(np.concatenate([empty, *rows]), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.flat[self.starts[row] : self.starts[row + 1]]


@dataclass(frozen=True, eq=False)
class SquadWindows:
    """The windows of a list of questions; ``W`` windows, ``Q`` questions, ``C`` contexts.

    Attributes:
        examples: The ``Q`` questions (empty in the copy that goes to data workers).
        context_of: Context of each question, int32 ``(Q,)``.
        context_tokens: Token ids of the contexts, ``C`` rows of uint16 (int32 for vocabularies over 65,536).
        context_spans: Half-open character range of each context token, ``C`` rows of int32 ``(n, 2)``.
        question_tokens: Token ids of the questions, cut to the longest allowed; ``Q`` rows.
        first_window: The windows of question ``q`` are ``first_window[q] : first_window[q + 1]``; int64 ``(Q + 1,)``.
        example_of: Question of each window, int32 ``(W,)``.
        window_start: First context token of each window, int32 ``(W,)``.
        window_length: Number of context tokens of each window, int32 ``(W,)``.
        start_positions: Position in the window of the first token of the first gold answer, int32 ``(W,)``; 0, which is
            ``[CLS]``, when the window does not hold the whole answer.
        end_positions: The same for its last token (inclusive).
        max_length: Length of the padded windows, tokens.
        cls_id: Id of ``[CLS]``.
        sep_id: Id of ``[SEP]``.
        pad_id: Id of ``[PAD]``.
        middle: Separators between question and context: 1 for BERT, 2 for RoBERTa.
        truncated_questions: How many questions were cut.
    """

    examples: Sequence[SquadExample]
    context_of: NDArray[np.int32]
    context_tokens: Ragged
    context_spans: Ragged
    question_tokens: Ragged
    first_window: NDArray[np.int64]
    example_of: NDArray[np.int32]
    window_start: NDArray[np.int32]
    window_length: NDArray[np.int32]
    start_positions: NDArray[np.int32]
    end_positions: NDArray[np.int32]
    max_length: int
    cls_id: int
    sep_id: int
    pad_id: int
    middle: int
    truncated_questions: int

    def __len__(self) -> int:
        return len(self.example_of)

    @property
    def questions(self) -> int:
        """Number of questions ``Q``."""
        return len(self.context_of)

    def context_offset(self, window: int) -> int:
        """Position in the window of its first context token: after ``[CLS] question [SEP]``."""
        return len(self.question_tokens[self.example_of[window]]) + 1 + self.middle

    def batch(self, windows: Sequence[int] | NDArray[np.integer], positions: bool) -> dict[str, NDArray[np.int64]]:
        """Put windows together.

        Args:
            windows: ``B`` window indices.
            positions: Whether to add the gold positions.

        Returns:
            int64 arrays ``input_ids``, ``attention_mask`` (1 for tokens, 0 for padding), ``token_type_ids`` (0 for
            ``[CLS] question [SEP]`` and padding, 1 for ``context [SEP]``), each ``(B, max_length)``, ``window_index``
            ``(B,)`` and, if asked for, ``start_positions`` and ``end_positions`` ``(B,)``.
        """
        shape = (len(windows), self.max_length)
        ids = np.full(shape, self.pad_id, np.int64)
        mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, window in enumerate(windows):
            example, start, length = self.example_of[window], self.window_start[window], self.window_length[window]
            question = self.question_tokens[example]
            first = len(question) + 1 + self.middle
            last = first + length
            ids[row, 0] = self.cls_id
            ids[row, 1 : first - self.middle] = question
            ids[row, first - self.middle : first] = ids[row, last] = self.sep_id
            ids[row, first:last] = self.context_tokens[self.context_of[example]][start : start + length]
            types[row, first : last + 1] = 1
            mask[row, : last + 1] = 1
        index = np.asarray(windows, np.int64)
        out = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "window_index": index}
        if positions:
            out["start_positions"] = self.start_positions[index].astype(np.int64)
            out["end_positions"] = self.end_positions[index].astype(np.int64)
        return out

    def max_context(self, example: int) -> list[NDArray[np.bool_]]:
        """For each window of a question: which context tokens have their fullest context in this window.

        A token that lies in several windows belongs to the one where the smaller of its left and right contexts is
        largest, plus 0.01 of the window's length; the earlier window on a tie. Source: ``_check_is_max_context`` of
        BERT's ``run_squad.py``.

        Args:
            example: Index of the question.

        Returns:
            One bool array ``(window_length,)`` for each window.
        """
        rows = slice(self.first_window[example], self.first_window[example + 1])
        starts, lengths = self.window_start[rows].astype(np.int64), self.window_length[rows].astype(np.int64)
        if len(starts) == 1:
            return [np.ones(lengths[0], np.bool_)]
        token = np.arange(starts[-1] + lengths[-1])
        left = token - starts[:, None]
        right = (starts + lengths - 1)[:, None] - token
        smaller = np.minimum(left, right)
        score = np.where(smaller < 0, -np.inf, smaller + 0.01 * lengths[:, None])
        best = score.argmax(axis=0)
        return [best[s : s + n] == i for i, (s, n) in enumerate(zip(starts, lengths, strict=True))]


def build_windows(
    examples: Sequence[SquadExample],
    tokenizer: Tokenizer | PairTokenizer,
    *,
    max_length: int = 384,
    doc_stride: int = 128,
    max_question_length: int = 64,
    progress: bool = True,
) -> SquadWindows:
    """Tokenise questions and contexts and cut them into windows.

    Args:
        examples: The questions.
        tokenizer: From `load_pair_tokenizer` or `load_wordpiece`.
        max_length: Tokens a window, special tokens included.
        doc_stride: Tokens between the *starts* of consecutive windows of a context, as in BERT. (Hugging Face's
            ``stride`` is the *overlap* of consecutive windows instead, which is ``window_length - doc_stride``.)
        max_question_length: Tokens of a question that are kept.
        progress: Whether to show a bar, on rank 0 and for what takes more than two seconds.

    Returns:
        The windows, in the order of ``examples``; one or more for each question.

    Raises:
        ValueError: No room is left for the context, or ``doc_stride`` is below 1.
    """
    special = as_pair(tokenizer)
    check_lengths(max_length, doc_stride, max_question_length, special.specials)
    contexts = list(dict.fromkeys(example.context for example in examples))
    number = {context: i for i, context in enumerate(contexts)}
    context_of = np.array([number[example.context] for example in examples], np.int32)
    encoder = special.encoder
    dtype: type = np.uint16 if special.vocab_size <= 1 << 16 else np.int32

    def bar(items: Any, what: str) -> Any:
        hidden = not progress or getattr(rank_zero_only, "rank", 0) != 0
        return tqdm(items, desc=what, delay=_QUIET_SECONDS, disable=hidden, leave=False)

    token_rows: list[NDArray[Any]] = []
    span_rows: list[NDArray[np.int32]] = []
    question_rows: list[NDArray[Any]] = []
    for i in bar(range(0, len(contexts), _CHUNK), "tokenising contexts"):
        chunk = contexts[i : i + _CHUNK]
        for context, encoding in zip(chunk, encoder.encode_batch(chunk, add_special_tokens=False), strict=True):
            token_rows.append(np.array(encoding.ids, dtype))
            span_rows.append(_with_marks(context, np.array(encoding.offsets, np.int32).reshape(-1, 2)))
    truncated = 0
    for i in bar(range(0, len(examples), _CHUNK), "tokenising questions"):
        questions = [example.question for example in examples[i : i + _CHUNK]]
        for encoding in encoder.encode_batch_fast(questions, add_special_tokens=False):
            truncated += len(encoding.ids) > max_question_length
            question_rows.append(np.array(encoding.ids[:max_question_length], dtype))

    window_rows: list[tuple[int, int, int, int, int]] = []
    first_window = np.zeros(len(examples) + 1, np.int64)
    for e, example in enumerate(bar(examples, "cutting windows")):
        spans = span_rows[context_of[e]]
        offset = len(question_rows[e]) + 1 + special.middle
        first, last = answer_tokens(spans, example.answers[0].start, len(example.answers[0].text))
        for start, length in _cuts(len(spans), max_length - offset - 1, doc_stride):
            inside = start <= first <= last < start + length
            positions = (first - start + offset, last - start + offset) if inside else (0, 0)
            window_rows.append((e, start, length, *positions))
        first_window[e + 1] = len(window_rows)
    table = np.array(window_rows, np.int32).reshape(-1, 5).T.copy()
    return SquadWindows(
        examples=examples,
        context_of=context_of,
        context_tokens=Ragged.from_rows(token_rows, np.empty(0, dtype)),
        context_spans=Ragged.from_rows(span_rows, np.empty((0, 2), np.int32)),
        question_tokens=Ragged.from_rows(question_rows, np.empty(0, dtype)),
        first_window=first_window,
        example_of=table[0],
        window_start=table[1],
        window_length=table[2],
        start_positions=table[3],
        end_positions=table[4],
        max_length=max_length,
        cls_id=special.cls,
        sep_id=special.sep,
        pad_id=special.pad,
        middle=special.middle,
        truncated_questions=truncated,
    )


def check_lengths(max_length: int, doc_stride: int, max_question_length: int, specials: int = 3) -> None:
    """Check that the three lengths leave room for a context beside so many special tokens.

    Raises:
        ValueError: They do not.
    """
    if max_question_length < 1:
        raise ValueError(f"max_question_length is {max_question_length}, expected 1 or more tokens")
    least = max_question_length + specials + 1
    if max_length < least:
        raise ValueError(
            f"max_length is {max_length}, expected max_question_length + {specials + 1} = {least} or more: the question, "
            f"[CLS], {specials - 1} [SEP] and one token of the context. Raise max_length or lower max_question_length."
        )
    if doc_stride < 1:
        raise ValueError(f"doc_stride is {doc_stride}, expected 1 or more tokens between the starts of windows")


def answer_tokens(spans: NDArray[np.int32], start: int, length: int) -> tuple[int, int]:
    """Find the tokens that cover a range of characters, whole tokens at both ends.

    Args:
        spans: Half-open character ranges of the tokens, int32 ``(n, 2)``, in order.
        start: First character.
        length: Number of characters.

    Returns:
        First and last token, inclusive; ``(-1, -1)`` when no token touches the range (control characters only).
    """
    first = int(np.searchsorted(spans[:, 1], start, side="right"))
    last = int(np.searchsorted(spans[:, 0], start + length, side="left")) - 1
    return (first, last) if first <= last else (-1, -1)


def _with_marks(text: str, spans: NDArray[np.int32]) -> NDArray[np.int32]:
    """Let tokens end after the combining accents of their last letter, which the normaliser strips off."""
    if text.isascii() or not any(unicodedata.category(c) == "Mn" for c in text):
        return spans
    limits = np.append(spans[1:, 0], len(text))
    for token, limit in enumerate(limits):
        while spans[token, 1] < limit and unicodedata.category(text[spans[token, 1]]) == "Mn":
            spans[token, 1] += 1
    return spans


def _cuts(tokens: int, room: int, doc_stride: int) -> list[tuple[int, int]]:
    """(start, length) of the windows over a context; one empty window for a context without tokens."""
    cuts, start = [], 0
    while True:
        length = min(tokens - start, room)
        cuts.append((start, length))
        if start + length >= tokens:
            return cuts
        start += min(length, doc_stride)
