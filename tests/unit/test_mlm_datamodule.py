"""MlmDataModule: order, resume, ranks, preparation that is interrupted or damaged, bad settings."""

import copy
import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from slope_pl.data import MlmDataModule, MlmPairs, ShardError, TextDataModule
from slope_pl.data.mlm_datamodule import PairLoader, PairSampler
from slope_pl.data.text_prepare import _Writer
from tests.unit.test_mlm_sentences import toy_documents, toy_place, write_vocabulary  # noqa: F401 - a fixture
from tests.unit.test_text_datamodule import pytestmark as filters
from tests.unit.test_text_datamodule import trainer

pytestmark = filters


@pytest.fixture
def text(toy_place):  # noqa: F811
    def make(**options):
        options = {
            "source": str(toy_place / "corpus.txt"), "tokenizer": str(toy_place / "vocab.txt"), "separator": "\0",
            "max_length": 24, "max_predictions": 4, "batch_size": 4, "eval_batch_size": 3, "val_fraction": 0.25,
            "shard_tokens": 300, "cache_dir": str(toy_place / "cache"),
        } | options  # fmt: skip
        return MlmDataModule(**options)

    return make


@pytest.fixture
def ready(text):
    def make(**options):
        module = text(**options)
        module.prepare_data()
        module.setup()
        return module

    return make


def rows(batch):
    return {key: value.tolist() for key, value in batch.items()}


def seen(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [rows(batch) for batch in loader]


def loader_of(module, ranks=1, rank=0, **options):
    sampler = PairSampler(module.train_pairs, ranks, rank, module.seed)
    options = {"batch_size": 4, "drop_last": True, "collate_fn": same} | options
    return PairLoader(module.train_pairs, sampler=sampler, **options)


def same(batch):
    return batch


def test_batches_of_an_epoch(ready):
    module = ready()
    whole = seen(module.train_dataloader())
    assert len(whole) == len(module.train_dataloader()) == len(module.train_pairs) // 4 > 8
    assert whole == seen(ready().train_dataloader())
    assert whole == seen(ready(num_workers=2).train_dataloader())
    assert whole != seen(module.train_dataloader(), 1)
    assert whole[0] not in seen(ready(seed=1).train_dataloader())
    held = [rows(batch) for batch in module.val_dataloader()]
    assert held == [rows(batch) for batch in module.val_dataloader()]
    assert sum(len(batch["input_ids"]) for batch in held) == len(module.val_pairs) > 3
    assert module.vocab_size == module.load_tokenizer().encoder.get_vocab_size()


def test_held_out_documents_are_not_trained_on(ready):
    module = ready()
    special = set(range(6))  # with the full stop

    def documents(pairs):
        names = pairs.__getitems__(range(len(pairs)))["input_ids"].unique().tolist()
        encoder = module.load_tokenizer().encoder
        return {encoder.id_to_token(i).split("s")[0] for i in names if i not in special}

    # 10 % of the hidden tokens are drawn from the whole vocabulary: look at the segments before that.
    for pairs in (module.train_pairs, module.val_pairs):
        pairs.ordinary = pairs.ordinary[:1]
    train, val = documents(module.train_pairs), documents(module.val_pairs)
    assert not train & val
    assert len(train | val) == len([t for t in toy_documents() if t.count(".") > 1])


def test_an_epoch_visits_other_masks_of_the_same_examples(ready):
    module = ready()
    first, second = (module.train_pairs.__getitems__([(e, i) for i in range(20)]) for e in (0, 1))
    same_place = (first["masked_positions"] == second["masked_positions"]).all(1)
    assert same_place.float().mean() < 0.3


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_are_disjoint_and_cover(ready, ranks):
    pairs = ready().train_pairs

    def order(rank):
        sampler = PairSampler(pairs, ranks, rank, 5)
        sampler.set_epoch(3)
        return list(sampler)

    shares = [order(rank) for rank in range(ranks)]
    every = [index for share in shares for index in share]
    assert {epoch for epoch, _ in every} == {3}
    assert len(set(every)) == len(every) == len(pairs) - len(pairs) % ranks


@pytest.mark.parametrize(("workers", "rank"), [(0, 0), (2, 1)])
def test_loader_goes_on_after_any_batch_without_making_the_others(ready, workers, rank, monkeypatch):
    module = ready()
    whole = {epoch: seen(loader_of(module, 2, rank), epoch) for epoch in (1, 2)}
    first = loader_of(module, 2, rank, num_workers=workers)
    first.sampler.set_epoch(1)
    iterator = iter(first)
    made, make = [], MlmPairs.__getitems__
    monkeypatch.setattr(MlmPairs, "__getitems__", lambda self, i: made.append(1) or make(self, i))
    for done in range(1, 4):
        next(iterator)
        state = copy.deepcopy(first.state_dict())
        again = loader_of(module, 2, rank, num_workers=workers)
        again.load_state_dict(state)
        made.clear()
        assert seen(again, 1) == whole[1][done:]
        assert workers or len(made) == len(whole[1]) - done
        assert seen(again, 2) == whole[2]


def test_a_changed_layout_is_refused_in_the_middle_of_an_epoch(ready):
    loader = loader_of(ready())
    next(iter(loader))
    state = loader.state_dict()
    for other, message in (
        (loader_of(ready(), batch_size=8), "batch_size was 4 and is 8"),
        (loader_of(ready(), 2), "ranks was 1 and is 2"),
        (loader_of(ready(seed=1)), "seed was 0 and is 1"),
        (loader_of(ready(max_length=20)), "max_length was 24 and is 20"),
        (loader_of(ready(max_predictions=5)), "max_predictions was 4 and is 5"),
        (loader_of(ready(short_probability=0.2)), r"short_probability \(ppm\) was 100000 and is 200000"),
        (loader_of(ready(val_fraction=0.5)), r"tokens' checksum was \d+ and is \d+"),
    ):
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=rf"middle of epoch 0, after batch 1, but .*{message}"):
            seen(other)


