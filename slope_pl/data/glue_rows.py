"""GLUE examples as token ids: ``[CLS] first [SEP]`` or ``[CLS] first [SEP] second [SEP]`` (Devlin et al. 2018, figure 2).

RoBERTa's have two separators in the middle, see `slope_pl.data.pair_tokenizer`.

Batches are padded to their own longest row: most sentences are a tenth of the longest one allowed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from slope_pl.data.glue import GlueExample
from slope_pl.data.glue_tasks import TaskInfo
from slope_pl.data.pair_tokenizer import PairTokenizer, as_pair

_CHUNK = 10_000  # examples tokenised at a time: their encodings are far larger than the ids


@dataclass(frozen=True, eq=False)
class GlueRows:
    """The examples of a split, tokenised, without padding; ``R`` of them.

    Attributes:
        tokens: Ids of all rows, one after the other, int32.
        starts: Where each row begins in ``tokens``, and the end of the last, int64 ``(R + 1,)``.
        first_lengths: Tokens of the first segment, with ``[CLS]`` and its ``[SEP]``, int32 ``(R,)``.
        labels: int64 classes, or float32 scores, ``(R,)``.
        pad: Id of ``[PAD]``.
        max_length: Longest row allowed.
        truncated: Rows that were cut to ``max_length``.
    """

    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    first_lengths: NDArray[np.int32]
    labels: NDArray[np.generic]
    pad: int
    max_length: int
    truncated: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, ``(R,)``."""
        return np.diff(self.starts)

    def batch(self, indices: Sequence[int], pad_to: int = 1) -> dict[str, NDArray[np.generic]]:
        """Rows padded to the longest of them, rounded up to a multiple of ``pad_to`` (``max_length`` at most).

        Returns:
            int64 ``input_ids``, ``attention_mask`` and ``token_type_ids`` ``(B, T)``, ``labels`` and ``row_index`` ``(B,)``.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        begin, length = self.starts[chosen], self.lengths[chosen]
        longest = min(-(-int(length.max()) // pad_to) * pad_to, self.max_length)
        place = np.arange(longest)
        inside = place < length[:, None]
        # Beyond a row's end the index points anywhere valid; the mask decides.
        ids = self.tokens[np.minimum(begin[:, None] + place, len(self.tokens) - 1)].astype(np.int64)
        return {
            "input_ids": np.where(inside, ids, self.pad),
            "attention_mask": inside.astype(np.int64),
            "token_type_ids": (inside & (place >= self.first_lengths[chosen, None])).astype(np.int64),
            "labels": self.labels[chosen],
            "row_index": chosen,
        }


def build_rows(
    examples: Sequence[GlueExample], info: TaskInfo, tokenizer: Tokenizer | PairTokenizer, max_length: int
) -> GlueRows:
    """Tokenise the examples of a split.

    A pair that is too long loses tokens from the end of its longer sentence until both are equally long, then from both,
    as Hugging Face's ``longest_first``.

    Args:
        examples: From `read_glue`, one or more.
        info: Their task.
        tokenizer: From `load_pair_tokenizer` or `load_wordpiece`.
        max_length: Tokens a row, with ``[CLS]`` and ``[SEP]``.

    Returns:
        The rows in the order of the examples.

    Raises:
        ValueError: ``max_length`` leaves no place for a token of each sentence, or an example has no token at all.
    """
    special = as_pair(tokenizer)
    texts = len(info.texts[0])
    specials = special.specials if texts == 2 else 2
    if max_length < specials + texts:
        raise ValueError(f"max_length is {max_length}, expected {specials + texts} or more for {info.name}")
    cls, sep = special.cls, special.sep
    parts: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    first_lengths: list[int] = []
    truncated = 0
    for first, second in _encoded(examples, special.encoder):
        n1, n2 = _cut(len(first), len(second), max_length - specials)
        if n1 == 0:
            raise ValueError(f"{examples[len(lengths)].first!r} gives no token, expected a sentence: remove the row")
        truncated += n1 < len(first) or n2 < len(second)
        row = [cls, *first[:n1], sep]
        if texts == 2:
            row += [sep] * (special.middle - 1)
        first_lengths.append(len(row))
        if texts == 2:
            row += [*second[:n2], sep]
        lengths.append(len(row))
        parts.append(np.asarray(row, np.int32))
    return GlueRows(
        tokens=np.concatenate(parts),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        first_lengths=np.asarray(first_lengths, np.int32),
        labels=np.asarray([e.label for e in examples], np.float32 if info.regression else np.int64),
        pad=special.pad,
        max_length=max_length,
        truncated=truncated,
    )


def _encoded(examples: Sequence[GlueExample], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    for at in range(0, len(examples), _CHUNK):
        chunk = examples[at : at + _CHUNK]
        first = tokenizer.encode_batch([e.first for e in chunk], add_special_tokens=False)
        second = tokenizer.encode_batch([e.second or "" for e in chunk], add_special_tokens=False)
        yield from ((a.ids, b.ids) for a, b in zip(first, second, strict=True))


def _cut(n1: int, n2: int, room: int) -> tuple[int, int]:
    """How many tokens of each sentence stay."""
    if n1 + n2 <= room:
        return n1, n2
    short = min(n1, n2)
    if short <= room // 2:
        short, long = short, room - short
    else:
        short, long = room // 2, room - room // 2
    return (short, long) if n1 <= n2 else (long, short)
