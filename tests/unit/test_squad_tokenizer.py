import itertools
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from slope_pl.data import DataUnavailableError, load_wordpiece
from tests.unit.test_squad_reading import SAMPLE, real_data

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "cafe", "Cafe", "a", "##s", "sep", "the", "!", "中"]


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


def pieces(tokenizer, text):
    encoding = tokenizer.encode(text)
    return [(token, text[slice(*span)]) for token, span in zip(encoding.tokens, encoding.offsets, strict=True)]


def test_offsets_point_into_the_original_text(vocab):
    tokenizer = load_wordpiece(vocab)
    text = "The  Cafés!\u00a0cafe\u0301s\x07 中a"
    assert pieces(tokenizer, text) == [
        ("the", "The"), ("cafe", "Café"), ("##s", "s"), ("!", "!"), ("cafe", "cafe"), ("##s", "s"),
        ("中", "中"), ("a", "a"),
    ]  # fmt: skip


def test_special_tokens_in_the_text_are_text(vocab):
    assert [t for t, _ in pieces(load_wordpiece(vocab), "a [SEP]")] == ["a", "[", "sep", "]"]


def test_case_follows_the_config_next_to_the_vocabulary(vocab):
    (vocab.parent / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    for source in (vocab, vocab.parent):
        assert [t for t, _ in pieces(load_wordpiece(source), "Cafe")] == ["Cafe"]
    (vocab.parent / "tokenizer_config.json").write_text('{"do_lower_case": "no"}')
    with pytest.raises(ValueError, match="do_lower_case is 'no', expected true or false"):
        load_wordpiece(vocab)


def test_tokenizer_json_is_stripped_of_its_state(vocab, tmp_path):
    full = load_wordpiece(vocab)
    full.add_special_tokens(["[SEP]"])
    full.enable_truncation(2)
    full.enable_padding(length=9)
    folder = tmp_path / "model"
    folder.mkdir()
    full.save(str(folder / "tokenizer.json"))
    assert [t for t, _ in pieces(load_wordpiece(folder), "a [SEP]")] == ["a", "[", "sep", "]"]


class Hub:
    """Stands for the class Tokenizer, with a hub of its own."""

    def __init__(self, result):
        self.result = result

    def __call__(self, model):
        return Tokenizer(model)

    def from_pretrained(self, name):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_hub_models(vocab, monkeypatch):
    full = load_wordpiece(vocab)
    monkeypatch.setattr("slope_pl.data.tokenizer.Tokenizer", Hub(full))
    assert load_wordpiece("bert-large-uncased").get_vocab() == full.get_vocab()
    monkeypatch.setattr("slope_pl.data.tokenizer.Tokenizer", Hub(OSError("no route")))
    with pytest.raises(DataUnavailableError, match=r"tokeniser of 'bert-large-uncased' .*no route.*give a vocab\.txt"):
        load_wordpiece("bert-large-uncased")


def test_errors(tmp_path, vocab):
    with pytest.raises(DataUnavailableError, match=r"no vocabulary .*gone\.txt"):
        load_wordpiece(tmp_path / "gone.txt")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataUnavailableError, match=r"no tokenizer\.json or vocab\.txt in"):
        load_wordpiece(empty)
    other = empty / "vocab.txt"
    other.write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(ValueError, match=r"vocabulary of 3 tokens lacks \[CLS\] \[SEP\] \[MASK\]"):
        load_wordpiece(other)
    other.write_text("[PAD]\na\na\n")
    with pytest.raises(ValueError, match="line 3 repeats token 'a' of line 2"):
        load_wordpiece(other)
    other.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="damaged"):
        load_wordpiece(other)
    model = empty / "tokenizer.json"
    model.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_wordpiece(model)
    model.write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}}))
    with pytest.raises(ValueError, match="the model is 'BPE', expected a WordPiece model"):
        load_wordpiece(empty)


def test_pickles(vocab):
    tokenizer = pickle.loads(pickle.dumps(load_wordpiece(vocab)))
    assert pieces(tokenizer, "Cafés") == [("cafe", "Café"), ("##s", "s")]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_spans_are_ordered_and_inside_the_text(text):
    spans = load_wordpiece(SAMPLE / "vocab.txt").encode(text).offsets
    assert all(0 <= a < b <= len(text) for a, b in spans)
    assert all(one[0] <= two[0] and one[1] <= two[1] for one, two in itertools.pairwise(spans))


def test_ids_equal_those_of_transformers():
    import transformers

    path = real_data("tokenizers/bert-base-uncased-vocab.txt")
    theirs, ours = transformers.BertTokenizerFast(str(path), do_lower_case=True), load_wordpiece(path)
    article = json.loads(real_data("squad/dev-v1.1.json").read_bytes())["data"][1]
    texts = [paragraph["context"] for paragraph in article["paragraphs"]] + ["naïve Łódź — “x” 東京 e\u0301 \u200b½"]
    for text in texts:
        expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        got = ours.encode(text)
        assert got.ids == expected["input_ids"]
        assert got.offsets == [tuple(span) for span in expected["offset_mapping"]]
