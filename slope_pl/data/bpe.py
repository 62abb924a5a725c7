"""Byte-level BPE as GPT-2 has it: text to token ids and back, without special treatment of anything in the text.

A tokeniser file also matches special tokens inside the text (an article about GPT-2 that writes "<|endoftext|>" would
end there), truncates and pads as it says. Pretraining needs none of that: the vocabulary, the merges and the
pre-tokeniser are taken out of whatever is given.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2, and its ``encoder.py``.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel

from slope_pl.data.squad import DataUnavailableError
from slope_pl.data.text_packing import Packer, TextPacker

END_OF_TEXT = "<|endoftext|>"
# Names of the two files of a vocabulary: OpenAI's and Hugging Face's. Files may have a common prefix, as in gpt2-encoder.json.
_PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_EXPECTED = "tokenizer.json, vocab.json and merges.txt, or encoder.json and vocab.bpe"
_PROBE = "It's 2:4 -- don't, naïve   \r\n\tDéjà-vu №7 日本語 👍🏽 <|endoftext|> "


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A byte-level BPE with what packed text needs to know about it.

    Attributes:
        encoder: The bare tokeniser: no special tokens, no truncation, no padding.
        vocab_size: Highest token id plus one.
        end_of_text: Id of the token that ends a document; 50256 for GPT-2.
        fingerprint: SHA-256 (hex) of vocabulary, merges, end-of-text id and the ids of a probe text. Equal for the same
            tokeniser in another file format.
        can_be_cut: Whether a text may be cut before white space without other tokens coming out.
    """

    encoder: Tokenizer
    vocab_size: int
    end_of_text: int
    fingerprint: str
    can_be_cut: bool

    def packer(self, dtype: str) -> Packer:
        """Make what turns texts into packed tokens, for shards of this dtype."""
        return TextPacker(self.encoder, self.end_of_text, dtype, self.can_be_cut)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without end-of-text."""
        packer = self.packer("<u4")
        return [packer.array(packer.pack(text)).tolist() for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, end-of-text written out as its name."""
        return self.encoder.decode(list(ids), skip_special_tokens=False)


def load_bpe(source: str | os.PathLike[str], end_of_text: str = END_OF_TEXT) -> TextTokenizer:
    """Load a byte-level BPE tokeniser.

    Args:
        source: A folder with tokenizer.json, with vocab.json and merges.txt or with encoder.json and vocab.bpe (a common
            prefix is fine: gpt2-encoder.json, gpt2-vocab.bpe); one of these files; or a model id on the hub.
        end_of_text: The token that ends a document.

    Returns:
        The tokeniser. It never makes the end-of-text token from text: that spelling in a document is plain characters.

    Raises:
        DataUnavailableError: No such file or folder, or the hub is not reachable.
        ValueError: Not a byte-level BPE, a damaged file, or no token ``end_of_text`` in it.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        return _from_file(_find(path), end_of_text)
    if path.is_file():
        return _from_file(path, end_of_text)
    if text.endswith((".json", ".txt", ".bpe")) or text.startswith((".", "~", os.sep)) or text.count("/") > 1:
        raise DataUnavailableError(
            f"no tokeniser {path} (working directory: {Path.cwd()}). Give a folder with {_EXPECTED}, one of these files, "
            "or a hub id such as 'gpt2'."
        )
    try:
        hub = Tokenizer.from_pretrained(text)
    except Exception as error:  # the Rust side raises bare Exception for some network errors
        raise DataUnavailableError(
            f"cannot load the tokeniser of {text!r} from the hub or its local cache ({type(error).__name__}: {error}). "
            f"Without a network, give a folder with {_EXPECTED}."
        ) from error
    return _from_json(json.loads(hub.to_str()), f"hub model {text!r}", end_of_text)


def save_bpe(tokenizer: TextTokenizer, folder: str | os.PathLike[str]) -> None:
    """Write a tokeniser as Hugging Face's: tokenizer.json and tokenizer_config.json.

    ``load_bpe(folder)`` gives one of the same fingerprint, ``transformers.AutoTokenizer.from_pretrained(folder)`` the same
    ids; the latter makes the end-of-text token also from its spelling in a text.

    Args:
        tokenizer: what to write.
        folder: where; it is made.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    name = tokenizer.encoder.id_to_token(tokenizer.end_of_text)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    end = {"id": tokenizer.end_of_text, "content": name, **flags, "special": True}
    content = json.loads(tokenizer.encoder.to_str()) | {"added_tokens": [end]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": name, "eos_token": name}
    for file, what in (("tokenizer.json", content), ("tokenizer_config.json", config)):
        (place / file).write_text(json.dumps(what, ensure_ascii=False) + "\n", encoding="utf-8")


def _find(folder: Path) -> Path:
    """The one file of a folder that a tokeniser can be loaded from."""
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    found = sorted(p for first, _ in _PAIRS for p in folder.glob(f"*{first}") if p.is_file())
    if len(found) > 1:
        raise ValueError(
            f"several vocabularies in {folder}: {', '.join(p.name for p in found)}. Name the file instead."
        )
    if not found:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
        raise DataUnavailableError(f"no tokeniser in {folder} (it holds: {names}); expected {_EXPECTED}")
    return found[0]


def _from_file(path: Path, end_of_text: str) -> TextTokenizer:
    try:
        for vocabulary, merges in _PAIRS:
            for this, other in ((vocabulary, merges), (merges, vocabulary)):
                if not path.name.endswith(this):
                    continue
                partner = path.with_name(path.name.removesuffix(this) + other)
                if not partner.is_file():
                    raise DataUnavailableError(f"{path} is there, but {partner} is not; a vocabulary needs both")
                pair = (path, partner) if this == vocabulary else (partner, path)
                return _from_pair(*pair, end_of_text)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}, or the file that goes with it, is damaged: {error}") from error
    return _from_json(content, str(path), end_of_text)


