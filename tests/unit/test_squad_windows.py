import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_pl.data import Answer, SquadExample, build_windows, load_wordpiece, read_squad
from slope_pl.data.squad_windows import answer_tokens
from tests.unit.test_squad_reading import SAMPLE, real_data


@pytest.fixture(scope="module")
def tokenizer():
    return load_wordpiece(SAMPLE / "vocab.txt")


def reference(example, tokenizer, max_length, doc_stride, max_question_length):
    """Windows one at a time, from the description of BERT's run_squad.py."""
    question = tokenizer.encode(example.question).ids[:max_question_length]
    context = tokenizer.encode(example.context)
    gold = example.answers[0]
    covering = [
        t
        for t, (a, b) in enumerate(context.offsets)
        if any(gold.start <= c < gold.start + len(gold.text) for c in range(a, b))
    ]
    room = max_length - len(question) - 3
    spans, start = [], 0
    while start < len(context.ids):
        length = min(room, len(context.ids) - start)
        spans.append((start, length))
        if start + length == len(context.ids):
            break
        start += min(length, doc_stride)
    cls, sep, pad = (tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]", "[PAD]"))
    windows = []
    for index, (start, length) in enumerate(spans):
        body = context.ids[start : start + length]
        ids = [cls, *question, sep, *body, sep]
        types = [0] * (len(question) + 2) + [1] * (length + 1)
        fill = [0] * (max_length - len(ids))
        positions = (0, 0)
        if covering and covering[0] >= start and covering[-1] < start + length:
            positions = tuple(t - start + len(question) + 2 for t in (covering[0], covering[-1]))
        own = []
        for token in range(start, start + length):
            scores = [
                min(token - s, s + n - 1 - token) + 0.01 * n if s <= token < s + n else float("-inf") for s, n in spans
            ]
            own.append(scores.index(max(scores)) == index)
        windows.append((ids + [pad] * len(fill), [1] * len(ids) + fill, types + fill, positions, own))
    return windows


def assert_like_reference(examples, tokenizer, **lengths):
    windows = build_windows(examples, tokenizer, **lengths)
    batch = windows.batch(range(len(windows)), positions=True)
    w = 0
    for e, example in enumerate(examples):
        own = windows.max_context(e)
        assert windows.first_window[e] == w
        for i, (ids, mask, types, positions, expected_own) in enumerate(reference(example, tokenizer, **lengths)):
            assert windows.example_of[w] == e
            assert batch["input_ids"][w].tolist() == ids
            assert batch["attention_mask"][w].tolist() == mask
            assert batch["token_type_ids"][w].tolist() == types
            assert (batch["start_positions"][w], batch["end_positions"][w]) == positions
            assert own[i].tolist() == expected_own
            w += 1
    assert w == len(windows) == windows.first_window[-1]
    assert batch["window_index"].tolist() == list(range(w))
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize(("max_length", "doc_stride"), [(384, 128), (128, 32), (96, 200)])
def test_windows_equal_the_slow_reference(tokenizer, max_length, doc_stride):
    examples = read_squad(SAMPLE, "dev")
    assert_like_reference(examples, tokenizer, max_length=max_length, doc_stride=doc_stride, max_question_length=64)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 6), st.integers(0, 12), st.data())
def test_any_lengths_equal_the_slow_reference(tokenizer, words, doc_stride, max_question_length, extra, data):
    context = " ".join(
        data.draw(st.lists(st.sampled_from(["ab", "é", "River", "1,9"]), min_size=words, max_size=words))
    )
    start = data.draw(st.integers(0, len(context) - 1))
    text = context[start : data.draw(st.integers(start + 1, len(context)))]
    example = SquadExample("i", "", context, "Which river is it?", (Answer(text, start),))
    lengths = {"max_length": max_question_length + 4 + extra, "doc_stride": doc_stride}
    assert_like_reference([example], tokenizer, **lengths, max_question_length=max_question_length)


def test_every_context_token_has_one_window_of_its_own(tokenizer):
    examples = read_squad(SAMPLE, "train")
    windows = build_windows(examples, tokenizer, max_length=100, doc_stride=20)
    for e in range(windows.questions):
        rows = range(*windows.first_window[e : e + 2])
        own = [windows.window_start[w] + np.flatnonzero(o) for w, o in zip(rows, windows.max_context(e), strict=True)]
        tokens = len(windows.context_spans[windows.context_of[e]])
        assert np.concatenate(own).tolist() == list(range(tokens))


