"""Where the training examples of BERT's pretraining lie in packed sentences.

A span is a run of whole sentences of one document, as long as one example has room for. The spans of a document follow each
other without gaps, so that an epoch visits every token. They are found once for each length and stored beside the shards.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slope_pl.data.mlm_sentences import SentenceTokenizer
from slope_pl.data.text_shards import PackedTokens, ShardError, write_atomically

_CHUNK = 1 << 22  # tokens looked at in one go
_RULES = 1  # changes when the same tokens would give other spans


@dataclass(frozen=True)
class Spans:
    """The spans of one split; only documents of two sentences or more have any.

    Attributes:
        starts: int64 ``(spans,)``, the first token of each.
        first: int64 ``(documents + 1,)``, the first span of each document, and the number of spans.
        ends: int64 ``(documents,)``, the token behind each document's last sentence end.
    """

    starts: NDArray[np.int64]
    first: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def document(self, span: int) -> int:
        """Which document a span is of."""
        return int(np.searchsorted(self.first, span, side="right")) - 1

    def bounds(self, span: int) -> tuple[int, int]:
        """First token of a span, and the token behind it."""
        document = self.document(span)
        last = span + 1 == self.first[document + 1]
        return int(self.starts[span]), int(self.ends[document] if last else self.starts[span + 1])


def build_spans(tokens: PackedTokens, tokenizer: SentenceTokenizer, room: int) -> Spans:
    """Cut documents into spans.

    Each takes sentences until it has ``room`` tokens, at least two; a single sentence left at the end of a document goes to
    the span before it. So every span can be split into two parts that follow each other.

    Args:
        tokens: Packed sentences.
        tokenizer: Of their marks.
        room: Tokens of text an example holds, ``max_length`` less three for ``[CLS]`` and two ``[SEP]``.
    """
    sentence_ends, document_ends = _marks(tokens, tokenizer)
    document_starts = np.concatenate([[0], document_ends[:-1] + 1]).astype(np.int64)[: len(document_ends)]
    # Sentences of document d: begin[d] : end[d].
    begin = np.searchsorted(sentence_ends, document_starts)
    end = np.searchsorted(sentence_ends, document_ends)
    starts = np.concatenate([[0], sentence_ends[:-1] + 1]).astype(np.int64)[: len(sentence_ends)]
    has = end > begin
    starts[begin[has]] = document_starts[has]
    before = np.concatenate([[0], np.cumsum(sentence_ends - starts)])  # tokens of text before each sentence

    kept = end - begin >= 2
    at, stop, ends = begin[kept], end[kept], document_ends[kept]
    counts, found = np.zeros(len(at), np.int64), []
    active = np.arange(len(at))
    while len(active):  # one span of every document at a time
        found.append(at[active])
        counts[active] += 1
        following = np.searchsorted(before, before[at[active]] + room)
        following = np.maximum(following, at[active] + 2)
        following[stop[active] - following <= 1] = np.iinfo(np.int64).max
        at[active] = following
        active = active[following < stop[active]]
    sentences = np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)
    return Spans(starts[sentences], np.concatenate([[0], np.cumsum(counts)]), ends)


def load_spans(tokens: PackedTokens, split: str, tokenizer: SentenceTokenizer, room: int, save: bool = False) -> Spans:
    """Map stored spans into memory, or find them.

    Args:
        tokens: Packed sentences of the split.
        split: Its name.
        tokenizer: Of their marks.
        room: As in `build_spans`.
        save: Whether to store what had to be found. A folder that cannot be written to is no error.

    Raises:
        ShardError: The file is damaged.
    """
    what = [_RULES, room, [shard.sha256 for shard in tokens.shards]]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    path = tokens.folder / f"spans-{split}-{room + 3}-{digest}.npy"
    if not path.is_file():
        spans = build_spans(tokens, tokenizer, room)
        if not save or not _save(path, spans):
            return spans
    return _read(path)


def _marks(tokens: PackedTokens, tokenizer: SentenceTokenizer) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the ends of sentences and of documents."""

    def chunks() -> Iterator[tuple[int, NDArray[np.int64]]]:
        buffer = np.empty(min(_CHUNK, len(tokens)), np.int64)
        for start in range(0, len(tokens), _CHUNK):
            part = buffer[: len(tokens) - start]
            tokens.read(start, part)
            yield start, part

    none: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    sentences, documents = list(none), list(none)
    for start, part in chunks():
        sentences.append(start + np.flatnonzero(part == tokenizer.sentence_end))
        documents.append(start + np.flatnonzero(part == tokenizer.end_of_text))
    return np.concatenate(sentences), np.concatenate(documents)


def _save(path: Path, spans: Spans) -> bool:
    content = np.concatenate([[len(spans), len(spans.ends)], spans.starts, spans.first, spans.ends]).astype("<i8")
    try:
        write_atomically(path, content.tobytes())
    except OSError:  # a folder prepared elsewhere may be read-only: every process then finds them for itself
        return False
    return True


def _read(path: Path) -> Spans:
    content: NDArray[np.int64] = np.memmap(path, "<i8", mode="r")
    spans, documents = content[:2].tolist() if len(content) >= 2 else (0, 0)
    if len(content) != 2 + spans + 2 * documents + 1:
        raise ShardError(
            f"{path}: {8 * len(content):,} bytes, expected {8 * (2 + spans + 2 * documents + 1):,}: the file is damaged. "
            "Delete it: it is made again from the shards."
        )
    starts, first, ends = np.split(content[2:], [spans, spans + documents + 1])
    return Spans(starts, first, ends)
