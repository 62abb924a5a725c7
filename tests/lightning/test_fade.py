"""Stage 1: pruned entries of a dense model fade to zero. Stage 2: sparse training begins with exactly these masks."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from slope_pl import (
    CheckFadedMasks,
    CheckpointError,
    ConfigError,
    ConversionError,
    FadeCallback,
    ScheduleError,
    SLoPeCallback,
    SLoPeConfig,
    SLoPeLightningModule,
    sparse_layers,
    sparsify,
    sparsify_faded,
)
from slope_pl.lightning import check_faded_masks, fade, faded_masks
from slope_pl.sparsity import make_mask
from tests.lightning.test_calibration import expected_masks
from tests.lightning.toy import QUIET, Net, Recorder, Toy, assert_same, fixed_batch, hf_gpt2, make_trainer

pytestmark = QUIET

STEPS = 6
NAMES = [f"net.blocks.{i}" for i in range(3)]
KINDS = ["magnitude", "transposable"]


class Still(Toy):
    """Learns nothing: what moves, the fade has moved."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def saver(folder):
    return ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


def stage_one(folder, module=None, config=None, steps=STEPS, start_step=0, ckpt_path=None, **settings):
    module = Toy() if module is None else module
    callback, recorder = FadeCallback(steps, config, start_step), Recorder()
    defaults = {"max_steps": 10, "enable_checkpointing": True}
    trainer = make_trainer(folder, callback, recorder, saver(folder), **(defaults | settings))
    trainer.fit(module, ckpt_path=ckpt_path)
    return module, callback, recorder


@pytest.fixture(scope="module", params=KINDS)
def first_stage(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"fade_{request.param}")
    config = SLoPeConfig(mask=request.param)
    module, callback, recorder = stage_one(folder, config=config)
    return folder, config, module, callback, recorder


def test_a_straight_line_to_exactly_zero(tmp_path):
    _, callback, recorder = stage_one(tmp_path, Still())
    start, masks = Net(), callback.masks()
    for i, name in enumerate(NAMES):
        before = start.blocks[i].weight.detach()
        assert torch.equal(masks[name], make_mask("magnitude", before))
        for step in range(10):
            now = recorder.at[step][f"{name}.weight"]
            assert torch.equal(now[masks[name]], before[masks[name]]), "kept weights are left alone"
            factor = max(0.0, 1 - step / STEPS)
            torch.testing.assert_close(now[~masks[name]], factor * before[~masks[name]], rtol=1e-5, atol=0)
            assert bool((now[~masks[name]] == 0).all()) == (step >= STEPS)
    assert torch.equal(recorder.at[9]["net.first.weight"], start.first.weight), "the first layer stays dense"


def test_pruned_entries_stay_zero_while_kept_ones_train(first_stage):
    _, config, module, callback, recorder = first_stage
    for i, name in enumerate(NAMES):
        mask = callback.masks()[name]
        assert torch.equal(mask, make_mask(config.mask, Net().blocks[i].weight))
        for step in range(STEPS, 10):
            assert not recorder.at[step][f"{name}.weight"][~mask].any()
        weight = module.get_submodule(name).weight.detach()
        assert not weight[~mask].any()
        moved = (weight != recorder.at[STEPS][f"{name}.weight"])[mask]
        assert moved.float().mean() > 0.99
    assert callback.factor == 0.0


def test_pruned_entries_learn_on_their_way_down(first_stage):
    _, _, _, callback, recorder = first_stage
    mask = callback.masks()[NAMES[0]]
    early, start = recorder.at[2][f"{NAMES[0]}.weight"], Net().blocks[0].weight.detach()
    assert not torch.allclose(early[~mask], start[~mask] * (1 - 2 / STEPS), rtol=1e-3)


def test_the_fade_begins_where_it_is_told_to(tmp_path):
    _, callback, recorder = stage_one(tmp_path, start_step=3)
    assert callback.began_at == 3
    for name in NAMES:
        chosen_from = recorder.at[3][f"{name}.weight"]
        assert torch.equal(callback.masks()[name], make_mask("magnitude", chosen_from))
        assert recorder.at[8][f"{name}.weight"][~callback.masks()[name]].any()
        assert not recorder.at[9][f"{name}.weight"][~callback.masks()[name]].any()


def test_optimizer_steps_count_not_micro_batches(tmp_path):
    _, callback, recorder = stage_one(tmp_path, Still(), accumulate_grad_batches=2)
    mask, start = callback.masks()[NAMES[0]], Net().blocks[0].weight.detach()
    now = recorder.at[3][f"{NAMES[0]}.weight"]
    torch.testing.assert_close(now[~mask], 0.5 * start[~mask], rtol=1e-5, atol=0)


def test_masks_by_activation_norms(tmp_path):
    config = SLoPeConfig(mask_calibration_batches=3)
    module, callback, _ = stage_one(tmp_path, config=config)
    assert_same(callback.masks(), expected_masks(Net()))
    assert all(part.training for part in module.modules())


def test_conv1d_is_faded_along_its_inputs(tmp_path):
    module, callback, _ = stage_one(tmp_path, Toy(hf_gpt2()))
    layers = sparsify(module, SLoPeConfig())
    check_faded_masks(module, callback.masks())
    assert "net.model.transformer.h.1.mlp.c_fc" in layers


# ---------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [2, 6, 8])
def test_a_resumed_fade_is_the_uninterrupted_one(tmp_path, first_stage, step):
    folder, config, whole, callback, _ = first_stage
    resumed, again, _ = stage_one(tmp_path, Toy(Net(9)), config, ckpt_path=folder / f"step={step}.ckpt")
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(again.state_dict(), callback.state_dict())


def test_a_fade_of_another_model_is_refused(tmp_path, first_stage):
    folder, config, *_ = first_stage
    callback = FadeCallback(STEPS, config)
    callback.load_state_dict(torch.load(folder / "step=8.ckpt", weights_only=True)["callbacks"]["FadeCallback"])
    net = Net()
    net.blocks[2] = nn.Linear(32, 8)
    net.head = nn.Linear(8, 4)
    with pytest.raises(CheckpointError, match=r"mask for layer 'net.blocks.2', 16x32; this model has it as 8x32"):
        make_trainer(tmp_path, callback).fit(Toy(net))


# ---------------------------------------------------------------------------------------------------- stage 2


def test_the_conversion_keeps_exactly_the_faded_masks_and_loses_nothing(tmp_path, first_stage):
    folder, config, dense, callback, _ = first_stage
    module = Toy(Net(9))
    layers = sparsify_faded(module, config, folder / "step=10.ckpt")
    assert_same({name: layer.forward_mask() for name, layer in layers.items()}, callback.masks())
    for name, layer in layers.items():
        assert torch.equal(layer.dense_weight(), dense.get_submodule(name).weight)
    torch.testing.assert_close(module(fixed_batch()), dense(fixed_batch()))
    check = CheckFadedMasks(folder / "step=10.ckpt")
    make_trainer(tmp_path, SLoPeCallback(config), check, max_steps=3).fit(module)
    assert len(module.losses) == 3
    assert_same({name: layer.forward_mask() for name, layer in sparse_layers(module).items()}, callback.masks())


def test_modules_that_load_their_weights_themselves(tmp_path, first_stage):
    """As the recipes do: dense weights in configure_model, then the conversion; the check is a callback."""
    folder, config, *_ = first_stage

    class Own(SLoPeLightningModule, Toy):
        def __init__(self, weights):
            super().__init__(slope=config)
            self.net, self.weights = None, weights

        def configure_model(self):
            if self.net is None:
                self.net = Net(9)
                state = torch.load(self.weights, weights_only=True)["state_dict"]
                self.net.load_state_dict({name.removeprefix("net."): tensor for name, tensor in state.items()})
            super().configure_model()

    check = CheckFadedMasks(folder / "step=10.ckpt")
    make_trainer(tmp_path, check, max_steps=2).fit(Own(folder / "step=10.ckpt"))
    with pytest.raises(ConversionError, match=r"layer 'net.blocks..' has another mask.*entries differ"):
        make_trainer(tmp_path, check, max_steps=2).fit(Own(folder / "step=1.ckpt"))


