"""What is cut and remembered gives the same tokens as what goes through the tokeniser whole."""

import hashlib
import json
import pickle
import re
import string

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slope_pl.data import LocalText, load_bpe, load_sentence_tokenizer, split_sentences
from slope_pl.data import text_packing as packing
from slope_pl.data.mlm_sentences import LONGEST_SENTENCE
from slope_pl.data.text_packing import is_held_out
from slope_pl.data.text_sentences import _END, _RULE, RULES
from tests.unit.test_mlm_sentences import SPECIAL
from tests.unit.test_squad_reading import real_data
from tests.unit.test_text_bpe import tokenizer, toy  # noqa: F401 - fixtures

# White space of Unicode, of `str.split` alone, and what else is in the way of cutting.
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
STRANGE = SPACES + "\x00\x01\x1c\x1d\x1e\x1f\x7f\xad\u0300\u0301\u180e\u200b\u200d\ufeff\ufffd"
ORDINARY = "aeinstdrvlmthB12  \n.'\"-,!?…“”‘’—[](中。é"
texts = st.text(
    st.one_of(st.sampled_from(ORDINARY), st.sampled_from(STRANGE), st.characters(codec="utf-8")), max_size=80
)


def letters(folder, lowercase=True):
    """A vocabulary in which every character is a token, so that no difference hides behind [UNK]."""
    folder.mkdir(exist_ok=True)
    alone = [c for c in string.printable + ORDINARY + "éÉ" if not c.isspace()]
    characters = sorted({*alone, *(c.lower() for c in alone)} | {"in", "the", "st"})
    path = folder / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *characters, *(f"##{c}" for c in characters)]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    return path


@pytest.fixture(scope="session")
def wordpieces(tmp_path_factory):
    """Lower-cased, cased, one that keeps control characters, and one of lines."""
    folder = tmp_path_factory.mktemp("letters")
    lower = load_sentence_tokenizer(letters(folder / "lower"))
    content = json.loads(lower.encoder.to_str())
    content["normalizer"] |= {"clean_text": False, "strip_accents": False}
    (folder / "raw").mkdir()
    (folder / "raw" / "tokenizer.json").write_text(json.dumps(content))
    return {
        "lower": lower,
        "cased": load_sentence_tokenizer(letters(folder / "cased", lowercase=False)),
        "raw": load_sentence_tokenizer(folder / "raw"),
        "lines": load_sentence_tokenizer(letters(folder / "lower"), "lines"),
    }


def whole_sentences(wordpiece, text):
    """The definition: each sentence through the tokeniser, cut where it is too long, an end mark behind each part."""
    ids = []
    for sentence in split_sentences(text, wordpiece.sentences):
        row = wordpiece.encoder.encode(sentence, add_special_tokens=False).ids
        for cut in range(0, len(row), LONGEST_SENTENCE):
            ids += [*row[cut : cut + LONGEST_SENTENCE], wordpiece.sentence_end]
    return ids


def whole_text(bpe, text):
    return bpe.encoder.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(texts)
def test_sentences(wordpieces, text):
    for wordpiece in wordpieces.values():
        assert wordpiece.encode_batch([text]) == [whole_sentences(wordpiece, text)]


@settings(max_examples=300, deadline=None)
@given(texts)
def test_text(tokenizer, text):  # noqa: F811
    assert tokenizer.encode_batch([text]) == [whole_text(tokenizer, text)]


@settings(max_examples=300, deadline=None)
@given(st.one_of(texts, st.text(st.sampled_from("aelmdrstv1 \n'’-."), max_size=40)))
@example("it'll we've they're I'm he'd don't x's 'LL")
def test_texts_are_cut_where_the_pre_tokenizer_cuts_them(tokenizer, text):  # noqa: F811
    def words(part):
        return [part[a:b] for _, (a, b) in tokenizer.encoder.pre_tokenizer.pre_tokenize_str(part)]

    pieces = packing._SPACE_AND_WORD.findall(text)
    assert "".join(pieces) == text
    assert [word for piece in pieces for word in words(piece)] == words(text)
    for piece in pieces:
        parts = tokenizer.packer("<u2").parts(piece)
        assert list(parts) in ([piece], words(piece))


@pytest.mark.parametrize("character", [*STRANGE, *"é中1'’…–"], ids=lambda c: f"U+{ord(c):04X}")
def test_each_character_that_is_in_the_way(wordpieces, tokenizer, character):  # noqa: F811
    c = character
    text = f"a{c}b -{c}-  {c} {c}{c}  t{c}\n\n{c} 1{c} 2 {c}.{c} A {c} it'{c}s{c}"
    assert tokenizer.encode_batch([text]) == [whole_text(tokenizer, text)]
    for wordpiece in wordpieces.values():
        assert wordpiece.encode_batch([text]) == [whole_sentences(wordpiece, text)]


def test_real_vocabularies():
    text = real_data("text/wikitext-2-raw/valid.txt.xz")
    documents = [document.text for document in LocalText(text, "\n \n").documents()][:40]
    bpe = load_bpe(real_data("tokenizers/gpt2-encoder.json"))
    assert bpe.encode_batch(documents) == [whole_text(bpe, document) for document in documents]
    for sentences in ("prose", "lines"):
        wordpiece = load_sentence_tokenizer(real_data("tokenizers/bert-base-uncased-vocab.txt"), sentences)
        assert wordpiece.encode_batch(documents) == [whole_sentences(wordpiece, document) for document in documents]


