"""RoBERTa's byte-level BPE against transformers: ids, pairs, windows, and what BERT's stays."""

import json

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from slope_pl.data import (
    TASKS,
    Answer,
    DataUnavailableError,
    GlueExample,
    SquadExample,
    build_windows,
    load_pair_tokenizer,
    load_wordpiece,
)
from slope_pl.data.glue_rows import build_rows
from tests.unit.test_squad_reading import SAMPLE

TEXTS = ["The river  runs to the old king's house.", "Café naïve 日本語 👍🏽 \n x", " </s> <s>tagged<pad>", "a"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A RoBERTa tokeniser of the sample's text, in the files of the hub."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([(SAMPLE / "train.json").read_text()[:50_000]], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=30, pad_id=1, pad_token="<pad>")
    path = tmp_path_factory.mktemp("roberta")
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "pair").mkdir()
    tokenizer.model.save(str(path / "pair"))
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.RobertaTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), add_prefix_space=False)


def test_every_source_is_the_same_tokeniser(folder):
    found = [load_pair_tokenizer(source) for source in (folder, folder / "tokenizer.json", folder / "pair")]
    for tokenizer in found:
        assert (tokenizer.cls, tokenizer.sep, tokenizer.pad, tokenizer.middle) == (0, 2, 1, 2)
        assert tokenizer.vocab_size == 600
        assert [e.ids for e in tokenizer.encoder.encode_batch(TEXTS)] == [
            e.ids for e in found[0].encoder.encode_batch(TEXTS)
        ]


def test_pairs_are_those_of_transformers(folder, theirs):
    tokenizer = load_pair_tokenizer(folder)
    texts = [(a, b) for a in TEXTS for b in TEXTS if "<" not in a + b]  # theirs reads special tokens inside a text
    rows = build_rows([GlueExample(a, b, 0.0) for a, b in texts], TASKS["rte"], tokenizer, 120)
    batch = rows.batch(range(len(texts)))
    for i, (a, b) in enumerate(texts):
        ids = batch["input_ids"][i][batch["attention_mask"][i] == 1]
        assert ids.tolist() == theirs(a, b, truncation=False, padding=False)["input_ids"]
        assert (batch["input_ids"][i][batch["attention_mask"][i] == 0] == 1).all()
    one = build_rows([GlueExample(TEXTS[0], None, 0.0)], TASKS["cola"], tokenizer, 120).batch([0])
    assert one["input_ids"][0].tolist() == theirs(TEXTS[0], truncation=False, padding=False)["input_ids"]


def test_special_tokens_in_the_text_are_text(folder):
    ids = load_pair_tokenizer(folder).encoder.encode(TEXTS[2]).ids
    assert not {0, 1, 2} & set(ids)


def test_a_cut_pair_is_as_long_as_allowed(folder):
    row = build_rows([GlueExample("the king " * 9, "a", 0.0)], TASKS["rte"], load_pair_tokenizer(folder), 12)
    ids = row.batch([0])["input_ids"][0]
    assert (len(ids), ids[0], ids[-1]) == (12, 0, 2)
    assert [i for i, token in enumerate(ids) if token == 2] == [8, 9, 11]
    with pytest.raises(ValueError, match="max_length is 5, expected 6 or more for rte"):
        build_rows([GlueExample("a", "b", 0.0)], TASKS["rte"], load_pair_tokenizer(folder), 5)


def test_windows_hold_the_answer_and_are_those_of_transformers(folder, theirs):
    context = "The old  king's house. Café 日本語 by the river runs to the house of the king, and on. " * 3
    start = context.index("日本語 by")
    example = SquadExample("i", "", context, "Where is it?", (Answer("日本語 by", start),))
    windows = build_windows(
        [example], load_pair_tokenizer(folder), max_length=80, doc_stride=30, max_question_length=16
    )
    batch = windows.batch(range(len(windows)), positions=True)
    assert len(windows) > 1
    encoded = theirs(
        example.question, context, truncation="only_second", max_length=80, padding="max_length",
        stride=windows.window_length[0] - 30, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    assert batch["input_ids"].tolist() == encoded["input_ids"]
    assert batch["attention_mask"].tolist() == encoded["attention_mask"]
    offset = windows.context_offset(0)
    first, last = int(batch["start_positions"][0]), int(batch["end_positions"][0])
    spans = encoded["offset_mapping"][0]
    assert context[spans[first][0] : spans[last][1]] == "日本語 by"
    n = windows.window_length[0]
    assert np.array_equal(windows.context_spans[0][:n], spans[offset : offset + n])  # without the space before a word
    with pytest.raises(ValueError, match=r"expected max_question_length \+ 5 = 81"):
        build_windows([example], load_pair_tokenizer(folder), max_length=80, max_question_length=76)


def test_berts_is_as_before():
    tokenizer, bare = load_pair_tokenizer(SAMPLE / "vocab.txt"), load_wordpiece(SAMPLE / "vocab.txt")
    assert tokenizer.encoder.get_vocab() == bare.get_vocab()
    vocabulary = bare.get_vocab()
    assert tokenizer.cls == vocabulary["[CLS]"]
    assert (tokenizer.sep, tokenizer.pad, tokenizer.middle) == (vocabulary["[SEP]"], vocabulary["[PAD]"], 1)


def test_errors(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = []
    content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if k not in ("<s>", "<pad>")}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the vocabulary lacks <s> <pad>, expected <s> </s> <pad>"):
        load_pair_tokenizer(tmp_path)
    content["model"] = {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the model is 'Unigram', expected a WordPiece model"):
        load_pair_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_pair_tokenizer(tmp_path)
    with pytest.raises(DataUnavailableError, match="no vocabulary"):
        load_pair_tokenizer("./nowhere")
