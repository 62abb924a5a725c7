import copy
import logging
import pickle
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from slope_pl.data import DataUnavailableError, ShardError, TextDataModule, TokenWindows
from slope_pl.data.text_datamodule import WindowLoader, WindowSampler
from tests.unit.test_text_bpe import MERGES, tokenizer, toy, toy_vocabulary  # noqa: F401 - fixtures
from tests.unit.test_text_prepare import some_documents, tokens_of, write_corpus

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers which may be a bottleneck"),
    pytest.mark.filterwarnings("ignore:You are using `torch.load`"),
    pytest.mark.filterwarnings(
        "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"
    ),  # Lightning with torch 2.13
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    # Python 3.12 on: forking data workers from a process with threads
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_corpus(folder / "corpus.txt", some_documents(40))
    return folder


@pytest.fixture
def text(place, toy):  # noqa: F811
    def make(**options):
        options = {
            "context": 32, "batch_size": 4, "eval_batch_size": 3, "val_fraction": 0.2, "shard_tokens": 500,
            "separator": "\0", "cache_dir": str(place / "cache"),
        } | options  # fmt: skip
        return TextDataModule(**({"source": str(place / "corpus.txt"), "tokenizer": str(toy)} | options))

    return make


@pytest.fixture
def ready(text):
    def make(**options):
        module = text(**options)
        module.prepare_data()
        module.setup()
        return module

    return make


def test_windows(ready, tokenizer):  # noqa: F811
    module = ready()
    tokens = tokens_of(module.folder, module.index, "train")
    windows = module.train_windows
    assert len(windows) == (len(tokens) - 1) // 32 > 40
    assert len(tokens) > 2 * module.shard_tokens, "windows must cross shards for this test to say something"
    batch = windows.__getitems__(list(range(len(windows))))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        key: (torch.int64, (len(windows), 32)) for key in ("input_ids", "targets")
    } | {"window_index": (torch.int64, (len(windows),))}
    assert windows.__getitems__([7, 3])["window_index"].tolist() == [7, 3]
    assert batch["input_ids"].flatten().tolist() == tokens[: len(windows) * 32]
    assert batch["targets"].flatten().tolist() == tokens[1 : len(windows) * 32 + 1]
    assert torch.equal(windows[5]["targets"], batch["targets"][5])
    assert module.vocab_size == tokenizer.vocab_size
    assert len({tuple(row) for row in batch["input_ids"].tolist()}) == len(windows), (
        "other tests tell windows by content"
    )


def test_batches(ready):
    module = ready()
    order = seen(module.train_dataloader())
    assert {len(batch) for batch in order} == {4}
    assert len(order) == len(module.train_dataloader()) == len(module.train_windows) // 4
    flat = [row for batch in order for row in batch]
    every = module.train_windows.__getitems__(range(len(module.train_windows)))["input_ids"].tolist()
    assert flat != every[: len(flat)]
    assert len(set(map(tuple, flat))) == len(flat)
    assert set(map(tuple, flat)) <= set(map(tuple, every))
    held = [row for batch in module.val_dataloader() for row in batch["input_ids"].tolist()]
    assert held == module.val_windows.__getitems__(range(len(module.val_windows)))["input_ids"].tolist()
    assert len(held) == len(module.val_windows) > 3


def test_one_token_windows_and_none(ready):
    assert len(ready(context=1).train_windows) == len(ready().train_windows.tokens) - 1
    module = ready(val_fraction=0)
    assert (module.val_dataloader(), len(module.val_windows)) == ([], 0)
    assert len(TokenWindows(module.val_windows.tokens, 1)) == 0


# The order ------------------------------------------------------------------------------------------------------------


