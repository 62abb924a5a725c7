import pickle

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from recipes.bert_large.glue_sample import write_sample
from slope_pl.data import TASKS, GlueDataModule, GlueExample, GlueScores, load_wordpiece
from slope_pl.data.glue_datamodule import BucketSampler, RowDataset
from slope_pl.data.glue_rows import GlueRows, _cut, build_rows
from tests.unit.test_squad_reading import SAMPLE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:You are using `torch.load`"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
VOCABULARY = str(SAMPLE / "vocab.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("glue"))


def module(folder, task="rte", **options):
    data = GlueDataModule(task, str(folder), VOCABULARY, **({"batch_size": 8} | options))
    data.prepare_data()
    data.setup("fit")
    return data


# Rows ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load_wordpiece(VOCABULARY)


def test_a_pair_and_a_sentence(tokenizer):
    word = tokenizer.token_to_id
    pair = build_rows([GlueExample("the river", "the king", 1.0)], TASKS["rte"], tokenizer, 16)
    batch = pair.batch([0])
    ids = ["[CLS]", "the", "river", "[SEP]", "the", "king", "[SEP]"]
    assert batch["input_ids"].tolist() == [[word(token) for token in ids]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert batch["labels"].dtype == np.int64
    one = build_rows([GlueExample("the king", None, 0.0)], TASKS["cola"], tokenizer, 16).batch([0])
    assert one["input_ids"].tolist() == [[word(token) for token in ("[CLS]", "the", "king", "[SEP]")]]
    assert one["token_type_ids"].sum() == 0
    assert build_rows([GlueExample("a", "b", 2.5)], TASKS["stsb"], tokenizer, 16).labels.dtype == np.float32


def test_padding_is_to_the_longest_row_of_the_batch(tokenizer):
    texts = ["the king", "the king was found near the river", "the river was named"]
    rows = build_rows([GlueExample(text, None, 1.0) for text in texts], TASKS["sst2"], tokenizer, 13)
    lengths = rows.lengths.tolist()
    assert lengths == [len(tokenizer.encode(text).ids) + 2 for text in texts]
    for chosen, pad_to, wide in (([0], 1, 4), ([2, 0], 1, lengths[2]), ([0, 2], 8, 8), ([1, 0], 8, 13)):
        batch = rows.batch(chosen, pad_to)
        assert batch["input_ids"].shape == (len(chosen), wide)
        assert batch["attention_mask"].sum(1).tolist() == [lengths[i] for i in chosen]
        assert (batch["input_ids"][batch["attention_mask"] == 0] == rows.pad).all()
        assert batch["row_index"].tolist() == chosen
        for i, row, mask in zip(chosen, batch["input_ids"], batch["attention_mask"], strict=True):
            assert row[mask == 1].tolist() == rows.tokens[rows.starts[i] : rows.starts[i + 1]].tolist()


@pytest.mark.parametrize("max_length", [16, 17, 31, 128])
def test_ids_and_truncation_are_hugging_faces(tokenizer, max_length):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizerFast(vocab=VOCABULARY)
    draw = np.random.default_rng(0)
    words = [token for token in tokenizer.get_vocab() if token.isalpha()]
    texts = [[" ".join(draw.choice(words, draw.integers(1, 24))) for _ in range(2)] for _ in range(60)]
    rows = build_rows([GlueExample(a, b, 0.0) for a, b in texts], TASKS["rte"], tokenizer, max_length)
    expected = theirs(
        [a for a, _ in texts], [b for _, b in texts], truncation=True, max_length=max_length, padding=True
    )
    batch = rows.batch(range(60))
    for key in ("input_ids", "token_type_ids", "attention_mask"):
        assert batch[key].tolist() == expected[key], key
    assert (rows.truncated > 0) == (max_length < 40)


@pytest.mark.parametrize(
    ("n1", "n2", "room", "kept"),
    [(3, 4, 7, (3, 4)), (2, 9, 7, (2, 5)), (9, 2, 7, (5, 2)), (9, 9, 7, (3, 4)), (10, 9, 7, (4, 3)), (9, 0, 7, (7, 0))],
)
def test_the_longer_sentence_is_cut(n1, n2, room, kept):
    assert _cut(n1, n2, room) == kept


def test_rows_refuse_what_cannot_be(tokenizer):
    with pytest.raises(ValueError, match="max_length is 4, expected 5 or more for rte"):
        build_rows([GlueExample("a", "b", 0.0)], TASKS["rte"], tokenizer, 4)
    with pytest.raises(ValueError, match=r"gives no token, expected a sentence"):
        build_rows([GlueExample("\u200b", None, 0.0)], TASKS["cola"], tokenizer, 16)


# The module ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_batches(folder, task):
    data = module(folder, task)
    info = TASKS[task]
    batches = list(data.train_dataloader())
    seen = torch.cat([batch["row_index"] for batch in batches]).tolist()
    assert sorted(seen) == list(range(160))
    assert seen != sorted(seen)
    assert {batch["labels"].dtype for batch in batches} == {torch.float32 if info.regression else torch.int64}
    assert data.vocab_size == 2048
    loaders = data.val_dataloader()
    assert list(data.dev_rows) == (["matched", "mismatched"] if task == "mnli" else ["dev"])
    for loader, rows in zip(loaders, data.dev_rows.values(), strict=True):
        batches = list(loader)
        assert torch.cat([b["row_index"] for b in batches]).tolist() == list(range(48))
        assert torch.cat([b["labels"] for b in batches]).tolist() == rows.labels.tolist()
    assert len(data.predict_dataloader()) == len(loaders)
    if task == "mnli":
        assert not np.array_equal(data.dev_rows["matched"].tokens, data.dev_rows["mismatched"].tokens)


def test_caps_and_stages(folder):
    data = GlueDataModule("rte", str(folder), VOCABULARY, max_train_rows=30, max_dev_rows=19)
    with pytest.raises(RuntimeError, match=r"dev_rows is not there yet: call prepare_data\(\)"):
        data.dev_rows  # noqa: B018
    data.setup("validate")
    with pytest.raises(RuntimeError, match="train_rows is not there yet"):
        data.train_rows  # noqa: B018
    data.setup("fit")
    assert (len(data.train_rows), len(data.dev_rows["dev"])) == (30, 19)
    whole = module(folder).dev_rows["dev"]
    assert data.dev_rows["dev"].tokens.tolist() == whole.tokens[: whole.starts[19]].tolist()
    chosen = [module(folder, max_train_rows=30, seed=seed).train_rows.tokens.tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] == data.train_rows.tokens.tolist() != chosen[2]
    again = pickle.loads(pickle.dumps(data))
    assert len(again.train_rows) == 30


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "imdb"}, ValueError, "task is 'imdb', expected one of cola"),
        ({"batch_size": 0}, ValueError, "batch_size is 0, expected 1 or more"),
        ({"pad_to": 0}, ValueError, "pad_to is 0"),
        ({"max_length": 4}, ValueError, "max_length is 4, expected 5 or more"),
        ({"max_train_rows": 0}, ValueError, r"max_train_rows is 0.*leave it out \(null\) for all rows"),
        ({"max_dev_rows": 1.5}, TypeError, "max_dev_rows is 1.5, expected an integer"),
        ({"num_workers": -1}, ValueError, "num_workers is -1, expected 0 or more"),
        ({"batch_size": True}, TypeError, "batch_size is True, expected an integer"),
        ({"on_bad_row": "drop"}, ValueError, "on_bad_row is 'drop'"),
    ],
)
def test_bad_values(options, error, message):
    with pytest.raises(error, match=message):
        GlueDataModule(**options)


