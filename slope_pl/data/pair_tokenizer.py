"""Tokenisers of encoders, with what a sentence or a pair of them is wrapped in: BERT's WordPiece and RoBERTa's byte-level BPE.

BERT reads ``[CLS] a [SEP] b [SEP]``, RoBERTa (Liu et al. 2019) ``<s> a </s> </s> b </s>``; both read the first sentence alone
without what follows the first separator.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel

from slope_pl.data.bpe import load_bpe
from slope_pl.data.tokenizer import load_wordpiece

_BERT = ("[CLS]", "[SEP]", "[PAD]")
_ROBERTA = ("<s>", "</s>", "<pad>")


@dataclass(frozen=True, eq=False)
class PairTokenizer:
    """A bare tokeniser, and the tokens around its texts.

    Attributes:
        encoder: Adds no special tokens, does not truncate and does not pad; ``Encoding.offsets`` are half-open character
            ranges of the original string, without the space before a word.
        cls: Id of the first token.
        sep: Id of the separator.
        pad: Id of the padding.
        middle: Separators between the two texts of a pair.
    """

    encoder: Tokenizer
    cls: int
    sep: int
    pad: int
    middle: int = 1

    @property
    def vocab_size(self) -> int:
        """Highest token id plus one."""
        return max(self.encoder.get_vocab().values()) + 1

    @property
    def specials(self) -> int:
        """Tokens that a pair has beside its texts'."""
        return 2 + self.middle


def load_pair_tokenizer(source: str | os.PathLike[str]) -> PairTokenizer:
    """Load the tokeniser of an encoder.

    Args:
        source: A ``vocab.txt`` of WordPiece; a folder with ``tokenizer.json`` (WordPiece or byte-level BPE), ``vocab.txt``,
            or ``vocab.json`` and ``merges.txt``; or a model id on the hub.

    Raises:
        DataUnavailableError: No such file or folder, or the hub is not reachable.
        ValueError: Neither a WordPiece vocabulary with ``[PAD] [UNK] [CLS] [SEP] [MASK]`` nor a byte-level BPE with
            ``<s> </s> <pad>``.
    """
    if _is_bpe(source):
        encoder = load_bpe(source, end_of_text=_ROBERTA[1]).encoder
        # A word's offsets would begin at the space before it.
        encoder.post_processor = ByteLevel(trim_offsets=True)
        return _with_ids(encoder, _ROBERTA, middle=2, name=os.fspath(source))
    return as_pair(load_wordpiece(source))


def as_pair(tokenizer: Tokenizer | PairTokenizer) -> PairTokenizer:
    """A bare WordPiece tokeniser with BERT's special tokens; a :class:`PairTokenizer` as it is."""
    return tokenizer if isinstance(tokenizer, PairTokenizer) else _with_ids(tokenizer, _BERT, middle=1, name="it")


def _with_ids(encoder: Tokenizer, tokens: tuple[str, ...], middle: int, name: str) -> PairTokenizer:
    vocabulary = encoder.get_vocab()
    if missing := [token for token in tokens if token not in vocabulary]:
        raise ValueError(f"{name}: the vocabulary lacks {' '.join(missing)}, expected {' '.join(tokens)}")
    cls, sep, pad = (vocabulary[token] for token in tokens)
    return PairTokenizer(encoder, cls, sep, pad, middle)


def _is_bpe(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a BPE; what is neither, or not there, is left to WordPiece's messages."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return _model_type(path / "tokenizer.json") == "BPE"
        return not (path / "vocab.txt").is_file() and any(path.glob("*vocab.json"))
    if path.is_file():
        return path.suffix == ".json" and _model_type(path) == "BPE"
    text = os.fspath(source)
    if text.endswith((".txt", ".json")) or text.startswith((".", "~", os.sep)) or text.count("/") > 1:
        return False
    try:
        return json.loads(Tokenizer.from_pretrained(text).to_str())["model"].get("type") == "BPE"
    except Exception:  # the hub does not answer: loading says so, in its own words
        return False


def _model_type(file: Path) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None  # damaged: loading says where
    model = content.get("model") if isinstance(content, dict) else None
    if isinstance(model, dict):
        return model.get("type", "BPE" if "merges" in model else None)
    return "BPE" if file.name.endswith("vocab.json") else None