def test_long_sentences_are_cut_and_empty_ones_leave_nothing(wordpieces):
    wordpiece = wordpieces["lower"]
    for words in (255, 256, 257, 512, 513):
        text = f"A{' a' * (words - 1)}\n\n\x01\n\nb"
        (ids,) = wordpiece.encode_batch([text])
        assert ids == whole_sentences(wordpiece, text)
        assert ids.count(wordpiece.sentence_end) == -(-words // LONGEST_SENTENCE) + 1


def test_long_texts_in_blocks(tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(packing, "_BLOCK", 100)
    text = "in the inn\t \n 12  it's" * 50
    packer = tokenizer.packer("<u2")
    blocks = list(packer.blocks(text))
    assert "".join(blocks) == text
    assert 5 < len(blocks) < 12
    assert tokenizer.encode_batch([text]) == [whole_text(tokenizer, text)]
    assert list(packer.blocks("x" * 1000)) == ["x" * 1000]


def test_a_tokenizer_that_needs_whole_texts_gets_them(tokenizer, tmp_path):  # noqa: F811
    content = json.loads(tokenizer.encoder.to_str())
    content["pre_tokenizer"]["use_regex"] = False
    content["added_tokens"] = [
        {"id": tokenizer.end_of_text, "content": "<|endoftext|>", "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
    ]  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    whole = load_bpe(tmp_path)
    assert not whole.can_be_cut
    text = "t  the inn's  the \n\nthe"
    assert whole.encode_batch([text]) == [whole_text(whole, text)] != tokenizer.encode_batch([text])


def test_documents_by_split_with_their_counts(tokenizer):  # noqa: F811
    documents = ["the inn", "", "in the", " \n", "12", "the inn"]
    packed = tokenizer.packer("<u4").pack_documents(documents, 0.5)
    assert (packed.empty, packed.characters) == (2, 22)
    for split in ("train", "val"):
        own = [d for d in documents if d.strip() and is_held_out(d, 0.5) == (split == "val")]
        ids = [i for d in own for i in (*whole_text(tokenizer, d), tokenizer.end_of_text)]
        assert own
        assert packed.tokens[split].tolist() == ids
        assert packed.tokens[split].dtype == np.dtype("<u4")
        assert packed.documents[split] == len(own)


def test_memory_is_bounded_and_what_is_forgotten_is_made_again(tokenizer, wordpieces, monkeypatch):  # noqa: F811
    monkeypatch.setattr(packing, "_MOST_PIECES", 5)
    text = "the inn in the thin air 12 ate it's\n\nthe end, “said” he. " * 9 + "a" * 500
    for bpe in (tokenizer, wordpieces["lower"]):
        packer = bpe.packer("<u2")
        (expected,) = bpe.encode_batch([text])
        for _ in range(2):
            assert packer.array(packer.pack(text)).tolist() == expected
            assert len(packer.pieces) <= 5
            assert len(packer.pieces.before) <= 5
            assert "a" * 500 not in packer.pieces, "a long piece hardly comes again"


def test_what_is_in_use_is_not_forgotten(tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(packing, "_MOST_PIECES", 8)
    packer, asked = tokenizer.packer("<u2"), []
    ids = packer.ids
    monkeypatch.setattr(packer, "ids", lambda piece: asked.append(piece) or ids(piece))
    packer.pack("".join(f" the a{chr(97 + i)}" for i in range(26)) * 2)
    assert asked.count(" the") == 1
    assert asked.count(" aa") == 2


def test_most_of_a_text_does_not_reach_the_tokenizer(tokenizer, wordpieces, monkeypatch):  # noqa: F811
    for bpe in (tokenizer, wordpieces["lower"]):
        packer, asked = bpe.packer("<u2"), []
        ids = packer.ids
        monkeypatch.setattr(packer, "ids", lambda piece, ids=ids, asked=asked: asked.append(piece) or ids(piece))
        packer.pack("the inn, in the inn. The inn “the” " * 20)
        assert len(asked) == len(set(asked)) < 16


def test_what_is_known_travels_to_other_processes(tokenizer, wordpieces):  # noqa: F811
    for bpe in (tokenizer, wordpieces["lower"]):
        packer = bpe.packer("<u2")
        expected = packer.pack("the inn, in the “inn”.")
        again = pickle.loads(pickle.dumps(packer))
        assert dict(again.pieces) == dict(packer.pieces) != {}
        assert again.pack("the inn, in the “inn”.") == expected
        assert again.pack("another one!\n\n") == packer.pack("another one!\n\n")


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("a.!?…。！？\n\r\t \"'”’»)]」』） "), max_size=40))
def test_ends_of_sentences_are_found_as_the_rule_says(text):
    def found(pattern):
        return [(match.span(), match.span(1)) for match in pattern.finditer(text)]

    assert found(_END) == found(re.compile(_RULE))


def test_rules_are_those_of_what_was_prepared_before():
    assert hashlib.sha256(RULES.encode()).hexdigest()[:16] == "b4d58bf90f541d98", "prepared folders would be refused"