def test_prepare_downloads_all_splits(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda name, task, split: asked.append((name, task, split)))
    GlueDataModule("mnli", "nyu-mll/glue", VOCABULARY).prepare_data()
    splits = ("train", "validation_matched", "validation_mismatched")
    assert asked == [("nyu-mll/glue", "mnli", split) for split in splits]


# The order -------------------------------------------------------------------------------------------------------------


def buckets(rows, epoch=0, ranks=1, rank=0, seed=0):
    sampler = BucketSampler(RowDataset(rows, 1), 8, num_replicas=ranks, rank=rank, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_buckets_hold_rows_of_like_length_in_a_random_order():
    lengths = np.random.default_rng(3).gamma(6, 9, 3668).astype(np.int64) + 5  # like MRPC's
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = GlueRows(np.ones(starts[-1], np.int32), starts, lengths, np.zeros(3668), pad=0, max_length=512, truncated=0)
    order = buckets(rows)
    assert sorted(order) == list(range(len(rows)))
    assert order == buckets(rows) != buckets(rows, epoch=1)

    def padded(order):
        batches = [lengths[order[i : i + 8]] for i in range(0, len(order), 8)]
        return sum(len(batch) * batch.max() for batch in batches) / lengths.sum()

    plain = np.random.default_rng(0).permutation(len(rows))
    assert padded(order) < 1.05 < 1.25 < padded(plain)
    means = [lengths[order[i : i + 8]].mean() for i in range(0, len(order), 8)]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.1  # batches are not in order of length
    shards = [buckets(rows, ranks=4, rank=rank) for rank in range(4)]
    assert {len(shard) for shard in shards} == {917}
    assert sorted({index for shard in shards for index in shard}) == list(range(len(rows)))
    spread = [np.ptp([lengths[shard[i]] for shard in shards]) for i in range(917)]
    assert np.mean(spread) < 2 < np.std(lengths)  # ranks get rows of like length in the same step


class Recorder(pl.LightningModule):
    """Learns one number and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append((self.current_epoch, batch["row_index"].tolist()))
        return (self.weight - batch["labels"].float().mean()).square()

    def validation_step(self, batch, _, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(tmp_path, callbacks):
    return pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=2, num_sanity_val_steps=0, callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.parametrize("length_buckets", [False, True])
def test_resumed_fit_sees_exactly_what_was_left(folder, tmp_path, length_buckets):
    def data():
        return module(folder, batch_size=24, length_buckets=length_buckets)

    def keep(name):
        return ModelCheckpoint(tmp_path / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")

    whole = Recorder()
    trainer(tmp_path, [keep("kept")]).fit(whole, data())
    assert len(whole.seen) == 14
    for step in (3, 7, 10):
        again = Recorder()
        checkpoint = tmp_path / "kept" / f"step={step}.ckpt"
        trainer(tmp_path, [keep("again")]).fit(again, data(), ckpt_path=checkpoint, weights_only=True)
        assert again.seen == whole.seen[step:]
        assert torch.equal(again.weight, whole.weight)


def test_a_changed_way_of_sampling_is_refused_in_the_middle_of_an_epoch(folder):
    loader = module(folder).train_dataloader()
    next(iter(loader))
    other = module(folder, length_buckets=True).train_dataloader()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="length_buckets was 0 and is 1"):
        next(iter(other))


class DistributedScorer(Recorder):
    def __init__(self, folder, labels):
        super().__init__()
        self.folder = folder
        self.scores = GlueScores("rte", torch.from_numpy(labels))

    def validation_step(self, batch, _, dataloader_idx=0):
        self.scores.update(batch["row_index"], answers(batch["row_index"]))

    def on_validation_epoch_end(self):
        found = {key: value.item() for key, value in self.scores.compute().items()}
        torch.save((found, self.seen), f"{self.folder}/{self.global_rank}")
        self.scores.reset()


def answers(index):
    return torch.stack([index % 3, index % 2 * 2], 1).float()


@pytest.mark.distributed
def test_two_ranks_score_each_row_once(folder, tmp_path):
    data = GlueDataModule("rte", str(folder), VOCABULARY, batch_size=8, max_dev_rows=47, eval_batch_size=5)
    data.setup("fit")
    assert len(data.dev_rows["dev"]) % 2 == 1, "one row must be repeated for this test to say something"
    labels = data.dev_rows["dev"].labels
    pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    ).fit(DistributedScorer(str(tmp_path), labels), data)  # fmt: skip
    (one, rows_one), (two, rows_two) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    right = answers(torch.arange(47)).argmax(1).numpy() == labels
    assert one == two == pytest.approx({"accuracy": 100 * right.mean(), "rows": 47})
    ids = [index for _, batch in rows_one + rows_two for index in batch]
    assert sorted(ids) == list(range(160))
