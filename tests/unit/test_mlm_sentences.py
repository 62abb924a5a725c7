"""Sentences and how they lie in shards; the toy corpus of the other tests of masked language modelling."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slope_pl.data import LocalText, PackedTokens, load_sentence_tokenizer, prepare_shards, split_sentences
from slope_pl.data.mlm_sentences import LONGEST_SENTENCE, GroupedText
from slope_pl.data.text_sources import Document

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word(document: int, sentence: int, position: int) -> str:
    return f"d{document}s{sentence}w{position}"


def toy_documents(documents: int = 40, most: int = 9) -> list[str]:
    """Documents in which every word occurs once, so that its id says where it is from; 1 to ``most`` sentences each."""
    rng = np.random.default_rng(0)
    made = []
    for d in range(documents):
        lengths = rng.integers(1, 12, rng.integers(1, most + 1))
        made.append(" ".join(sentence(d, s, n) for s, n in enumerate(lengths)))
    return made


def sentence(document: int, number: int, words: int) -> str:
    return " ".join(word(document, number, w) for w in range(words)).capitalize() + "."


def write_vocabulary(path, documents: list[str]):
    words = re.findall(r"\w+", " ".join(documents).lower())
    assert len(set(words)) == len(words)
    path.write_text("\n".join([*SPECIAL, ".", *words]) + "\n")
    return path


@pytest.fixture(scope="session")
def toy_place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlm")
    documents = toy_documents()
    (folder / "corpus.txt").write_text("\0".join(documents))
    write_vocabulary(folder / "vocab.txt", documents)
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He came. She saw! Who won? Nobody...", ["He came.", "She saw!", "Who won?", "Nobody..."]),
        ('"Go." She went. (He did not.) Then', ['"Go."', "She went.", "(He did not.)", "Then"]),
        ('"What?" he asked. “No!” said she.', ['"What?" he asked.', "“No!” said she."]),
        ("Mr. J. Smith met Dr. Who. Fine.", ["Mr. J. Smith met Dr. Who.", "Fine."]),
        ("It cost 3.50 in 1850. Then 4.", ["It cost 3.50 in 1850.", "Then 4."]),
        ("A line\nthat is wrapped. Next\n\nHeading\n \nText", ["A line\nthat is wrapped.", "Next", "Heading", "Text"]),
        ("end.\r\n\r\nof a paragraph", ["end.", "of a paragraph"]),
        ("これは。はい！「え？」と", ["これは。", "はい！", "「え？」", "と"]),
        (" \n\n ", []),
        ("", []),
    ],
)
def test_prose(text, expected):
    assert split_sentences(text) == expected


def test_lines():
    assert split_sentences("one. Two\n\n three \n", "lines") == ["one. Two", "three"]


@given(st.text(alphabet="aA.!? \n\"')。5é", max_size=60))
def test_no_character_is_lost_and_no_sentence_is_empty(text):
    for kind in ("prose", "lines"):
        found = split_sentences(text, kind)
        assert all(part == part.strip() != "" for part in found)
        assert "".join("".join(found).split()) == "".join(text.split())


def test_sentences_and_documents_have_their_marks_in_the_shards(toy_place, tmp_path):
    tokenizer = load_sentence_tokenizer(toy_place / "vocab.txt")
    assert tokenizer.special == (0, 1, 2, 3, 4)
    index = prepare_shards(
        tmp_path / "out", LocalText(toy_place / "corpus.txt", "\0"), tokenizer, val_fraction=0, shard_tokens=300
    )
    packed = PackedTokens(tmp_path / "out", index, "train")
    tokens = np.empty(len(packed), np.int64)
    packed.read(0, tokens)
    text = " ".join(tokenizer.encoder.id_to_token(token) for token in tokens.tolist())
    documents = [part.strip() for part in text.split("[PAD]")]
    assert documents.pop() == ""
    expected = [
        " ".join(f"{part.lower()} . [SEP]" for part in text.split(".")[:-1]).replace("  ", " ")
        for text in toy_documents()
    ]
    assert documents == expected


def test_special_tokens_in_the_text_are_text_and_long_sentences_are_cut(toy_place):
    tokenizer = load_sentence_tokenizer(toy_place / "vocab.txt")
    (ids,) = tokenizer.encode_batch(["[SEP] [PAD] [MASK] d0s0w0"])
    assert ids.count(tokenizer.sentence_end) == 1
    assert set(ids[:-1]) & set(tokenizer.special) == {tokenizer.unknown}
    (ids,) = tokenizer.encode_batch(["d0s0w0 " * 600])
    ends = np.flatnonzero(np.array(ids) == tokenizer.sentence_end)
    assert ends.tolist() == [LONGEST_SENTENCE, 2 * LONGEST_SENTENCE + 1, 602]
    assert tokenizer.encode_batch(["", " "]) == [[], []]


def test_fingerprint_knows_how_sentences_are_split(toy_place):
    prose, lines = (load_sentence_tokenizer(toy_place / "vocab.txt", kind) for kind in ("prose", "lines"))
    assert prose.fingerprint != lines.fingerprint
    assert prose.fingerprint == load_sentence_tokenizer(toy_place / "vocab.txt").fingerprint


class Rows:
    name, unit, total = "rows", " documents", 7

    def fingerprint(self, known=None):
        return {"kind": "rows"}

    def documents(self, skip=0):
        return iter([Document(f"row\n{i}", f"row {i}", i + 1) for i in range(skip, 7)])


def test_rows_are_grouped_and_skipped_by_group():
    grouped = GroupedText(Rows(), 3)
    whole = list(grouped.documents())
    assert [(d.text, d.done) for d in whole] == [
        ("row 0\nrow 1\nrow 2", 3), ("row 3\nrow 4\nrow 5", 6), ("row 6", 7),
    ]  # fmt: skip
    assert list(grouped.documents(1)) == whole[1:]
    assert grouped.fingerprint() == {"kind": "rows", "rows_per_document": 3}