def seen(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [batch["input_ids"].tolist() for batch in loader]


@pytest.mark.parametrize("n", [48, 50])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_are_disjoint_and_cover(n, ranks):
    def order(rank, seed=3, epoch=2):
        sampler = WindowSampler(range(n), ranks, rank, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == n // ranks
        return list(sampler)

    shares = [order(rank) for rank in range(ranks)]
    assert {len(share) for share in shares} == {n // ranks}
    every = [i for share in shares for i in share]
    assert len(set(every)) == len(every) == n - n % ranks
    assert shares == [order(rank) for rank in range(ranks)]
    assert len({tuple(order(0, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_order_does_not_depend_on_workers(ready):
    whole = [seen(ready().train_dataloader(), epoch) for epoch in (0, 1)]
    loader = ready(num_workers=2).train_dataloader()
    assert [seen(loader, epoch) for epoch in (0, 1)] == whole
    assert whole[0] != whole[1]
    assert seen(ready(seed=1).train_dataloader()) not in whole


def loader_of(module, ranks=1, rank=0, **options):
    windows = module.train_windows
    sampler = WindowSampler(windows, ranks, rank, module.seed)
    options = {"batch_size": 4, "drop_last": True, "collate_fn": same} | options
    return WindowLoader(windows, sampler=sampler, **options)


def same(batch):
    return batch


@pytest.mark.parametrize(("workers", "rank"), [(0, 0), (0, 1), (2, 1)])
def test_loader_goes_on_after_any_batch_without_making_the_others(ready, workers, rank, monkeypatch):
    module = ready()
    whole = {epoch: seen(loader_of(module, 2, rank), epoch) for epoch in (1, 2)}
    first = loader_of(module, 2, rank, num_workers=workers)
    first.sampler.set_epoch(1)
    iterator = iter(first)
    made = []
    make = TokenWindows.__getitems__
    monkeypatch.setattr(TokenWindows, "__getitems__", lambda self, i: made.append(1) or make(self, i))
    for done in range(1, 5):
        next(iterator)
        state = copy.deepcopy(first.state_dict())
        again = loader_of(module, 2, rank, num_workers=workers)
        again.load_state_dict(state)
        assert again.state_dict() == state  # saved again before the first batch
        assert len(again) == len(first)
        made.clear()
        assert seen(again, 1) == whole[1][done:]
        assert workers or len(made) == len(whole[1]) - done
        assert seen(again, 2) == whole[2]
    other = loader_of(module, 2, rank)
    other.load_state_dict(state)
    assert seen(other, 2) == whole[2]  # the position was of another epoch
    assert seen(other, 1) == whole[1]  # and is forgotten


def test_a_changed_layout_is_refused_in_the_middle_of_an_epoch(ready, place):
    loader = loader_of(ready())
    next(iter(loader))
    state = loader.state_dict()
    text = (place / "corpus.txt").read_bytes().decode()
    (place / "changed.txt").write_text(text.replace("ate", "inn"), newline="")
    changed = ready(source=str(place / "changed.txt"))
    for other, message in (
        (loader_of(ready(), batch_size=8), "batch_size was 4 and is 8"),
        (loader_of(ready(), 2), "ranks was 1 and is 2"),
        (loader_of(ready(seed=1)), "seed was 0 and is 1"),
        (loader_of(ready(context=16)), "context was 32 and is 16"),
        (loader_of(changed), r"tokens' checksum was \d+ and is \d+"),
    ):
        other.load_state_dict(state)
        with pytest.raises(
            ValueError, match=rf"middle of epoch 0, after batch 1, but .*{message}.* Resume with the old"
        ):
            seen(other)


def test_loaders_leave_the_global_generator_alone(ready):
    module, before = ready(), torch.get_rng_state()
    next(iter(module.train_dataloader()))
    next(iter(module.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


class Recorder(pl.LightningModule):
    """Learns one number and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.held = [], []

    def training_step(self, batch, _):
        self.seen.append((self.current_epoch, batch["input_ids"].tolist()))
        return (self.weight - batch["targets"].float().mean()).square()

    def validation_step(self, batch, _):
        self.held.append(batch["input_ids"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(tmp_path, **options):
    options = {"max_epochs": 2, "num_sanity_val_steps": 0} | options
    return pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (0, {}),
        (0, {"val_check_interval": 3}),
        (0, {"limit_train_batches": 5, "accumulate_grad_batches": 2, "max_epochs": 3}),
        (2, {}),
    ],
)
def test_resumed_fit_sees_exactly_what_was_left(tmp_path, text, workers, options):
    def keep(folder):
        return ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")

    whole = Recorder()
    trainer(tmp_path, callbacks=[keep("kept")], **options).fit(whole, text(num_workers=workers))
    checkpoints = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert len(checkpoints) >= 8
    for checkpoint in checkpoints[:: 9 if workers else 2]:
        loops = torch.load(checkpoint, weights_only=False)["loops"]["fit_loop"]
        done = loops["epoch_loop.batch_progress"]["total"]["ready"]
        again = Recorder()
        trainer(tmp_path, callbacks=[keep("again")], **options).fit(
            again, text(num_workers=workers), ckpt_path=checkpoint, weights_only=False
        )
        assert again.seen == whole.seen[done:], checkpoint.name
        assert torch.equal(again.weight, whole.weight)
    passes = options.get("max_epochs", 2) * (5 if "val_check_interval" in options else 1)
    once = whole.held[: len(whole.held) // passes]
    assert whole.held == once * passes != []


def test_no_validation_and_overfit_batches(tmp_path, text):
    module = Recorder()
    with pytest.warns(UserWarning, match="Total length of `list` across ranks is zero"):
        trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, text(val_fraction=0))
    assert module.held == []
    module = Recorder()
    with pytest.warns(UserWarning, match="requested to overfit"):
        trainer(tmp_path, overfit_batches=2, enable_checkpointing=False).fit(module, text())
    first = [rows for _, rows in module.seen]
    assert first[:2] == first[2:]


class DistributedRecorder(Recorder):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        torch.save(self.seen, f"{self.folder}/seen-{self.global_rank}")


@pytest.mark.distributed
def test_two_ranks(tmp_path, text, ready):
    # Prepared by rank 0 while rank 1 waits for it: nothing is in the cache yet.
    pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, enable_checkpointing=False,
    ).fit(DistributedRecorder(str(tmp_path)), text(cache_dir=str(tmp_path / "cache")))  # fmt: skip
    both = [torch.load(tmp_path / f"seen-{rank}") for rank in range(2)]
    expected = ready()
    for rank, found in enumerate(both):
        loader = loader_of(expected, 2, rank)
        assert found == [(epoch, rows) for epoch in (0, 1) for rows in seen(loader, epoch)]
    rows = [[tuple(row) for epoch, batch in found for row in batch if epoch == 1] for found in both]
    assert len(rows[0]) == len(rows[1]) == len(expected.train_windows) // 2 // 4 * 4
    assert not set(rows[0]) & set(rows[1])


# What is asked for and what is there ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": 0}, ValueError, "context is 0, expected 1 or more"),
        ({"batch_size": 0}, ValueError, "batch_size is 0, expected 1 or more"),
        ({"eval_batch_size": -1}, ValueError, "eval_batch_size is -1"),
        ({"num_workers": -1}, ValueError, "num_workers is -1, expected 0 or more"),
        ({"seed": 1.5}, TypeError, "seed is 1.5, expected an integer"),
        ({"shard_tokens": True}, TypeError, "shard_tokens is True, expected an integer"),
        ({"prepare_processes": 0}, ValueError, "prepare_processes is 0, expected 1 or more; None for one a core"),
        ({"prepare_processes": 2.0}, TypeError, "prepare_processes is 2.0, expected an integer"),
        ({"val_fraction": "1"}, TypeError, "val_fraction is '1', expected a number"),
        (
            {"val_fraction": 1},
            ValueError,
            r"val_fraction is 1, expected 0 \(nothing held out\) or more, and less than 1",
        ),
        ({"separator": ""}, ValueError, "separator is '', expected a string"),
    ],
)
def test_bad_values(options, error, message):
    with pytest.raises(error, match=message):
        TextDataModule(**options)


def test_prepared_once(text, ready, monkeypatch, caplog):
    first = ready()
    monkeypatch.setattr("slope_pl.data.text_prepare._Writer.write", lambda *_: pytest.fail("prepared again"))
    again = ready()
    again.prepare_data()
    again.setup("fit")
    assert again.index == first.index
    assert text(val_fraction=0.3).folder != text(separator=None).folder != first.folder
    assert text(context=7, batch_size=9, seed=3).folder == first.folder
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        text(subset="en", split="test").prepare_data()
    assert "subset='en', split='test' has no effect" in caplog.text
    assert len(pickle.loads(pickle.dumps(first)).train_windows) == len(first.train_windows)


def test_a_digest_tells_texts_and_splits_apart(ready, place, tmp_path):
    first = ready()
    assert re.fullmatch("[0-9a-f]{8}", first.index.digest)
    assert ready(cache_dir=str(tmp_path / "again")).index.digest == first.index.digest
    write_corpus(tmp_path / "other.txt", [*some_documents(40)[:-1], "another end"])
    others = [ready(source=str(tmp_path / "other.txt")), ready(val_fraction=0.4)]
    assert len({module.index.digest for module in (first, *others)}) == 3


def test_a_prepared_folder_is_a_source(text, ready, place, toy, tmp_path):  # noqa: F811
    first = ready()
    again = ready(source=str(first.folder), separator=None)
    assert seen(again.train_dataloader()) == seen(first.train_dataloader())
    with pytest.raises(
        ShardError, match=r"val_fraction is 0\.1, but the text was prepared with 0\.2; set val_fraction"
    ):
        ready(source=str(first.folder), val_fraction=0.1)
    other = toy_vocabulary(tmp_path / "other", MERGES[:-1])
    with pytest.raises(ShardError, match="shards are of another tokeniser"):
        ready(source=str(first.folder), tokenizer=str(other))


def test_changed_tokenizer_file_is_noticed(ready, tmp_path):
    vocabulary = toy_vocabulary(tmp_path / "vocabulary")
    ready(tokenizer=str(vocabulary))
    toy_vocabulary(vocabulary, MERGES[:-1])
    with pytest.raises(ShardError, match="shards are of another tokeniser"):
        ready(tokenizer=str(vocabulary))


def test_what_is_missing(text, ready, place, tmp_path):
    (place / "one.txt").write_text("the inn")
    with pytest.raises(ShardError, match=r"no prepared text in .*; call prepare_data\(\) first"):
        text(cache_dir=str(tmp_path)).setup()
    with pytest.raises(RuntimeError, match=r"train_windows is not there yet: call prepare_data\(\) and setup\(\)"):
        text().train_windows  # noqa: B018
    with pytest.raises(DataUnavailableError, match=r"no file or folder nowhere\.txt"):
        text(source="nowhere.txt").prepare_data()
    with pytest.raises(
        ValueError, match=r"gives 1 windows of 2000 tokens, expected 4 or more: a batch of 4 for each of 1"
    ):
        ready(context=2000, val_fraction=0)
    with pytest.raises(
        ValueError, match=r"1 documents \(0 tokens\) are held out at val_fraction=0\.2.*unless separator says"
    ):
        ready(source=str(place / "one.txt"), separator=None)


def test_hub(text, monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": document} for document in some_documents(40)]
    opened = []

    def load_dataset(*args, **kwargs):
        opened.append((args, kwargs))
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    local, hub = text(), text(source="openwebtext", revision="abc", separator=None, cache_dir=str(tmp_path))
    for module in (local, hub):
        module.prepare_data()
        module.setup()
    assert hub.index.splits == local.index.splits
    assert opened == [(("openwebtext", None), {"split": "train", "revision": "abc", "streaming": True})]
    text(source="openwebtext", revision="abc", separator=None, cache_dir=str(tmp_path)).prepare_data()
    assert len(opened) == 1, "prepared text needs no network"
    assert hub.folder.name.startswith("openwebtext-")