def _from_pair(vocabulary: Path, merges: Path, end_of_text: str) -> TextTokenizer:
    # Not splitlines(): U+2028 and its like may be tokens.
    lines = merges.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    rules = [line.rstrip("\r").split(" ") for line in lines if not line.startswith("#version") and line.strip()]
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab = json.loads(vocabulary.read_text(encoding="utf-8"))
    model = {"vocab": vocab, "merges": rules}
    return _from_json({"model": model, "pre_tokenizer": pre_tokenizer}, f"{vocabulary} and {merges.name}", end_of_text)


def _from_json(content: Any, name: str, end_of_text: str) -> TextTokenizer:
    """Build the bare tokeniser from the content of a tokenizer.json."""
    model = content.get("model") if isinstance(content, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict) or "merges" not in model:
        kind = model.get("type") if isinstance(model, dict) else None
        raise ValueError(
            f"{name}: the model is {kind!r}, expected a byte-level BPE with vocabulary and merges (GPT-2's)"
        )
    try:
        added = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or ()}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name}: added_tokens are damaged, expected objects with content and id: {error}") from error
    vocab = {**vocab, **added}
    missing = sorted(set(ByteLevel.alphabet()) - vocab.keys())
    if missing:
        # Such a byte would vanish from the text without a word.
        raise ValueError(
            f"{name}: the vocabulary of {len(vocab):,} tokens lacks {len(missing)} of the 256 byte symbols "
            f"({' '.join(missing[:8])} ...), expected a byte-level BPE such as GPT-2's"
        )
    if end_of_text not in vocab:
        near = sorted(token for token in vocab if token.startswith("<") and token.endswith(">"))[:8]
        hint = f"it has {', '.join(near)}" if near else "it has none like it"
        raise ValueError(
            f"{name}: no token {end_of_text!r} to end documents with ({hint}); name the right one with end_of_text"
        )
    merges = [tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule) for rule in model["merges"]]
    before = content.get("pre_tokenizer")
    bare = {
        "version": "1.0",
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": before,
        "model": {**model, "type": "BPE", "vocab": vocab, "merges": merges},
        "added_tokens": [],
    }
    try:
        encoder = Tokenizer.from_str(json.dumps(bare))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{name}: the tokeniser is damaged: {error}") from error
    encoder.decoder = ByteLevelDecoder()
    content_hash = hashlib.sha256()
    for part in (sorted(vocab.items()), merges, vocab[end_of_text], encoder.encode(_PROBE).ids):
        content_hash.update(json.dumps(part).encode())
    plain = before is not None and before.get("type") == "ByteLevel" and not before.get("add_prefix_space", False)
    return TextTokenizer(
        encoder=encoder,
        vocab_size=max(vocab.values()) + 1,
        end_of_text=vocab[end_of_text],
        fingerprint=content_hash.hexdigest(),
        can_be_cut=plain and before.get("use_regex", True) and content.get("normalizer") is None,
    )
