"""Spans, pairs and masks: what Devlin et al. 2018 say of them, and what can be told from the words themselves."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_pl.data import LocalText, MlmPairs, PackedTokens, ShardError, load_sentence_tokenizer, prepare_shards
from slope_pl.data.mlm_pairs import IGNORED, IS_NEXT, IS_RANDOM, _truncate
from slope_pl.data.mlm_spans import build_spans, load_spans
from tests.unit.test_mlm_sentences import toy_documents, toy_place  # noqa: F401 - a fixture

LENGTH = 24


@pytest.fixture(scope="module")
def packed(toy_place, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("shards") / "out"
    tokenizer = load_sentence_tokenizer(toy_place / "vocab.txt")
    source = LocalText(toy_place / "corpus.txt", "\0")
    index = prepare_shards(folder, source, tokenizer, val_fraction=0, shard_tokens=300)
    return PackedTokens(folder, index, "train"), tokenizer


def make(packed, length=LENGTH, **options):
    tokens, tokenizer = packed
    spans = build_spans(tokens, tokenizer, length - 3)
    options = {"max_length": length, "max_predictions": 4, "seed": 0} | options
    return MlmPairs(tokens, spans, tokenizer, **options)


def places(packed, ids):
    """(document, sentence, word) of each id that is a word."""
    names = [packed[1].encoder.id_to_token(int(i)) for i in ids]
    return [tuple(map(int, re.findall(r"\d+", name))) for name in names if name != "."]


def every_word(packed):
    tokens = np.empty(len(packed[0]), np.int64)
    packed[0].read(0, tokens)
    return places(packed, tokens[tokens > 4])


# Spans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [2, 5, 21, 1000])
def test_spans_tile_the_documents_of_two_sentences_or_more(packed, room):
    tokens, tokenizer = packed
    spans = build_spans(tokens, tokenizer, room)
    counts = [text.count(".") for text in toy_documents()]
    usable = [d for d, n in enumerate(counts) if n >= 2]
    assert 1 in counts
    assert len(spans.ends) == len(usable)
    found = {d: [] for d in usable}
    for span in range(len(spans)):
        start, end = spans.bounds(span)
        ids = np.empty(end - start, np.int64)
        tokens.read(start, ids)
        text = [i for i in ids.tolist() if i > 4]
        words = places(packed, text)
        document = usable[spans.document(span)]
        assert {d for d, _, _ in words} == {document}
        sentences = sorted({s for _, s, _ in words})
        assert len(sentences) >= 2
        last = span + 1 == spans.first[spans.document(span) + 1]
        assert last or len(text) >= room
        # Without the last sentence there was room left, except where two are the least, or one was left over.
        shorter = [i for i in places(packed, text) if i[1] < sentences[-1]]
        assert len(sentences) == 2 or last or len(shorter) + len(sentences) - 1 < room
        found[document] += words
    assert [w for d in usable for w in found[d]] == [w for w in every_word(packed) if w[0] in usable]


def test_spans_are_stored_once_and_checked(packed, monkeypatch):
    tokens, tokenizer = packed
    built = load_spans(tokens, "train", tokenizer, 21, save=True)
    monkeypatch.setattr("slope_pl.data.mlm_spans.build_spans", lambda *_: pytest.fail("built again"))
    again = load_spans(tokens, "train", tokenizer, 21)
    for name in ("starts", "first", "ends"):
        assert np.array_equal(getattr(built, name), getattr(again, name))
    (file,) = tokens.folder.glob("spans-train-24-*.npy")
    content = file.read_bytes()
    for damaged in (content[:-8], content[:8], content + content[:8]):
        file.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"spans-train.* bytes, expected .*damaged. Delete it"):
            load_spans(tokens, "train", tokenizer, 21)
    file.unlink()


def test_a_read_only_folder_is_no_error(packed, monkeypatch):
    tokens, tokenizer = packed

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("slope_pl.data.mlm_spans.write_atomically", refuse)
    assert len(load_spans(tokens, "train", tokenizer, 30, save=True)) == len(build_spans(tokens, tokenizer, 30))


# Pairs ----------------------------------------------------------------------------------------------------------------


def drawn(packed, pairs, epochs=40):
    for epoch in range(epochs):
        for i in range(len(pairs)):
            a, b, label = pairs.pair(i, np.random.default_rng([pairs.seed, epoch, i]))
            yield i, places(packed, a), places(packed, b), label, len(a) + len(b)


@pytest.mark.parametrize("short", [0.0, 0.1, 1.0])
def test_labels_are_true_by_content_and_half_of_them_next(packed, short):
    pairs = make(packed, short_probability=short)
    order = {place: i for i, place in enumerate(every_word(packed))}
    labels = Counter()
    for _, a, b, label, length in drawn(packed, pairs):
        labels[label] += 1
        assert 2 <= length <= LENGTH - 3
        for segment in (a, b):  # each is one piece of one document
            where = [order[place] for place in segment]
            assert where == list(range(where[0], where[0] + len(where))) if where else True
            assert len({d for d, _, _ in segment}) <= 1
        if a and b:
            if label == IS_RANDOM:
                assert a[0][0] != b[0][0]
            else:
                assert a[0][0] == b[0][0]
                assert a[-1] < b[0]
    total = sum(labels.values())
    assert labels[IS_NEXT] / total == pytest.approx(0.5, abs=4 * 0.5 / total**0.5)


def test_before_truncation_the_next_segment_is_the_next_sentence(packed, monkeypatch):
    monkeypatch.setattr("slope_pl.data.mlm_pairs._truncate", lambda a, b, room, rng: (a, b))
    order = {place: i for i, place in enumerate(every_word(packed))}
    for _, a, b, label, _ in drawn(packed, make(packed), 10):
        if label == IS_NEXT:
            assert order[b[0]] == order[a[-1]] + 1
            assert b[0][1:] == (a[-1][1] + 1, 0)


def test_random_segments_come_from_everywhere_else(packed):
    pairs = make(packed)
    seen = {b[0][0] for _, _, b, label, _ in drawn(packed, pairs) if label == IS_RANDOM and b}
    assert len(seen) == len(pairs.spans.ends)


def test_pairs_are_full_but_for_the_share_of_short_ones(packed):
    def full(**options):
        pairs = make(packed, length=40, **options)
        rich = [i for i in range(len(pairs)) if np.diff(pairs.spans.bounds(i)) > 50]
        assert len(rich) > 5
        return np.mean([n == 37 for i, _, _, label, n in drawn(packed, pairs, 40) if i in rich and label == IS_NEXT])

    assert full(short_probability=0.0) == 1
    assert full(short_probability=0.1) == pytest.approx(0.92, abs=0.05)
    assert full(short_probability=1.0) < 0.4


@settings(max_examples=200)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(2, 40), st.integers(0, 2**32))
def test_truncation_is_that_of_the_published_program(n, m, room, seed):
    a, b = np.arange(n), np.arange(100, 100 + m)
    x, y = _truncate(a, b, room, np.random.default_rng(seed))
    left, right = n, m
    while left + right > room:  # truncate_seq_pair, token by token
        if left > right:
            left -= 1
        else:
            right -= 1
    assert (len(x), len(y)) == (left, right)
    for part in (x, y):
        assert part.tolist() == list(range(part[0], part[0] + len(part))) if len(part) else True


def test_truncation_takes_from_both_ends():
    starts = [_truncate(np.arange(20), np.arange(5), 15, np.random.default_rng(s))[0][0] for s in range(500)]
    assert min(starts) <= 2
    assert np.mean(starts) == pytest.approx(5, abs=0.3)  # of 10 that go


# Batches --------------------------------------------------------------------------------------------------------------


def test_batch_layout(packed):
    pairs = make(packed)
    index = list(range(len(pairs)))
    batch = pairs.__getitems__(index)
    sizes = {key: tuple(value.shape) for key, value in batch.items()}
    wide, narrow = (len(index), LENGTH), (len(index), 4)
    assert sizes == {
        "input_ids": wide, "attention_mask": wide, "token_type_ids": wide,
        "masked_positions": narrow, "masked_labels": narrow, "next_sentence_label": (len(index),),
        "pair_index": (len(index),),
    }  # fmt: skip
    assert batch["pair_index"].tolist() == index
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert pairs.ordinary.tolist() == list(range(5, packed[1].vocab_size))  # what random tokens are drawn from
    for row in range(len(index)):
        ids, kinds, mask = (batch[key][row] for key in ("input_ids", "token_type_ids", "attention_mask"))
        n = int(mask.sum())
        assert mask.tolist() == [1] * n + [0] * (LENGTH - n)
        assert (ids[n:] == pairs.pad).all()
        assert ids[0] == pairs.cls
        first, second = (ids[:n] == pairs.sep).nonzero().flatten().tolist()
        assert second == n - 1
        assert kinds.tolist() == [0] * (first + 1) + [1] * (n - first - 1) + [0] * (LENGTH - n)
    assert all(torch.equal(value[3], pairs[3][key]) for key, value in batch.items())


def test_labels_are_what_was_there(packed):
    pairs = make(packed)
    for epoch in range(5):
        batch = pairs.__getitems__([(epoch, i) for i in range(len(pairs))])
        for row in range(len(pairs)):
            positions = batch["masked_positions"][row][batch["masked_labels"][row] != IGNORED]
            labels = batch["masked_labels"][row][: len(positions)]
            assert (batch["masked_labels"][row][len(positions) :] == IGNORED).all()
            assert positions.tolist() == sorted(set(positions.tolist()))
            restored = batch["input_ids"][row].clone()
            restored[positions] = labels
            rng = np.random.default_rng([0, epoch, row])
            a, b, label = pairs.pair(row, rng)
            expected = [pairs.cls, *a, pairs.sep, *b, pairs.sep]
            assert restored[: len(expected)].tolist() == expected
            assert label == batch["next_sentence_label"][row]
            n = min(4, max(1, round(0.15 * len(expected))), len(a) + len(b))
            assert len(positions) == n


def test_masking_statistics():
    """100,000 chosen tokens: 15 % of them all, of which 80 % [MASK], 10 % random, 10 % kept; all places alike likely."""
    pairs = MlmPairs.__new__(MlmPairs)
    pairs.cls, pairs.sep, pairs.mask, pairs.pad, pairs.unknown = 2, 3, 4, 0, 1
    pairs.max_predictions, pairs.ordinary = 80, np.arange(5, 1005)
    length, n = 512, 1300
    chosen, fates, drawn_ids = np.zeros(length), Counter(), []
    for i in range(n):
        rng = np.random.default_rng(i)
        ids = rng.integers(5, 1005, length)
        ids[[0, 200, 511]], ids[50] = (2, 3, 3), 1
        before = ids.copy()
        positions, labels = pairs.hide(ids, length, rng)
        assert np.array_equal(before[positions], labels)
        assert len(positions) == 77 == round(0.15 * length)
        chosen[positions] += 1
        untouched = np.delete(np.arange(length), positions)
        assert np.array_equal(ids[untouched], before[untouched])
        now = ids[positions]
        fates["mask"] += int((now == 4).sum())
        fates["kept"] += int((now == labels).sum())
        drawn_ids += now[(now != 4) & (now != labels)].tolist()
    total = 77 * n
    assert chosen[[0, 200, 511, 50]].sum() == 0, "special tokens are never chosen"
    sigma = (total * 0.8 * 0.2) ** 0.5
    assert fates["mask"] == pytest.approx(0.8 * total, abs=4 * sigma)
    # A random token is the token itself once in a thousand.
    assert fates["kept"] == pytest.approx(total * (0.1 + 0.1 / 1000), abs=4 * (total * 0.09) ** 0.5)
    assert len(drawn_ids) == pytest.approx(0.1 * total, abs=4 * (total * 0.09) ** 0.5)
    counts = np.bincount(drawn_ids, minlength=1005)
    assert counts[:5].sum() == 0, "random tokens are never special"
    expected = len(drawn_ids) / 1000
    assert ((counts[5:] - expected) ** 2 / expected).sum() < 1000 + 5 * 2000**0.5  # chi-squared
    others = np.delete(chosen, [0, 50, 200, 511])
    share = total / 508
    assert ((others - share) ** 2 / share).sum() < 508 + 5 * 1016**0.5


@pytest.mark.parametrize(("length", "expected"), [(128, 19), (130, 20), (200, 20), (3, 0), (4, 1)])
def test_number_of_predictions(length, expected):
    pairs = MlmPairs.__new__(MlmPairs)
    pairs.cls, pairs.sep, pairs.mask, pairs.unknown, pairs.max_predictions = 2, 3, 4, 1, 20
    pairs.ordinary = np.arange(5, 9)
    ids = np.full(256, 6)
    ids[0], ids[1], ids[length - 1] = 2, 3, 3
    positions, _ = pairs.hide(ids, length, np.random.default_rng(0))
    assert len(positions) == expected


def test_everything_drawn_is_a_function_of_seed_epoch_and_index(packed):
    pairs = make(packed)
    whole = pairs.__getitems__([(e, i) for e in range(2) for i in range(10)])
    again = make(packed).__getitems__([(e, i) for e in (1, 0) for i in reversed(range(10))])
    for key in whole:
        assert torch.equal(whole[key], again[key].flip(0))
    for other in (make(packed, seed=1).__getitems__(range(10)), pairs.__getitems__([(1, i) for i in range(10)])):
        same = (whole["input_ids"][:10] == other["input_ids"]).all(1)
        assert same.sum() < 3
    assert all(torch.equal(whole[k][:10], v) for k, v in pairs.__getitems__(range(10)).items())  # a bare index: epoch 0
