"""Sentences for BERT's pretraining: how they lie in packed shards.

Shards hold WordPiece ids, each sentence followed by the id of ``[SEP]`` and each document by that of ``[PAD]``. Neither can
come out of text: the tokeniser is a bare one (`slope_pl.data.tokenizer`), to which "[SEP]" is three tokens.

Source of the units: Devlin et al. 2018, section 3.1 and appendix A.2; their program reads one sentence a line.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from slope_pl.data.bpe import TextTokenizer
from slope_pl.data.text_packing import SentencePacker
from slope_pl.data.text_sentences import RULES, Sentences
from slope_pl.data.text_sources import Document, TextSource
from slope_pl.data.tokenizer import SPECIAL_TOKENS, load_wordpiece

LONGEST_SENTENCE = 256
"""Tokens. What has no full stop for longer (a table, a list of names) is cut, so that no batch has to read far."""


@dataclass(frozen=True, eq=False)
class SentenceTokenizer(TextTokenizer):
    """WordPiece over sentences; what `slope_pl.data.prepare_shards` asks of a tokeniser.

    Attributes:
        end_of_text: Id of ``[PAD]``: ends a document in the shards.
        sentence_end: Id of ``[SEP]``: ends a sentence in the shards and a segment in a batch.
        cls: Id of ``[CLS]``.
        mask: Id of ``[MASK]``.
        unknown: Id of ``[UNK]``.
        sentences: How documents are split; see `slope_pl.data.split_sentences`.
    """

    sentence_end: int
    cls: int
    mask: int
    unknown: int
    sentences: Sentences

    @property
    def special(self) -> tuple[int, ...]:
        """Ids of ``[PAD] [UNK] [CLS] [SEP] [MASK]``: never chosen for masking, never drawn as a random token."""
        return self.end_of_text, self.unknown, self.cls, self.sentence_end, self.mask

    def packer(self, dtype: str) -> SentencePacker:
        """Make what turns texts into packed tokens, each sentence with its end mark; a text without any gives none."""
        return SentencePacker(
            self.encoder, self.end_of_text, dtype, self.sentence_end, LONGEST_SENTENCE, self.sentences
        )


def load_sentence_tokenizer(source: str | os.PathLike[str], sentences: Sentences = "prose") -> SentenceTokenizer:
    """Load a WordPiece tokeniser that splits sentences first.

    Args:
        source: As in `slope_pl.data.load_wordpiece`: a vocab.txt, a folder, or a hub id.
        sentences: How documents are split.

    Raises:
        DataUnavailableError: No such file or folder, or the hub is not reachable.
        ValueError: Not a WordPiece vocabulary, or one without ``[PAD] [UNK] [CLS] [SEP] [MASK]``.
    """
    encoder = load_wordpiece(source)
    vocabulary = encoder.get_vocab()
    pad, unknown, cls, sep, mask = (vocabulary[token] for token in SPECIAL_TOKENS)
    rules = f"{sentences} {LONGEST_SENTENCE} {RULES}"
    digest = hashlib.sha256((encoder.to_str() + rules).encode()).hexdigest()
    size = 1 + max(vocabulary.values())
    return SentenceTokenizer(encoder, size, pad, digest, False, sep, cls, mask, unknown, sentences)


class GroupedText:
    """A source whose documents are several consecutive ones of another source, a line each.

    For data with one sentence a row and no mark between books (the hub's bookcorpus).

    Args:
        source: The other source.
        rows: How many make one document.
    """

    def __init__(self, source: TextSource, rows: int) -> None:
        self.source, self.rows = source, rows
        self.name, self.unit, self.total = source.name, source.unit, source.total

    def fingerprint(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the other source's fingerprint and the number of rows."""
        return {**self.source.fingerprint(known), "rows_per_document": self.rows}

    def documents(self, skip: int = 0) -> Iterator[Document]:
        """Yield the groups after the first ``skip``; errors are the other source's."""
        rows = self.source.documents(skip * self.rows)
        while group := list(islice(rows, self.rows)):
            text = "\n".join(document.text.replace("\n", " ") for document in group)
            yield replace(group[-1], text=text, where=group[0].where)