class Recorder(pl.LightningModule):
    """Learns one number and remembers what it saw."""

    def __init__(self, folder=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.folder = [], folder

    def training_step(self, batch, _):
        self.seen.append((self.current_epoch, rows(batch)))
        return (self.weight - batch["input_ids"].float().mean()).square()

    def validation_step(self, batch, _):
        assert batch["input_ids"].shape[1] == 24

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

    def on_train_end(self):
        if self.folder:
            torch.save(self.seen, f"{self.folder}/seen-{self.global_rank}")


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_fit_sees_exactly_what_was_left(tmp_path, text, workers):
    def keep(folder):
        return ModelCheckpoint(tmp_path / folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")

    options = {"accumulate_grad_batches": 2}
    whole = Recorder()
    trainer(tmp_path, callbacks=[keep("kept")], **options).fit(whole, text(num_workers=workers))
    assert len(whole.seen) > 16
    for checkpoint in sorted((tmp_path / "kept").glob("*.ckpt"))[:: 3 if workers else 1]:
        done = torch.load(checkpoint, weights_only=False)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        again = Recorder()
        trainer(tmp_path, callbacks=[keep("again")], **options).fit(
            again, text(num_workers=workers), ckpt_path=checkpoint, weights_only=False
        )
        assert again.seen == whole.seen[done["ready"] :], checkpoint.name
        assert torch.equal(again.weight, whole.weight)


@pytest.mark.distributed
def test_two_ranks(tmp_path, text, ready):
    # Prepared by rank 0 while rank 1 waits for it: nothing is in the cache yet.
    pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, enable_checkpointing=False,
    ).fit(Recorder(str(tmp_path)), text(cache_dir=str(tmp_path / "cache")))  # fmt: skip
    both = [torch.load(tmp_path / f"seen-{rank}") for rank in range(2)]
    expected = ready()
    for rank, found in enumerate(both):
        assert found == [(e, batch) for e in (0, 1) for batch in seen(loader_of(expected, 2, rank), e)]
    inputs = [{tuple(row) for _, batch in found for row in batch["input_ids"]} for found in both]
    assert not inputs[0] & inputs[1]


# Preparation ----------------------------------------------------------------------------------------------------------


def test_both_phases_read_the_same_shards(ready, monkeypatch):
    first = ready()
    monkeypatch.setattr(_Writer, "write", lambda *_: pytest.fail("prepared again"))
    second = ready(max_length=48, max_predictions=8)
    assert second.folder == first.folder
    assert len(second.train_pairs) < len(first.train_pairs)
    assert len(list(first.folder.glob("spans-*.npy"))) >= 4


def test_interrupted_preparation_goes_on_to_the_same_bytes(text, ready, tmp_path, monkeypatch):
    whole = ready(cache_dir=str(tmp_path / "whole"))
    stopped = text(cache_dir=str(tmp_path / "stopped"))
    monkeypatch.setattr("slope_pl.data.text_prepare._BATCH_DOCUMENTS", 7)
    commits, commit = [], _Writer._commit

    def stop(self):
        commit(self)
        commits.append(1)
        if len(commits) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Writer, "_commit", stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.prepare_data()
    assert json.loads((stopped.folder / "index.json").read_text())["documents_read"] > 0
    with pytest.raises(ShardError, match="preparation is not finished"):
        stopped.setup()
    stopped.prepare_data()
    content = [{p.name: p.read_bytes() for p in m.folder.iterdir()} for m in (whole, stopped)]
    assert content[0] == content[1]
    stopped.setup()
    assert seen(stopped.train_dataloader()) == seen(whole.train_dataloader())


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
def test_damaged_shards_are_named(text, ready, tmp_path, damage):
    module = ready(cache_dir=str(tmp_path))
    shard = module.folder / "train-00001.bin"
    content = shard.read_bytes()
    match damage:
        case "truncated":
            shard.write_bytes(content[:-2])
        case "missing":
            shard.unlink()
        case "changed":
            shard.write_bytes(content[:-2] + b"\x07\x00")
    again = text(cache_dir=str(tmp_path))
    with pytest.raises(ShardError, match=rf"train-00001\.bin: the shard is {damage.replace('changed', 'damaged')}"):
        again.prepare_data()
    if damage != "changed":  # which only prepare_data looks at
        with pytest.raises(ShardError, match=r"train-00001\.bin"):
            again.setup()


def test_settings_that_make_other_shards_have_other_folders(text):
    folders = {
        text(**options).folder
        for options in (
            {},
            {"sentences": "lines"},
            {"rows_per_document": 3},
            {"val_fraction": 0.1},
            {"separator": None},
        )
    }
    assert len(folders) == 5
    assert text(max_length=99, seed=7, batch_size=2).folder in folders


def test_a_prepared_folder_is_a_source_for_the_same_way_to_split_alone(ready, toy_place, tmp_path):  # noqa: F811
    first = ready()
    again = ready(source=str(first.folder), separator=None)
    assert seen(again.train_dataloader()) == seen(first.train_dataloader())
    for options in ({"sentences": "lines"}, {"tokenizer": str(write_vocabulary(tmp_path / "v.txt", ["a b"]))}):
        with pytest.raises(ShardError, match="shards are of another tokeniser"):
            ready(source=str(first.folder), separator=None, **options)


def test_shards_of_gpt2_are_refused(ready, toy_place, tmp_path):  # noqa: F811
    from tests.unit.test_text_bpe import toy_vocabulary

    (tmp_path / "a.txt").write_text("the inn in the thin air\0" * 40)
    gpt2 = TextDataModule(
        str(tmp_path / "a.txt"), str(toy_vocabulary(tmp_path / "bpe")), separator="\0", val_fraction=0.0,
        cache_dir=str(tmp_path / "cache"), context=4,
    )  # fmt: skip
    gpt2.prepare_data()
    with pytest.raises(ShardError, match="shards are of another tokeniser"):
        ready(source=str(gpt2.folder), separator=None, val_fraction=0.0)


def test_rows_of_one_sentence_make_documents_together(ready, toy_place, tmp_path):  # noqa: F811
    sentences = [part.strip() + "." for text in toy_documents() for part in text.split(".") if part.strip()]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    options = {"source": str(file), "separator": None, "sentences": "lines", "cache_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"0 of the .* documents of the train split have two sentences or more"):
        ready(**options)
    module = ready(**options, rows_per_document=10)
    assert sum(split.documents for split in module.index.splits.values()) == -(-len(sentences) // 10)
    assert len(module.train_pairs) > 20


# What is asked for and what is there ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 7}, ValueError, "max_length is 7, expected 8 or more"),
        ({"max_length": 24.0}, TypeError, "max_length is 24.0, expected an integer"),
        ({"max_predictions": 0}, ValueError, "max_predictions is 0, expected 1 or more"),
        ({"max_predictions": 25}, ValueError, "max_predictions is 25, expected max_length=24 or less"),
        ({"rows_per_document": 0}, ValueError, "rows_per_document is 0, expected 1 or more"),
        ({"short_probability": 1.5}, ValueError, "short_probability is 1.5, expected a share from 0 to 1"),
        ({"short_probability": "x"}, TypeError, "short_probability is 'x', expected a number"),
        ({"sentences": "words"}, ValueError, "sentences is 'words', expected 'prose' or 'lines'"),
        ({"batch_size": 0}, ValueError, "batch_size is 0, expected 1 or more"),
        ({"val_fraction": 1.0}, ValueError, "val_fraction is 1.0"),
        ({"seed": -1}, ValueError, "seed is -1, expected 0 or more"),
    ],
)
def test_bad_values(text, options, error, message):
    with pytest.raises(error, match=message):
        text(**options)


def test_what_is_missing(text, ready, tmp_path):
    with pytest.raises(ShardError, match=r"no prepared text in .*; call prepare_data\(\) first"):
        text(cache_dir=str(tmp_path)).setup()
    with pytest.raises(RuntimeError, match=r"train_pairs is not there yet: call prepare_data\(\) and setup\(\)"):
        text().train_dataloader()
    with pytest.raises(ValueError, match=r"expected 40,000 or more: a batch of 40000 for each of 1 ranks"):
        ready(batch_size=40000)
    with pytest.raises(ValueError, match=r"0 of the 0 documents of the val split .* Raise val_fraction"):
        ready(val_fraction=1e-9)
    module = ready(val_fraction=0.0)
    assert (module.val_dataloader(), len(module.val_pairs)) == ([], 0)
    (tmp_path / "one.txt").write_text("D0s0w0 d0s0w1. D1s0w0.")
    with pytest.raises(ValueError, match=r"1 of the 1 documents of the train split.*A file is one document unless"):
        ready(source=str(tmp_path / "one.txt"), separator=None, val_fraction=0.0)
