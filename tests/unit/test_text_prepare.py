import json
import logging
import os
import pickle
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest
from filelock import FileLock

from slope_pl.data import LocalText, PackedTokens, ShardError, ShardIndex, TextFormatError, load_bpe, prepare_shards
from slope_pl.data import text_prepare as preparation
from slope_pl.data.text_packing import Packer, is_held_out
from tests.unit.test_squad_reading import real_data
from tests.unit.test_text_bpe import MERGES, tokenizer, toy, toy_vocabulary  # noqa: F401 - fixtures

WORDS = ["the", "inn", "in", "the", "thin", "air", "12", "ate\n\n", "it's"]


def some_documents(n=60, seed=0):
    rng = np.random.default_rng(seed)
    made = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) + f" {seed}-{i}" for i in range(n)]
    made[7 % n], made[n // 2] = "", " \n"
    return made


def write_corpus(path, documents):
    path.write_text("\0".join(documents), newline="")
    return path


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.txt", some_documents())


def prepare(folder, path, bpe, **options):
    options = {"val_fraction": 0.2, "shard_tokens": 500} | options
    separator = options.pop("separator", "\0")
    return prepare_shards(folder, LocalText(path, separator), bpe, **options)


def tokens_of(folder, index, split):
    packed = PackedTokens(folder, index, split)
    out = np.empty(len(packed), np.int64)
    packed.read(0, out)
    return out.tolist()


def split_at(tokens, mark):
    out = [[]]
    for token in tokens:
        out.append([]) if token == mark else out[-1].append(token)
    assert out.pop() == [], "the last document has its end-of-text token too"
    return out


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_come_back_in_order_between_separators(tmp_path, corpus, tokenizer, caplog):  # noqa: F811
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        index = prepare(tmp_path / "out", corpus, tokenizer)
    documents = [text for text in some_documents() if text.strip()]
    found = {}
    for split in ("train", "val"):
        rows = split_at(tokens_of(tmp_path / "out", index, split), tokenizer.end_of_text)
        found[split] = [tokenizer.decode(row) for row in rows]
        assert found[split] == [text for text in documents if is_held_out(text, 0.2) == (split == "val")]
        assert index.splits[split].documents == len(found[split]) > 5
    assert not set(found["train"]) & set(found["val"])
    sizes = [shard.tokens for shard in index.splits["train"].shards]
    assert sizes[:-1] == [500] * (len(sizes) - 1)
    assert len(sizes) > 5
    assert (index.documents_read, index.empty, index.complete) == (60, 2, True)
    assert index.characters == sum(map(len, documents))
    assert "2 empty documents left out" in caplog.text
    assert ShardIndex.load(tmp_path / "out") == index
    assert (tmp_path / "out" / "train-00000.bin").stat().st_size == 1000  # uint16


def test_reads_across_shards_and_pickles_small(tmp_path, corpus, tokenizer):  # noqa: F811
    index = prepare(tmp_path / "out", corpus, tokenizer, shard_tokens=50)
    packed = PackedTokens(tmp_path / "out", index, "train")
    whole = tokens_of(tmp_path / "out", index, "train")
    out = np.empty(170, np.int64)
    packed.read(30, out)
    assert out.tolist() == whole[30:200]
    for start in (-1, len(whole) - 169, len(whole)):
        with pytest.raises(IndexError, match=rf"tokens {start} to {start + 170} of {len(whole)} in "):
            packed.read(start, out)
    data = pickle.dumps(packed)
    assert data == pickle.dumps(PackedTokens(tmp_path / "out", index, "train")), "no memory map travels to data workers"
    pickle.loads(data).read(30, out)
    assert out.tolist() == whole[30:200]


def test_large_vocabularies_take_four_bytes(tmp_path, corpus, toy):  # noqa: F811
    vocab = json.loads((toy / "toy-encoder.json").read_text()) | {"<|endoftext|>": 70_000}
    folder = tmp_path / "large"
    shutil.copytree(toy, folder)
    (folder / "toy-encoder.json").write_text(json.dumps(vocab))
    large = load_bpe(folder)
    index = prepare(tmp_path / "out", corpus, large)
    assert (large.vocab_size, index.dtype) == (70_001, "<u4")
    assert tokens_of(tmp_path / "out", index, "train")[-1] == 70_000


def test_held_out_is_a_function_of_the_text():
    before, after = some_documents(400, seed=1), some_documents(400, seed=2)
    held = [text for text in before + after if is_held_out(text, 0.1)]
    assert 40 < len(held) < 130
    assert {text for text in before if is_held_out(text, 0.1)} == set(held) & set(before)
    assert {text for text in before if is_held_out(text, 0.05)} < set(held)
    assert not any(is_held_out(text, 0) for text in before)
    assert all(is_held_out(text, 1) for text in before)
    assert is_held_out("the inn", 0.1) == is_held_out("the inn", 0.1)
    # Another hash would move validation text into training when a corpus is prepared again.
    assert [i for i in range(8) if is_held_out(str(i), 0.5)] == [2, 4, 6]


def test_no_document_changes_sides_when_others_are_added(tmp_path, tokenizer):  # noqa: F811
    def sides(folder, documents):
        index = prepare(tmp_path / folder, write_corpus(tmp_path / f"{folder}.txt", documents), tokenizer)
        return {
            split: Counter(
                tuple(r) for r in split_at(tokens_of(tmp_path / folder, index, split), tokenizer.end_of_text)
            )
            for split in ("train", "val")
        }

    few = sides("few", some_documents(40, seed=3))
    more = sides("more", some_documents(40, seed=4) + some_documents(40, seed=3) * 2)
    for split in ("train", "val"):
        assert few[split] <= more[split]
    assert not more["train"].keys() & more["val"].keys()


# Interruption ---------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


class Stopping(LocalText):
    stop_at = None

    def documents(self, skip=0):
        for i, document in enumerate(super().documents(skip), skip):
            if i == self.stop_at:
                raise Stopped
            yield document


@pytest.mark.parametrize("batch", [1, 4])
def test_resumed_preparation_is_the_same_byte_for_byte(tmp_path, corpus, tokenizer, monkeypatch, batch, caplog):  # noqa: F811
    monkeypatch.setattr(preparation, "_BATCH_DOCUMENTS", batch)
    whole = tmp_path / "whole"
    prepare(whole, corpus, tokenizer)
    options = {"val_fraction": 0.2, "shard_tokens": 500}
    source = Stopping(corpus, "\0")
    encoded = []
    pack = Packer.pack_documents
    monkeypatch.setattr(Packer, "pack_documents", lambda self, t, *rest: encoded.extend(t) or pack(self, t, *rest))
    for stops in ([5], [31], [59], [13, 14, 40], range(60)):
        folder = tmp_path / f"resumed-{stops}"
        encoded.clear()
        for source.stop_at in stops:
            with pytest.raises(Stopped):
                prepare_shards(folder, source, tokenizer, **options)
        source.stop_at = None
        with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
            prepare_shards(folder, source, tokenizer, **options)
        assert files(folder) == files(whole)
        if stops == [59]:
            assert len(encoded) < 90, "finished shards are made again"
            assert "going on after" in caplog.text


def test_killed_between_any_two_file_operations(tmp_path, tokenizer, monkeypatch):  # noqa: F811
    corpus = write_corpus(tmp_path / "corpus.txt", some_documents(10))
    monkeypatch.setattr(preparation, "_BATCH_DOCUMENTS", 2)
    whole = tmp_path / "whole"
    prepare(whole, corpus, tokenizer, shard_tokens=120)
    assert not [name for name in files(whole) if "tail" in name or "tmp" in name]
    replace, left = os.replace, 0

    def replace_until(a, b):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped
        replace(a, b)

    folder, kills = tmp_path / "killed", 0
    monkeypatch.setattr(os, "replace", replace_until)
    for first in range(32):
        shutil.rmtree(folder, ignore_errors=True)
        left = first
        try:
            prepare(folder, corpus, tokenizer, shard_tokens=120)
        except Stopped:
            kills += 1
            left = 1000
            prepare(folder, corpus, tokenizer, shard_tokens=120)
        assert files(folder) == files(whole), first
    assert 12 < kills < 32


# What is noticed ------------------------------------------------------------------------------------------------------


def test_truncated_missing_and_changed_shards(tmp_path, corpus, tokenizer):  # noqa: F811
    folder = tmp_path / "out"
    prepare(folder, corpus, tokenizer)
    shard = folder / "train-00001.bin"
    good = shard.read_bytes()
    for content, message in (
        (good[:-3], r"the shard is truncated: 997 bytes, expected 1,000 \(500 tokens of 2 bytes\)"),
        (good + b"x", "the shard is too long: 1,001 bytes"),
        (b"\0\0" + good[2:], r"the shard is damaged: SHA-256 .*, expected "),
    ):
        shard.write_bytes(content)
        with pytest.raises(
            ShardError, match=rf"train-00001\.bin: {message}.*Copy it again, or delete the folder .*out to"
        ):
            prepare(folder, corpus, tokenizer)
    prepare(folder, corpus, tokenizer, verify=False)  # sizes alone
    shard.unlink()
    with pytest.raises(ShardError, match=r"train-00001\.bin: the shard is missing, expected 500 tokens"):
        prepare(folder, corpus, tokenizer, verify=False)


def test_damaged_index(tmp_path, corpus, tokenizer):  # noqa: F811
    folder = tmp_path / "out"
    prepare(folder, corpus, tokenizer)
    index = folder / "index.json"
    good = json.loads(index.read_text())
    for content, message in (
        (index.read_text()[:100], r"index\.json: the index is damaged \(JSONDecodeError.*delete the folder"),
        (json.dumps(good | {"version": 0}), r"index\.json: format version 0, this program reads 1; delete the folder"),
        (json.dumps(good | {"format": "x"}), "not an index of packed tokens"),
        (json.dumps(good | {"new": 1}), r"the index is damaged \(TypeError"),
        (json.dumps(good | {"splits": {}}), r"damaged .*splits \[\], expected \['train', 'val'\]"),
        ("[]", "the index is damaged"),
    ):
        index.write_text(content)
        with pytest.raises(ShardError, match=message):
            prepare(folder, corpus, tokenizer)


def test_changes_are_noticed(tmp_path, corpus, tokenizer):  # noqa: F811
    folder = tmp_path / "out"
    prepare(folder, corpus, tokenizer)
    other = load_bpe(toy_vocabulary(tmp_path / "other", MERGES[:-1]))
    with pytest.raises(
        ShardError, match=r"shards are of another tokeniser: fingerprint was .* and is .*, vocab_size was 265"
    ):
        prepare(folder, corpus, other)
    with pytest.raises(ShardError, match=r"made from something else than .*: separator was '\\x00' and is '\|'"):
        prepare(folder, corpus, tokenizer, separator="|")
    with pytest.raises(
        ShardError, match=r"val_fraction was 0\.2 and is 0\.3, shard_tokens was 500 and is 600\. Restore"
    ):
        prepare(folder, corpus, tokenizer, val_fraction=0.3, shard_tokens=600)
    os.utime(corpus, (1, 1))
    prepare(folder, corpus, tokenizer)  # another time alone is no change
    text = corpus.read_bytes().decode()
    corpus.write_text("T" + text[1:], newline="")
    with pytest.raises(ShardError, match=r"corpus\.txt was '\w{12} \(.* bytes\)' and is '\w{12} .*delete the folder"):
        prepare(folder, corpus, tokenizer)
    corpus.write_text(text, newline="")
    prepare(folder, corpus, tokenizer)


def test_changes_are_noticed_in_the_middle(tmp_path, corpus, tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(preparation, "_BATCH_DOCUMENTS", 4)
    source = Stopping(corpus, "\0")
    source.stop_at = 40
    with pytest.raises(Stopped):
        prepare_shards(tmp_path / "out", source, tokenizer, val_fraction=0.2, shard_tokens=500)
    write_corpus(corpus, some_documents(61))
    with pytest.raises(ShardError, match=r"corpus\.txt was"):
        prepare(tmp_path / "out", corpus, tokenizer)


@pytest.mark.parametrize("content", ["", "\0 \0\n"])
def test_nothing_to_train_on(tmp_path, tokenizer, content):  # noqa: F811
    path = tmp_path / "a.txt"
    path.write_text(content, newline="")
    with pytest.raises(TextFormatError, match=r"a\.txt: no text in it \(. documents, all of them empty\)"):
        prepare(tmp_path / "out", path, tokenizer)
    with pytest.raises(TextFormatError, match="no text in it"):
        prepare(tmp_path / "out", path, tokenizer)


def test_one_process_prepares_and_others_wait(tmp_path, corpus, tokenizer, caplog):  # noqa: F811
    held = threading.Event()

    def hold():
        with FileLock(tmp_path / "out.lock"):
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        assert prepare(tmp_path / "out", corpus, tokenizer).complete
    thread.join()
    assert "another process prepares" in caplog.text


def test_real_text(tmp_path):
    bpe = load_bpe(real_data("tokenizers/gpt2-encoder.json"))
    path = real_data("text/wikitext-2-raw/valid.txt.xz")
    index = prepare(tmp_path / "out", path, bpe, separator="\n", val_fraction=0.01, shard_tokens=1 << 16)
    assert (index.documents_read, index.splits["train"].documents + index.splits["val"].documents) == (3761, 2461)
    texts = [document.text for document in LocalText(path, "\n").documents() if document.text.strip()]
    rows = split_at(tokens_of(tmp_path / "out", index, "val"), 50256)
    assert [bpe.decode(row) for row in rows] == [text for text in texts if is_held_out(text, 0.01)]
    assert len(index.splits["train"].shards) == 4
