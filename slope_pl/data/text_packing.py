"""Texts to packed tokens, fast: text is cut where tokens do not depend on what is beside them, and pieces are remembered.

Two thirds of an English text are the same thousand pieces, so that nearly every one is found in a dictionary instead of
going through the tokeniser. What comes out is what the tokeniser makes of the whole text, token for token.

Only numpy, `tokenizers` and the standard library are imported: the processes of `slope_pl.data.text_workers` start with
this module, and torch would take them longer than a million words.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from slope_pl.data.text_sentences import Sentences, split_sentences

_MOST_PIECES = 1 << 18  # in each of two dictionaries: some 100 MB
_LONGEST_PIECE = 40  # characters; longer ones hardly come again
_BLOCK = 1 << 18  # characters whose pieces are all in memory at the same time

_TYPOGRAPHIC = "‘’“”–—…"  # punctuation to both tokenisers

# What is white space to GPT-2's pre-tokeniser; Python's \s holds U+001C to U+001F as well.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BEFORE_SPACE = re.compile(f"(?<=[^{_SPACE}])(?=[{_SPACE}])")
_SPACE_AND_WORD = re.compile(f"[{_SPACE}]*[^{_SPACE}]+|[{_SPACE}]+")
_PLAIN_WORDS = re.compile(rf"[\n -~{_TYPOGRAPHIC}]+")  # GPT-2's pattern is simple there: letters and digits are ASCII's
_PLAIN_PARTS = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\n A-Za-z0-9]+|[\n ]+(?![^\n ])|[\n ]+")

# White space to `str.split`, but control characters to BERT's normaliser, which drops them: "a\x0bb" is one word.
_CONTROL = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"
_BETWEEN_SPACES = re.compile(r"[^\t\n\r ]+")
_PLAIN_WORD = re.compile(rf"[!-~{_TYPOGRAPHIC}]+")
_WORD_AND_MARKS = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9]")


@dataclass(slots=True)
class Batch:
    """Documents that are packed in one go.

    Attributes:
        texts: Their characters.
        done: How far the source has been read with the last one, in its unit.
    """

    texts: list[str]
    done: int


@dataclass(slots=True)
class Packed:
    """Documents as packed tokens, by split.

    Attributes:
        tokens: Of the documents one after the other, each with its end-of-text token; in the dtype of the shards, ``(n,)``.
        documents: How many they are of.
        characters: In these documents.
        empty: Documents without anything but white space, left out.
    """

    tokens: dict[str, NDArray[Any]] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)
    characters: int = 0
    empty: int = 0


class Packer(ABC):
    """Turns texts into packed tokens; remembers what it has seen, so that a second text is faster than the first.

    Args:
        encoder: The bare tokeniser: no special tokens, no truncation, no padding.
        end_of_text: Id of the token behind each document.
        dtype: Of a token in the shards.
    """

    def __init__(self, encoder: Tokenizer, end_of_text: int, dtype: str) -> None:
        self.encoder, self.end_of_text, self.dtype = encoder, end_of_text, np.dtype(dtype)
        self.pieces = _Pieces(self)

    @abstractmethod
    def pack(self, text: str) -> list[bytes]:
        """Tokens of a text, without end-of-text, in any number of parts."""

    def parts(self, piece: str) -> Sequence[str]:
        """Cut a piece that is not known yet once more, where the rules are simple; one part if there is nothing to cut."""
        return (piece,)

    def ids(self, piece: str) -> bytes:
        """Tokens of a piece, from the tokeniser."""
        if len(piece) <= _LONGEST_PIECE:
            return self.row(self.encoder.encode(piece, add_special_tokens=False).ids)
        # Without offsets, half of the work in a long piece. In a short one, asking another thread would take longer.
        return self.row(self.encoder.encode_batch_fast([piece], add_special_tokens=False)[0].ids)

    def row(self, ids: Sequence[int]) -> bytes:
        """Tokens as they lie in the shards."""
        return np.array(ids, self.dtype).tobytes()

    def array(self, parts: Iterable[bytes]) -> NDArray[Any]:
        """Tokens as an array ``(n,)`` that cannot be written to."""
        return np.frombuffer(b"".join(parts), self.dtype)

    def pack_documents(self, texts: Sequence[str], val_fraction: float) -> Packed:
        """Pack documents, and hold some out; see `is_held_out`."""
        packed, end = Packed(), self.row([self.end_of_text])
        parts: dict[str, list[bytes]] = {"train": [], "val": []}
        packed.documents = dict.fromkeys(parts, 0)
        for text in texts:
            if not text or text.isspace():
                packed.empty += 1
                continue
            split = "val" if is_held_out(text, val_fraction) else "train"
            parts[split] += self.pack(text)
            parts[split].append(end)
            packed.documents[split] += 1
            packed.characters += len(text)
        packed.tokens = {split: self.array(found) for split, found in parts.items()}
        return packed


class TextPacker(Packer):
    """Packs texts with a byte-level BPE.

    GPT-2's pre-tokeniser begins a word at every run of white space, so that texts can be cut there; others need whole texts.

    Args:
        encoder: As in `Packer`.
        end_of_text: As in `Packer`.
        dtype: As in `Packer`.
        can_be_cut: Whether the pre-tokeniser is GPT-2's.
    """

    def __init__(self, encoder: Tokenizer, end_of_text: int, dtype: str, can_be_cut: bool) -> None:
        super().__init__(encoder, end_of_text, dtype)
        self.can_be_cut = can_be_cut

    def pack(self, text: str) -> list[bytes]:
        """Tokens of a text."""
        if not self.can_be_cut:
            return [self.ids(text)]
        known = self.pieces.__getitem__
        return [b"".join(map(known, _SPACE_AND_WORD.findall(block))) for block in self.blocks(text)]

    @staticmethod
    def blocks(text: str) -> Iterator[str]:
        """Cut a text before white space, each block `_BLOCK` characters or somewhat more; one if there is no place."""
        start = 0
        while (found := _BEFORE_SPACE.search(text, start + _BLOCK)) is not None:
            yield text[start : found.start()]
            start = found.start()
        yield text[start:]

    def parts(self, piece: str) -> Sequence[str]:
        """Cut a piece of ASCII as the pre-tokeniser does."""
        return _PLAIN_PARTS.findall(piece) if _PLAIN_WORDS.fullmatch(piece) else (piece,)


class SentencePacker(Packer):
    """Packs texts with WordPiece, sentence by sentence, an end mark behind each.

    Args:
        encoder: As in `Packer`.
        end_of_text: As in `Packer`.
        dtype: As in `Packer`.
        sentence_end: Id of the mark.
        longest: Tokens; a longer sentence becomes several.
        sentences: How texts are split; see `split_sentences`.
    """

    def __init__(
        self,
        encoder: Tokenizer,
        end_of_text: int,
        dtype: str,
        sentence_end: int,
        longest: int,
        sentences: Sentences,
    ) -> None:
        super().__init__(encoder, end_of_text, dtype)
        self.end, self.sentences = self.row([sentence_end]), sentences
        self.longest = longest * self.dtype.itemsize

    def pack(self, text: str) -> list[bytes]:
        """Tokens of a text, an end mark behind each sentence that has any."""
        words: Callable[[str], list[str]] = str.split
        if any(mark in text for mark in _CONTROL):
            words = _BETWEEN_SPACES.findall
        known, end, longest = self.pieces.__getitem__, self.end, self.longest
        out: list[bytes] = []
        for sentence in split_sentences(text, self.sentences):
            ids = b"".join(map(known, words(sentence)))
            for start in range(0, len(ids), longest):
                out += (ids[start : start + longest], end)
        return out

    def parts(self, piece: str) -> Sequence[str]:
        """Cut a piece of ASCII at punctuation, as the pre-tokeniser does."""
        return _WORD_AND_MARKS.findall(piece) if _PLAIN_WORD.fullmatch(piece) else (piece,)


class _Pieces(dict[str, bytes]):
    """Tokens of pieces of text. What is not there yet is made when it is asked for; what was long not asked for goes."""

    def __init__(self, packer: Packer) -> None:
        super().__init__()
        self.packer = packer
        self.before: dict[str, bytes] = {}  # what was here when it was last full

    def __missing__(self, piece: str) -> bytes:
        if (tokens := self.before.get(piece)) is None:
            parts = self.packer.parts(piece)
            tokens = b"".join(map(self.__getitem__, parts)) if len(parts) > 1 else self.packer.ids(piece)
        if len(piece) <= _LONGEST_PIECE:
            if len(self) >= _MOST_PIECES:
                self.before = dict(self)
                self.clear()
            self[piece] = tokens
        return tokens


def is_held_out(text: str, fraction: float) -> bool:
    """Tell whether a document belongs to the held-out split: a function of its text alone.

    So copies of a document lie on the same side, and no document changes sides when others are added. Of the documents
    held out at a fraction, all are held out at a larger one.

    Args:
        text: The document.
        fraction: Expected fraction that is held out, 0 to 1.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2.0**64
