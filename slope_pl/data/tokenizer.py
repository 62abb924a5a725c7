"""BERT's WordPiece tokeniser with exact character offsets.

A `tokenizers.Tokenizer` that comes with a model also matches special tokens inside the text (a paragraph that mentions
"[SEP]" gets a separator), truncates and pads as its file says. Windows over a context need none of that, so the
vocabulary and the normaliser are taken out of whatever is given and put into a bare tokeniser.
"""

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from slope_pl.data.squad import DataUnavailableError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MAX_WORD = 100  # characters; longer words become [UNK], as in the released BERT tokenisers of Hugging Face


def load_wordpiece(source: str | os.PathLike[str]) -> Tokenizer:
    """Load BERT's tokeniser: clean, split at spaces and punctuation, then WordPiece.

    Args:
        source: A ``vocab.txt`` (one token a line), a folder with ``tokenizer.json`` or ``vocab.txt``, or a model id on
            the hub. Text is lower-cased and stripped of accents unless ``do_lower_case`` in the
            ``tokenizer_config.json`` next to ``vocab.txt``, or the normaliser in ``tokenizer.json``, says otherwise.

    Returns:
        A tokeniser that adds no special tokens, does not truncate and does not pad. ``Encoding.offsets`` are half-open
        character ranges of the original string, whatever normalisation did to it. (An accent written as a character of
        its own after a token's last letter lies outside the token; `build_windows` adds it.)

    Raises:
        DataUnavailableError: No such file or folder, or the hub is not reachable.
        ValueError: Not a WordPiece vocabulary, or one without ``[PAD] [UNK] [CLS] [SEP] [MASK]``.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        for name in ("tokenizer.json", "vocab.txt"):
            if (path / name).is_file():
                return _from_file(path / name)
        raise DataUnavailableError(f"no tokenizer.json or vocab.txt in {path}")
    if path.is_file():
        return _from_file(path)
    if text.endswith((".txt", ".json")) or text.startswith((".", "~", os.sep)) or text.count("/") > 1:
        raise DataUnavailableError(
            f"no vocabulary {path} (working directory: {Path.cwd()}). Give a vocab.txt, a folder with tokenizer.json "
            "or vocab.txt, or a hub id such as 'bert-large-uncased'."
        )
    try:
        hub = Tokenizer.from_pretrained(text)
    except Exception as error:  # the Rust side raises bare Exception for some network errors
        raise DataUnavailableError(
            f"cannot load the tokeniser of {text!r} from the hub or its local cache ({type(error).__name__}: {error}). "
            "Without a network, give a vocab.txt or a folder that holds one."
        ) from error
    return _from_json(json.loads(hub.to_str()), f"hub model {text!r}")


def _from_file(path: Path) -> Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return _from_json(json.loads(text), str(path))
        config_file = path.parent / "tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}, or the tokenizer_config.json next to it, is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_file}: {config!r}, expected an object with keys such as do_lower_case")
    vocabulary: dict[str, int] = {}
    # Not splitlines(): U+2028 and its like may be tokens.
    for line, token in enumerate(text.removesuffix("\n").split("\n")):
        token = token.rstrip("\r")
        if token in vocabulary:
            raise ValueError(f"{path}: line {line + 1} repeats token {token!r} of line {vocabulary[token] + 1}")
        vocabulary[token] = line
    lowercase = config.get("do_lower_case", True)
    if not isinstance(lowercase, bool):
        raise ValueError(f"{config_file}: do_lower_case is {lowercase!r}, expected true or false")
    return _build(vocabulary, str(path), lowercase=lowercase)


def _from_json(content: Any, name: str) -> Tokenizer:
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type", "WordPiece") != "WordPiece" or "vocab" not in model:
        kind = model.get("type") if isinstance(model, dict) else None
        raise ValueError(f"{name}: the model is {kind!r}, expected a WordPiece model with a vocabulary (BERT's)")
    vocab, normalizer = model["vocab"], content.get("normalizer") or {}
    for key, value in (("model.vocab", vocab), ("normalizer", normalizer)):
        if not isinstance(value, dict):
            raise ValueError(f"{name}: {key} is a {type(value).__name__}, expected an object")
    wrong = [token for token, number in vocab.items() if not isinstance(number, int) or number < 0]
    if wrong:
        raise ValueError(f"{name}: the vocabulary is damaged: the id of {wrong[0]!r} is {vocab[wrong[0]]!r}, no number")
    known = {k: normalizer[k] for k in ("clean_text", "handle_chinese_chars", "strip_accents") if k in normalizer}
    extra = {k: model[k] for k in ("continuing_subword_prefix", "max_input_chars_per_word") if k in model}
    return _build(dict(vocab), name, normalizer.get("lowercase", True), known, extra)


def _build(
    vocabulary: dict[str, int],
    name: str,
    lowercase: bool,
    normalizer: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> Tokenizer:
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(
            f"{name}: the vocabulary of {len(vocabulary)} tokens lacks {' '.join(missing)}, expected a BERT vocabulary "
            f"with {' '.join(SPECIAL_TOKENS)}"
        )
    model = {"max_input_chars_per_word": _MAX_WORD, **(model or {})}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", **model))
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase, **(normalizer or {}))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer
