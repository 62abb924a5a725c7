import copy
import pickle

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from slope_pl.data import DataUnavailableError, SquadDataModule, SquadSpans
from slope_pl.data.loading import EpochSampler, ResumableDataLoader
from slope_pl.data.squad_datamodule import WindowDataset
from tests.unit.test_squad_reading import SAMPLE, question, squad, write  # noqa: F401 - a fixture

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


def sample(**options):
    options = {"max_length": 160, "batch_size": 4, "max_train_questions": 30, "max_dev_questions": 19} | options
    return SquadDataModule(str(SAMPLE), str(SAMPLE / "vocab.txt"), **options)


@pytest.fixture(scope="module")
def ready():
    module = sample(max_train_questions=None, max_dev_questions=None, batch_size=24)
    module.prepare_data()
    module.setup()
    return module


def test_batches(ready):
    train = list(ready.train_dataloader())
    assert train[0].keys() == {
        "input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions", "window_index",
    }  # fmt: skip
    for batch in train:
        assert {value.dtype for value in batch.values()} == {torch.int64}
        assert {tuple(batch[k].shape) for k in ("input_ids", "attention_mask", "token_type_ids")} == {
            (len(batch["window_index"]), 160)
        }
        assert (batch["input_ids"][batch["attention_mask"] == 0] == ready.pad).all()
        assert batch["start_positions"].shape == batch["end_positions"].shape == batch["window_index"].shape
    seen = torch.cat([batch["window_index"] for batch in train])
    assert seen.tolist() != sorted(seen.tolist())
    assert sorted(seen.tolist()) == list(range(len(ready.train_windows)))
    for loader in (ready.val_dataloader(), ready.predict_dataloader()):
        dev = list(loader)
        assert dev[0].keys() == {"input_ids", "attention_mask", "token_type_ids", "window_index"}
        assert torch.cat([b["window_index"] for b in dev]).tolist() == list(range(len(ready.dev_windows)))
    assert (ready.vocab_size, ready.pad) == (2048, 0)
    item = WindowDataset(ready.train_windows, True)[3]
    assert item["input_ids"].shape == (160,)


def test_stages_build_what_they_need_once():
    module = sample()
    module.setup("validate")
    with pytest.raises(RuntimeError, match=r"train_windows is not there yet: call prepare_data\(\) and setup\(\)"):
        module.train_windows  # noqa: B018
    dev = module.dev_windows
    module.setup("fit")
    train = module.train_windows
    module.setup("fit")
    module.setup(None)
    assert module.dev_windows is dev
    assert module.train_windows is train
    with pytest.raises(RuntimeError, match="vocab_size is not there yet"):
        sample().vocab_size  # noqa: B018


def test_question_caps(ready):
    everything = [e.id for e in ready.train_windows.examples]
    chosen = []
    for seed in (0, 0, 1):
        module = sample(seed=seed)
        module.setup()
        chosen.append([e.id for e in module.train_windows.examples])
        assert [e.id for e in module.dev_windows.examples] == [e.id for e in ready.dev_windows.examples[:19]]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 30
    assert [everything.index(i) for i in chosen[0]] == sorted(everything.index(i) for i in chosen[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0, expected 1 or more"),
        ({"eval_batch_size": -1}, ValueError, "eval_batch_size is -1"),
        ({"num_workers": -1}, ValueError, "num_workers is -1, expected 0 or more"),
        ({"seed": -1}, ValueError, "seed is -1, expected 0 or more"),
        ({"max_train_questions": 0}, ValueError, r"max_train_questions is 0.*leave it out \(null\) for all"),
        ({"max_dev_questions": 1.5}, TypeError, "max_dev_questions is 1.5, expected an integer"),
        ({"doc_stride": 0}, ValueError, "doc_stride is 0"),
        ({"max_length": 60}, ValueError, r"max_length is 60, expected max_question_length \+ 4"),
        ({"max_length": True}, TypeError, "max_length is True, expected an integer"),
        ({"batch_size": "8"}, TypeError, "batch_size is '8', expected an integer"),
        ({"on_bad_answer": "drop"}, ValueError, "on_bad_answer is 'drop', expected 'raise' or 'skip'"),
    ],
)
def test_bad_values(options, error, message):
    with pytest.raises(error, match=message):
        SquadDataModule(**options)


def test_files(write, tmp_path):  # noqa: F811
    data = write(squad(question()), "my.json")
    vocabulary = str(SAMPLE / "vocab.txt")
    module = SquadDataModule(str(tmp_path), vocabulary, train_file=str(data), dev_file=str(data))
    module.prepare_data()
    module.setup()
    assert len(module.train_windows) == len(module.dev_windows) == 1
    with pytest.raises(FileNotFoundError, match=r"dev_file is 'nowhere.json', which is not a file"):
        SquadDataModule(str(tmp_path), vocabulary, dev_file="nowhere.json").setup("validate")
    with pytest.raises(ValueError, match=r"source is the file .*expected a folder or a hub id"):
        SquadDataModule(str(data), vocabulary).setup("validate")
    with pytest.raises(DataUnavailableError, match=r"no train\*\.json in .*it holds: my\.json"):
        SquadDataModule(str(tmp_path), vocabulary).prepare_data()


def test_prepare_downloads_both_splits(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: asked.append((name, split)))
    SquadDataModule("some/squad", str(SAMPLE / "vocab.txt")).prepare_data()
    assert asked == [("some/squad", "train"), ("some/squad", "validation")]


def test_pickles(ready):
    again = pickle.loads(pickle.dumps(ready))
    assert len(again.train_windows) == len(ready.train_windows)
    dataset = pickle.loads(pickle.dumps(WindowDataset(ready.train_windows, True)))
    assert dataset.windows.examples == ()
    assert torch.equal(dataset[7]["input_ids"], WindowDataset(ready.train_windows, True)[7]["input_ids"])


# The order ------------------------------------------------------------------------------------------------------------


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch, ranks=1, rank=0, n=50):
        sampler = EpochSampler(range(n), num_replicas=ranks, rank=rank, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(5) for epoch in range(5)}) == 25
    shards = [order(3, 2, ranks=4, rank=r) for r in range(4)]
    assert [x for group in zip(*shards, strict=True) for x in group][:50] == order(3, 2)
    assert {len(shard) for shard in shards} == {13}
    assert [len(order(0, 0, ranks=8, rank=r, n=3)) for r in range(8)] == [1] * 8


def test_loaders_leave_the_global_generator_alone(ready):
    before = torch.get_rng_state()
    next(iter(ready.train_dataloader()))
    next(iter(ready.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def loader_of(module, ranks=1, rank=0, **options):
    dataset = WindowDataset(module.train_windows, True)
    sampler = EpochSampler(dataset, num_replicas=ranks, rank=rank, seed=module.seed)
    return ResumableDataLoader(dataset, **({"batch_size": 16, "collate_fn": same} | options), sampler=sampler)


def same(batch):
    return batch


def seen(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [batch["window_index"].tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 2])
def test_loader_goes_on_after_any_batch(ready, workers, rank):
    whole = {epoch: seen(loader_of(ready, 3, rank), epoch) for epoch in (1, 2)}
    first = loader_of(ready, 3, rank, num_workers=workers)
    first.sampler.set_epoch(1)
    iterator = iter(first)
    for done in range(1, 5):
        next(iterator)
        state = copy.deepcopy(first.state_dict())
        again = loader_of(ready, 3, rank, num_workers=workers)
        again.load_state_dict(state)
        assert again.state_dict() == state  # saved again before the first batch
        assert len(again) == len(first)
        assert seen(again, 1) == whole[1][done:]
        assert seen(again, 2) == whole[2]
    other = loader_of(ready, 3, rank)
    other.load_state_dict(state)
    assert seen(other, 2) == whole[2]  # the position was of another epoch
    assert seen(other, 1) == whole[1]  # and is forgotten


def test_a_changed_layout_is_refused_in_the_middle_of_an_epoch(ready):
    loader = loader_of(ready)
    next(iter(loader))
    state = loader.state_dict()
    for other, message in (
        (loader_of(ready, batch_size=8), "batch_size was 16 and is 8"),
        (loader_of(ready, 2), "ranks was 1 and is 2"),
    ):
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=rf"middle of epoch 0, after batch 1, but {message}\. Resume with the old"):
            seen(other, 0)
        other.load_state_dict(state)
        assert len(seen(other, 1)) == len(other)


class Recorder(pl.LightningModule):
    """Learns one number and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append((self.current_epoch, batch["window_index"].tolist()))
        return (self.weight - batch["start_positions"].float().mean()).square()

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(tmp_path, **options):
    options = {"max_epochs": 3, "num_sanity_val_steps": 0} | options
    return pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (0, {}),
        (0, {"val_check_interval": 3}),
        (0, {"limit_train_batches": 5, "accumulate_grad_batches": 2}),
        (2, {"max_epochs": 2}),
    ],
)
def test_resumed_fit_sees_exactly_what_was_left(tmp_path, workers, options):
    def keep(folder):
        return ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")

    whole = Recorder()
    trainer(tmp_path, callbacks=[keep("kept")], **options).fit(whole, sample(num_workers=workers))
    assert len(whole.seen) == (5 if "limit_train_batches" in options else 10) * options.get("max_epochs", 3)
    checkpoints = sorted((tmp_path / "kept").glob("*.ckpt"))
    checkpoints = checkpoints[::4] if workers else checkpoints
    assert len(checkpoints) >= 5
    for checkpoint in checkpoints:
        loops = torch.load(checkpoint, weights_only=False)["loops"]["fit_loop"]
        done = loops["epoch_loop.batch_progress"]["total"]["ready"]
        again = Recorder()
        trainer(tmp_path, callbacks=[keep("again")], **options).fit(
            again, sample(num_workers=workers), ckpt_path=checkpoint, weights_only=False
        )
        assert again.seen == whole.seen[done:], checkpoint.name
        assert torch.equal(again.weight, whole.weight)


def test_overfit_batches_works(tmp_path):
    module = Recorder()
    with pytest.warns(UserWarning, match="requested to overfit"):
        trainer(tmp_path, overfit_batches=2, enable_checkpointing=False).fit(module, sample())
    assert [ids for _, ids in module.seen] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3


class DistributedRecorder(Recorder):
    def __init__(self, folder, windows):
        super().__init__()
        self.folder = folder
        self.spans = SquadSpans(windows)

    def validation_step(self, batch, _):
        logits = torch.zeros(batch["input_ids"].shape)
        logits[:, 20] = batch["window_index"].float()
        self.spans.update(batch["window_index"], logits, logits)

    def on_validation_epoch_end(self):
        scores = {key: value.item() for key, value in self.spans.compute().items()}
        torch.save(scores, f"{self.folder}/scores-{self.global_rank}")
        self.spans.reset()

    def on_train_end(self):
        torch.save((self.seen, self.weight.detach()), f"{self.folder}/seen-{self.global_rank}")


@pytest.mark.distributed
def test_two_ranks(tmp_path):
    def run(name, **fit):
        (tmp_path / name).mkdir()
        keep = ModelCheckpoint(tmp_path / name, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        pl.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=2, logger=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=[keep],
        ).fit(DistributedRecorder(str(tmp_path / name), data.dev_windows), sample(), **fit)  # fmt: skip
        return [[torch.load(tmp_path / name / f"{kind}-{r}") for r in range(2)] for kind in ("seen", "scores")]

    data = sample()
    data.setup()
    assert len(data.dev_windows) % 2 == 1, "one window must be repeated for this test to say something"
    whole, scores = run("whole")
    assert scores[0] == scores[1]
    assert scores[0]["questions"] == 19
    ids = [[i for epoch, batch in seen if epoch == 1 for i in batch] for seen, _ in whole]
    assert sorted(set(ids[0] + ids[1])) == list(range(len(data.train_windows)))
    assert len(ids[0]) == len(ids[1]) == -(-len(data.train_windows) // 2)
    again, _ = run("again", ckpt_path=tmp_path / "whole" / "step=2.ckpt", weights_only=False)
    for (before, weight), (after, same_weight) in zip(whole, again, strict=True):
        assert after == before[2:]
        assert torch.equal(weight, same_weight)
    one = SquadSpans(data.dev_windows)
    for batch in data.val_dataloader():
        logits = torch.zeros(batch["input_ids"].shape)
        logits[:, 20] = batch["window_index"].float()
        one.update(batch["window_index"], logits, logits)
    expected = {key: value.item() for key, value in one.compute().items()}
    assert scores[0] == pytest.approx(expected)
    assert np.isfinite(scores[0]["f1"])
