"""A mutated checkpoint gives a clear error before anything of it is used, or loads to exactly what it says."""

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from slope_pl import CheckpointError, SLoPeCallback, SLoPeConfig, SLoPeLightningModule, sparsify
from slope_pl.lightning import LocalCheckpointIO
from slope_pl.lightning.restore import why_unreadable
from slope_pl.lightning.strategies import SLoPeDeepSpeedStrategy, SLoPeModelParallelStrategy
from tests.faults.bad_inputs.case import contents, why_unclear
from tests.faults.mutations import CONTENTS, FILES, HARMLESS, MARKS, MUTATIONS, TENSORS
from tests.lightning.toy import CONFIG, QUIET, Net, Recorder, Toy, assert_same, make_trainer

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*You're resuming from a checkpoint that ended before.*")]

STEP = 14  # the adapters woke at 12
# What a model alone does not look at: schedule, optimizer, random state.
OF_A_RUN = {"without optimizer", "without loops", "no schedulers", "two optimizers", "a moment of another shape"} | {
    *("a moment transposed", "random state of text", "random state cut off", "random state of floats", "no counters"),
    *(
        "counters of text",
        "counters below 0",
        "a wake that was not",
        "one layer asleep",
        "another mask",
        "another rank",
    ),
}


class Sparse(SLoPeLightningModule, Toy):
    def __init__(self, net=None, slope=CONFIG):
        super().__init__(Net(7) if net is None else net, slope=slope)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A whole run's checkpoint."""
    folder = tmp_path_factory.mktemp("original")
    trainer = make_trainer(folder, SLoPeCallback(CONFIG), max_steps=STEP)
    trainer.fit(Toy())
    trainer.save_checkpoint(folder / "it.ckpt")
    return torch.load(folder / "it.ckpt", weights_only=True)


def as_saved(found, saved):
    assert_same(found, {name: tensor.to(found[name].dtype) for name, tensor in saved["state_dict"].items()})


def outcome(mutation, saved, load):
    """What ``load`` did with it has to be what the mutation is; ``load`` returns the state it loaded."""
    error = None
    try:
        found = load()
    except Exception as raised:
        error = raised
    if error is None:
        assert mutation.harmless is not False, "there was no error"
        as_saved(found, saved)
    else:
        assert mutation.harmless is not True, repr(error)
        assert why_unclear(error) is None


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_resume(tmp_path, original, mutation, seed):
    file = tmp_path / "it.ckpt"
    saved, before = mutation.write(original, file, seed), file.read_bytes()

    def load():
        recorder = Recorder()
        module = [Toy(Net(7)), Sparse()][seed]
        callbacks = [SLoPeCallback(CONFIG)] if type(module) is Toy else []
        make_trainer(tmp_path, *callbacks, recorder, max_steps=STEP + 1).fit(module, ckpt_path=file)
        return recorder.at[STEP]

    outcome(mutation, saved, load)
    assert contents(tmp_path) == {"it.ckpt": before}


@pytest.mark.parametrize(
    "mutation", [m for m in MUTATIONS if m.name not in OF_A_RUN], ids=lambda mutation: mutation.name
)
def test_load_from_checkpoint(tmp_path, original, mutation):
    file = tmp_path / "it.ckpt"
    saved = mutation.write(original, file, 2)
    outcome(mutation, saved, lambda: Sparse.load_from_checkpoint(file).state_dict())


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("mutation", TENSORS, ids=lambda mutation: mutation.name)
def test_load_state_dict(tmp_path, original, mutation, seed):
    """Without Lightning; what is wrong with dense layers and with names is torch's to say."""
    state = mutation.write(original, tmp_path / "it.ckpt", seed)["state_dict"]
    changed = {name for name in {**state, **original["state_dict"]} if not same(state, original["state_dict"], name)}
    model = Toy(Net(7))
    sparsify(model, CONFIG)
    if mutation.name == "one layer asleep":
        model.load_state_dict(state)
        assert sorted(layer.adapters_awake for layer in model.net.blocks) == [False, True, True]
        return
    ours = state.keys() == original["state_dict"].keys() and any("blocks" in name for name in changed)
    kind = CheckpointError if ours else RuntimeError
    with pytest.raises(kind) as raised:
        model.load_state_dict(state)
    assert any(name in str(raised.value) for name in changed)


def same(state, other, name):
    a, b = state.get(name), other.get(name)
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)


def test_the_kinds_are_many():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 60
    assert min(map(len, (FILES, CONTENTS, TENSORS, MARKS, HARMLESS))) >= 7


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (SLoPeConfig(backward_refresh_steps=5), "made with adapter_rank=4, this run has adapter_rank=0"),
        (SLoPeConfig(adapter_rank=8, adapter_start_step=12), "adapter_rank=4, this run has adapter_rank=8"),
        (SLoPeConfig(mask="transposable", adapter_rank=4, adapter_start_step=12), "mask='magnitude'"),
        (SLoPeConfig(adapter_rank=4, adapter_start_step=12, exclude=["*.1"]), r"exclude=\[\], this run has exclude="),
    ],
)
def test_resume_with_another_configuration(tmp_path, original, config, says):
    torch.save(original, tmp_path / "it.ckpt")
    with pytest.raises(CheckpointError, match=says):
        make_trainer(tmp_path, SLoPeCallback(config)).fit(Toy(), ckpt_path=tmp_path / "it.ckpt")


@pytest.mark.parametrize(
    ("kind", "asked_twice"),
    [(SingleDeviceStrategy, False), (SLoPeModelParallelStrategy, True), (SLoPeDeepSpeedStrategy, True)],
)
def test_a_plugin_that_looks_itself_is_not_repeated_and_others_are(tmp_path, kind, asked_twice):
    """FSDP2 and DeepSpeed read a file without the plugin."""
    (tmp_path / "it.ckpt").write_text("damaged")
    strategy = object.__new__(kind)
    strategy._checkpoint_io = LocalCheckpointIO()
    assert (why_unreadable(tmp_path / "it.ckpt", strategy) is not None) == asked_twice
    strategy._checkpoint_io = TorchCheckpointIO()
    assert "is damaged or no checkpoint" in why_unreadable(tmp_path / "it.ckpt", strategy)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    folder = tmp_path / "it.ckpt"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint; it holds nothing; expected"):
        make_trainer(tmp_path, SLoPeCallback(CONFIG)).fit(Toy(), ckpt_path=folder)
    with pytest.raises(CheckpointError, match="is no checkpoint; it holds nothing; expected"):
        Sparse.load_from_checkpoint(folder)


def test_no_file_at_all_is_lightnings_to_say(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        make_trainer(tmp_path, SLoPeCallback(CONFIG)).fit(Toy(), ckpt_path=tmp_path / "none.ckpt")


def test_adapters_awake_in_a_layer_without():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    (layer,) = sparsify(model, SLoPeConfig()).values()
    state = model.state_dict() | {"1.adapter_active": torch.ones((), dtype=torch.uint8)}
    with pytest.raises(
        CheckpointError, match=r"1\.adapter_active is 1, but this layer has no adapters: set adapter_rank"
    ):
        model.load_state_dict(state)
    assert not layer.adapters_awake