def test_answers_inside_tokens_take_whole_tokens():
    spans = np.array([[0, 3], [3, 5], [6, 10]], np.int32)
    assert answer_tokens(spans, 0, 3) == (0, 0)
    assert answer_tokens(spans, 1, 3) == (0, 1)
    assert answer_tokens(spans, 5, 2) == (2, 2)
    assert answer_tokens(spans, 9, 1) == (2, 2)
    assert answer_tokens(spans, 5, 1) == (-1, -1)
    assert answer_tokens(spans[:0], 0, 4) == (-1, -1)


def test_tokens_end_after_their_accents(tokenizer):
    context = "\u0301Ole\u0301 a\u0302\u0323, e\u0301"
    windows = build_windows([SquadExample("i", "", context, "Who?", (Answer("a", 6),))], tokenizer, max_length=80)
    tokens = [context[a:b] for a, b in windows.context_spans[0]]
    assert "".join(tokens) == context[1:].replace(" ", "")
    assert [t for t in tokens if t.endswith(("\u0301", "\u0323"))] == [tokens[-4], "a\u0302\u0323", "e\u0301"]


def test_long_questions_are_cut_and_counted(tokenizer):
    example = SquadExample("i", "", "Lowick is cold.", "very " * 20 + "cold?", (Answer("Lowick", 0),))
    windows = build_windows([example, example], tokenizer, max_length=40, max_question_length=8)
    assert windows.truncated_questions == 2
    assert windows.context_offset(0) == 10


def test_a_context_without_tokens_still_has_a_window(tokenizer):
    example = SquadExample("i", "", "\x01\x02", "Which?", (Answer("\x01", 0),))
    windows = build_windows([example], tokenizer, max_length=80)
    batch = windows.batch([0], positions=True)
    assert batch["attention_mask"].sum() == windows.context_offset(0) + 1
    assert (batch["start_positions"].item(), batch["end_positions"].item()) == (0, 0)


def test_compact_and_picklable(tokenizer):
    windows = build_windows(read_squad(SAMPLE, "dev"), tokenizer)
    assert windows.context_tokens.flat.dtype == windows.question_tokens.flat.dtype == np.uint16
    assert len(windows.context_tokens) == 29
    copy = pickle.loads(pickle.dumps(windows))
    np.testing.assert_array_equal(copy.batch([5], True)["input_ids"], windows.batch([5], True)["input_ids"])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"max_length": 67}, r"max_length is 67, expected max_question_length \+ 4 = 68 or more"),
        ({"doc_stride": 0}, "doc_stride is 0, expected 1 or more tokens between the starts"),
        ({"max_question_length": 0}, "max_question_length is 0"),
    ],
)
def test_impossible_lengths(tokenizer, lengths, message):
    with pytest.raises(ValueError, match=message):
        build_windows(read_squad(SAMPLE, "dev"), tokenizer, **lengths)


def test_a_single_window_equals_transformers():
    import transformers

    path = real_data("tokenizers/bert-base-uncased-vocab.txt")
    examples = read_squad(real_data("squad/dev-v1.1.json"), "dev")[::97]
    windows = build_windows(examples, load_wordpiece(path))
    theirs = transformers.BertTokenizerFast(str(path), do_lower_case=True)
    compared = 0
    for e, example in enumerate(examples):
        if windows.first_window[e + 1] - windows.first_window[e] > 1:
            continue
        expected = theirs(example.question, example.context, padding="max_length", max_length=384)
        batch = windows.batch([int(windows.first_window[e])], positions=False)
        for key in ("input_ids", "attention_mask", "token_type_ids"):
            assert batch[key][0].tolist() == expected[key]
        compared += 1
    assert compared > 100


def test_window_counts_of_the_real_files():
    tokenizer = load_wordpiece(real_data("tokenizers/bert-base-uncased-vocab.txt"))
    for name, split, count in (("dev-v1.1", "dev", 10_833), ("train-v1.1.partial", "train", 8_329)):
        examples = read_squad(real_data(f"squad/{name}.json"), split)
        windows = build_windows(examples, tokenizer)
        assert len(windows) == count
        # Each gold answer fits into some window.
        assert len(np.unique(windows.example_of[windows.start_positions > 0])) == len(examples)
    assert_like_reference(examples[:40], tokenizer, max_length=384, doc_stride=128, max_question_length=64)
