"""Examples of BERT's pretraining: pairs of segments, and the tokens that are hidden in them.

Everything that is drawn for an example is a function of ``(seed, epoch, index)``: which epoch and which index decides, not
who asks or in what order. Source: Devlin et al. 2018, section 3.1, appendix A.1 and A.2, and ``create_pretraining_data.py``.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from slope_pl.data.mlm_sentences import SentenceTokenizer
from slope_pl.data.mlm_spans import Spans
from slope_pl.data.text_shards import PackedTokens

Batch = dict[str, Tensor]
Ids = NDArray[np.int64]

IGNORED = -100
"""Label of a slot without a prediction: what torch's cross entropy leaves out."""
MASK_SHARE = 0.15
"""Share of an example's tokens that are to be predicted."""
MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.8, 0.1
"""Of those: shares replaced by [MASK] and by a random token; the rest stays as it is."""
IS_NEXT, IS_RANDOM = 0, 1
"""Values of ``next_sentence_label``, as in the published program and in Hugging Face's models."""


class MlmPairs(Dataset[Batch]):
    """Pairs of segments with hidden tokens; hands out whole batches.

    Example ``i`` begins in span ``i``: its sentences are split at a random place into A and B, or, half of the time, only A
    is of them and B comes from a random place in another document. With probability ``short_probability`` the pair is filled
    to a random length and begins at a random sentence of the span; otherwise it fills ``max_length``. The published program
    takes up, in its next example, the sentences that a random B displaced; here spans are fixed, and those sentences have
    their turn in another epoch.

    Args:
        tokens: Packed sentences.
        spans: Of those, for ``max_length``.
        tokenizer: Their tokeniser.
        max_length: Tokens an example, with [CLS] and two [SEP].
        max_predictions: Most tokens an example that are hidden; also the width of the labels.
        seed: Of everything drawn.
        short_probability: Share of the examples filled to a random length only.
    """

    def __init__(
        self,
        tokens: PackedTokens,
        spans: Spans,
        tokenizer: SentenceTokenizer,
        *,
        max_length: int,
        max_predictions: int,
        seed: int,
        short_probability: float = 0.1,
    ) -> None:
        self.tokens, self.spans, self.seed = tokens, spans, seed
        self.max_length, self.max_predictions, self.short_probability = max_length, max_predictions, short_probability
        # Plain numbers, and not the tokeniser: data workers get a copy of all this.
        self.cls, self.sep, self.mask, self.pad = (
            tokenizer.cls,
            tokenizer.sentence_end,
            tokenizer.mask,
            tokenizer.end_of_text,
        )
        self.unknown = tokenizer.unknown
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int | tuple[int, int]) -> Batch:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> Batch:
        """Make the batch of these examples.

        Args:
            indices: ``(epoch, index)`` each, or an index alone for epoch 0.

        Returns:
            int64 tensors: ``input_ids``, ``attention_mask`` (0 for padding) and ``token_type_ids`` ``(B, max_length)``;
            ``masked_positions`` (0 in unused slots) and ``masked_labels`` (:data:`IGNORED` in unused slots)
            ``(B, max_predictions)``; ``next_sentence_label`` and ``pair_index`` ``(B,)``.
        """
        wide, narrow = (len(indices), self.max_length), (len(indices), self.max_predictions)
        out = {
            "input_ids": np.full(wide, self.pad, np.int64),
            "attention_mask": np.zeros(wide, np.int64),
            "token_type_ids": np.zeros(wide, np.int64),
            "masked_positions": np.zeros(narrow, np.int64),
            "masked_labels": np.full(narrow, IGNORED, np.int64),
            "next_sentence_label": np.empty(len(indices), np.int64),
            "pair_index": np.empty(len(indices), np.int64),
        }
        for row, index in enumerate(indices):
            epoch, i = index if isinstance(index, tuple) else (0, index)
            rng = np.random.default_rng([self.seed, epoch, i])
            a, b, label = self.pair(i, rng)
            ids = out["input_ids"][row]
            length = len(a) + len(b) + 3
            ids[0], ids[len(a) + 1], ids[length - 1] = self.cls, self.sep, self.sep
            ids[1 : len(a) + 1], ids[len(a) + 2 : length - 1] = a, b
            out["attention_mask"][row, :length] = 1
            out["token_type_ids"][row, len(a) + 2 : length] = 1
            out["next_sentence_label"][row], out["pair_index"][row] = label, i
            positions, labels = self.hide(ids, length, rng)
            out["masked_positions"][row, : len(positions)] = positions
            out["masked_labels"][row, : len(positions)] = labels
        return {key: torch.from_numpy(value) for key, value in out.items()}

    def pair(self, index: int, rng: np.random.Generator) -> tuple[Ids, Ids, int]:
        """Draw an example's segments and whether B follows A (:data:`IS_NEXT`) or not (:data:`IS_RANDOM`)."""
        room = self.max_length - 3
        target = room
        sentences = self._sentences(*self.spans.bounds(index))
        if rng.random() < self.short_probability:
            target = int(rng.integers(2, room + 1))
            sentences = sentences[int(rng.integers(0, len(sentences) - 1)) :]
            sentences = sentences[: max(2, _enough(sentences, target))]
        split = int(rng.integers(1, len(sentences)))
        a = np.concatenate(sentences[:split])
        label = IS_NEXT if rng.random() < 0.5 else IS_RANDOM
        if label == IS_RANDOM:
            elsewhere = self._elsewhere(self.spans.document(index), rng)
            b = np.concatenate(elsewhere[: _enough(elsewhere, target - len(a))])
        else:
            b = np.concatenate(sentences[split:])
        return *_truncate(a, b, room, rng), label

    def _elsewhere(self, document: int, rng: np.random.Generator) -> list[Ids]:
        """Sentences from a random place of another document on; every span of the others is equally likely."""
        first, after = int(self.spans.first[document]), int(self.spans.first[document + 1])
        span = int(rng.integers(0, len(self.spans) - (after - first)))
        span += after - first if span >= first else 0
        start, end = self.spans.bounds(span)
        skipped = int(rng.integers(0, len(self._sentences(start, end))))
        # Beyond the span where it does not last; more than twice the room is never used.
        stop = min(end + 2 * self.max_length, int(self.spans.ends[self.spans.document(span)]))
        return self._sentences(start, stop)[skipped:]

    def _sentences(self, start: int, end: int) -> list[Ids]:
        """Sentences of the tokens ``start : end``, without their end marks; the last one may be cut."""
        ids = np.empty(end - start, np.int64)
        self.tokens.read(start, ids)
        parts = np.split(ids, np.flatnonzero(ids == self.sep))
        rest = [part[1:] for part in parts[1:] if len(part) > 1]
        return [parts[0], *rest]

    def hide(self, ids: Ids, length: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """Choose tokens to predict and hide them in ``ids``, in place.

        Special tokens are never chosen; [UNK] counts among them, for nothing is learned from predicting it.

        Args:
            ids: int64 ``(max_length,)``, an example.
            length: Its tokens that are no padding.
            rng: The example's generator.

        Returns:
            Positions (rising) and original ids of the chosen tokens, int64 ``(n,)``, n at most ``max_predictions``.
        """
        own = ids[:length]
        may = np.flatnonzero((own != self.cls) & (own != self.sep) & (own != self.unknown))
        wanted = min(self.max_predictions, max(1, round(MASK_SHARE * length)), len(may))
        positions = np.sort(rng.permutation(may)[:wanted])
        labels = ids[positions]
        fate = rng.random(wanted)
        drawn = self.ordinary[rng.integers(0, len(self.ordinary), wanted)]
        replaced = fate < MASK_TOKEN_SHARE + RANDOM_TOKEN_SHARE
        ids[positions[replaced]] = np.where(fate < MASK_TOKEN_SHARE, self.mask, drawn)[replaced]
        return positions, labels


def _enough(sentences: Sequence[Ids], tokens: int) -> int:
    """How many of the sentences have ``tokens`` tokens together, at least one; all if they have fewer."""
    lengths = np.cumsum([len(sentence) for sentence in sentences])
    return min(int(np.searchsorted(lengths, tokens)) + 1, len(sentences))


def _truncate(a: Ids, b: Ids, room: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """Take tokens away from the longer segment, from either end with equal chance, until both fit."""
    excess = len(a) + len(b) - room
    if excess <= 0:
        return a, b
    # Token by token that is: level the two, then take in turns, B first.
    level = min(excess, abs(len(a) - len(b)))
    from_a, from_b = (level, 0) if len(a) > len(b) else (0, level)
    from_a += (excess - level) // 2
    from_b += (excess - level + 1) // 2
    front_a, front_b = int(rng.binomial(from_a, 0.5)), int(rng.binomial(from_b, 0.5))
    return a[front_a : len(a) - from_a + front_a], b[front_b : len(b) - from_b + front_b]