def test_a_fade_that_has_not_ended_is_refused(first_stage):
    folder, config, *_ = first_stage
    with pytest.raises(CheckpointError, match=r"pruned entries are at 50% .*go on with the first stage"):
        sparsify_faded(Toy(), config, folder / "step=3.ckpt")


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no masks of a FadeCallback"):
        faded_masks({"state_dict": {}, "callbacks": {}})
    with pytest.raises(CheckpointError, match="is not there"):
        faded_masks(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize(
    "settings", [{"mask": "random"}, {"layer_masks": {"*": "random"}}, {"mask_calibration_batches": 4}]
)
def test_stage_two_chooses_by_magnitude(first_stage, settings):
    folder, *_ = first_stage
    module = Toy()
    with pytest.raises(ConfigError, match="after a fade, masks are chosen by magnitude"):
        sparsify_faded(module, SLoPeConfig(**settings), folder / "step=10.ckpt")
    assert not sparse_layers(module)


def test_another_choice_of_layers_is_an_error(first_stage):
    folder, config, *_ = first_stage
    other = SLoPeConfig(mask=config.mask, exclude=("net.blocks.1",))
    with pytest.raises(ConversionError, match=r"1 layers \(net.blocks.1, ...\) are not sparse here"):
        sparsify_faded(Toy(), other, folder / "step=10.ckpt")
    more = SLoPeConfig(mask=config.mask, keep_first_dense=False)
    with pytest.raises(ConversionError, match=r"1 layers \(net.first, ...\) are not faded"):
        sparsify_faded(Toy(), more, folder / "step=10.ckpt")


# ---------------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 1.5}, {"steps": True}, {"steps": 3, "start_step": -1}])
def test_numbers(settings):
    with pytest.raises(ConfigError, match="an integer of at least"):
        FadeCallback(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of them"),
        ({"steps": 3, "fraction": 0.5}, "give one of them"),
        ({"fraction": 1.5}, "fraction=1.5"),
    ],
)
def test_steps_or_a_fraction(settings, message):
    with pytest.raises(ConfigError, match=message):
        FadeCallback(**settings)


def test_a_fraction_of_all_steps(tmp_path):
    callback, recorder = FadeCallback(fraction=0.5), Recorder()
    make_trainer(tmp_path, callback, recorder, max_steps=10).fit(Still())
    assert callback.steps == 5
    zeros = [bool((now[f"{NAMES[0]}.weight"][~callback.masks()[NAMES[0]]] == 0).all()) for now in recorder.at.values()]
    assert zeros.index(True) == 5
    with pytest.raises(ScheduleError, match=r"fraction=0\.5 of an unknown number of steps"):
        make_trainer(tmp_path, FadeCallback(fraction=0.5), max_steps=-1, max_epochs=-1).fit(Toy())


def test_random_masks():
    with pytest.raises(ConfigError, match="mask='random'"):
        FadeCallback(3, SLoPeConfig(mask="random"))
    with pytest.raises(ConfigError, match="mask='random'"):
        FadeCallback(3, SLoPeConfig(layer_masks={"*": "random"}))


def test_training_that_ends_before_the_fade(tmp_path):
    with pytest.raises(ScheduleError, match="begins at step 5 and takes 6 steps, but training ends after 10"):
        make_trainer(tmp_path, FadeCallback(6, start_step=5), max_steps=10).fit(Toy())


def test_training_that_was_stopped_before_the_fade_ended(tmp_path, capsys):
    class Stop(Toy):
        def on_train_batch_end(self, *args):
            self.trainer.should_stop = self.trainer.global_step == 3

    make_trainer(tmp_path, FadeCallback(6), max_steps=10, min_epochs=0).fit(Stop())
    assert "ended at step 3 with pruned entries at 50% of their size" in capsys.readouterr().out


def test_sparse_models_do_not_fade(tmp_path):
    with pytest.raises(ScheduleError, match="the model is sparse here"):
        make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), FadeCallback(3)).fit(Toy())


def test_a_strategy_that_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(fade, "keeps_model_whole", lambda strategy: False)
    with pytest.raises(ScheduleError, match="FadeCallback under SingleDeviceStrategy"):
        make_trainer(tmp_path, FadeCallback(3)).fit(Toy())
