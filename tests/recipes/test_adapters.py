"""How adapters converge: the cosines of paths that are known, the kinds of layers, and the callback in real training."""

import math
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from recipes import convergence
from recipes.adapters import FILE, PICTURE, AdapterTrace
from recipes.convergence import Adapter, Point, cosines, layer_kind, means_by_kind, product_norm, thinned
from slope_pl import SLoPeCallback, SLoPeConfig, sparsify
from slope_pl.baselines import SRSTEConfig
from slope_pl.errors import ConfigError
from slope_pl.models import GPT2, BertConfig, BertForPreTraining, GPT2Config
from tests.lightning import baseline_runs
from tests.lightning.test_resume import saver
from tests.lightning.toy import CONFIG, QUIET, Recorder, Toy, fit, make_trainer

pytestmark = QUIET
WAKE, TOTAL = 12, 20  # of CONFIG


def adapter(d_out: int = 6, d_in: int = 5, rank: int = 3, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))


# ---------------------------------------------------------------------------------------------------- cosines


@pytest.mark.parametrize("degrees", [0, 30, 60, 90, 135, 180])
def test_cosine_of_a_rotated_path(degrees):
    """Rank one: the product's cosine is the product of the factors' cosines."""
    angle = math.radians(degrees)
    final = Adapter(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0], [0.0]]))
    now = Adapter(
        torch.tensor([[math.cos(angle), math.sin(angle)]]), 5 * torch.tensor([[math.cos(angle)], [math.sin(angle)]])
    )
    first = Adapter(torch.tensor([[0.0, 2.0]]), torch.zeros(2, 1))
    found = cosines(now, final, first)
    assert found.down == pytest.approx(math.cos(angle), abs=1e-6)
    assert found.up == pytest.approx(math.cos(angle), abs=1e-6)
    assert found.product == pytest.approx(math.cos(angle) ** 2, abs=1e-6)
    moved, way = torch.tensor([math.cos(angle), math.sin(angle) - 2]), torch.tensor([2.0, -2.0])
    assert found.down_change == pytest.approx(float(torch.cosine_similarity(moved, way, dim=0)), abs=1e-6)


def test_the_products_cosine_is_that_of_the_whole_matrices():
    a, b = adapter(seed=1), adapter(seed=2)
    formed = torch.cosine_similarity((a.up @ a.down).flatten(), (b.up @ b.down).flatten(), dim=0)
    assert cosines(a, b, a).product == pytest.approx(float(formed), abs=1e-6)
    assert product_norm(a) == pytest.approx(float((a.up @ a.down).norm() / 3), rel=1e-6)


def test_the_products_cosine_does_not_see_factors_that_trade_places():
    a, turn = adapter(), torch.linalg.qr(adapter(3, 3, 3, seed=5).down)[0]
    turned = Adapter(turn @ a.down, a.up @ turn.t())
    found = cosines(turned, a, a)
    assert found.product == pytest.approx(1, abs=1e-6)
    assert found.down < 0.9


def test_what_is_undefined_is_nan():
    a = adapter()
    asleep = Adapter(a.down, torch.zeros_like(a.up))
    found = cosines(asleep, a, asleep)
    assert found.down == pytest.approx(1)
    assert all(map(math.isnan, (found.up, found.product, found.down_change)))
    broken = Adapter(a.down, a.up * math.inf)
    assert math.isnan(cosines(broken, a, a).product)


# ---------------------------------------------------------------------------------------------------- kinds and rows


def test_kinds_of_our_models():
    gpt2 = GPT2(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=16))
    found = [layer_kind(name) for name in sparsify(gpt2, SLoPeConfig())]
    block = ["c_attn", "c_proj (attn)", "c_fc", "c_proj (mlp)"]
    assert found == [*block[1:], *block]  # layer 0's c_attn stays dense
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertForPreTraining(BertConfig.from_dict({**config, "vocab_size": 64}))
    found = [layer_kind(name) for name in sparsify(bert, SLoPeConfig())]
    block = ["query", "key", "value", "attention output", "intermediate", "output"]
    assert found == [*block[3:], *block, "pooler.dense", "transform.dense"]
    hf = pytest.importorskip("transformers")
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 64}
    distilbert = hf.DistilBertForQuestionAnswering(hf.DistilBertConfig(**sizes))
    assert {layer_kind(name) for name in sparsify(distilbert, SLoPeConfig())} == set(block)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("net._orig_mod.h.11.mlp.c_proj", "c_proj (mlp)"),
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj"),
        ("model.layers.3.experts.7.w1", "w1"),
        ("net.blocks.2", "net.blocks"),
        ("a.b.c.d", "c.d"),
        ("fc", "fc"),
    ],
)
def test_kinds_of_others(name, kind):
    assert layer_kind(name) == kind


def test_rows_survive_the_file_and_means_leave_out_what_is_undefined(tmp_path):
    points = [
        Point(5, 1, "c_fc", "h.0", 1.0, math.nan, 0.5, 0.25, 0.1),
        Point(5, 1, "c_fc", "h.1", 0.0, 0.5, 0.7, math.nan, 0.3),
        Point(5, 1, "c_attn", "h.1", 1.0, math.nan, 1.0, 1.0, 0.0),
    ]
    convergence.write(tmp_path / "a.csv", points)
    assert repr(convergence.read(tmp_path / "a.csv")) == repr(points)
    c_fc, c_attn = means_by_kind(points)
    assert (c_fc.kind, c_fc.layer) == ("c_fc", "2 layers")
    assert (c_fc.cosine_down, c_fc.cosine_up, c_fc.cosine_product) == (0.5, 0.5, pytest.approx(0.6))
    assert (c_attn.layer, str(c_attn.cosine_up)) == ("1 layer", "nan")


def test_thinned_keeps_first_and_last():
    points = [Point(step, step, "k", name, *[0.0] * 5) for step in range(101) for name in ("a", "b")]
    assert [point.step for point in thinned(points, 5)] == [step for step in (0, 25, 50, 75, 100) for _ in "ab"]
    assert thinned(points, 101) == points


# ---------------------------------------------------------------------------------------------------- the callback


def trace(tmp_path, run=fit, config=CONFIG, logger=True, full_steps=32, **settings):
    """Train with a trace; the rows of its file, and a record of the states."""
    recorder, callback = Recorder(), AdapterTrace(full_steps)
    logger = CSVLogger(tmp_path, name="log", version="0") if logger else False
    arguments = (tmp_path, Toy(), recorder, callback) if run is fit else (tmp_path, config, Toy(), recorder, callback)
    given = {"config": config} if run is fit else {}
    found = run(*arguments, logger=logger, **given, **settings)
    module = found[0] if run is fit else found.module
    folder = tmp_path / "log/0" if logger else tmp_path
    points = convergence.read(folder / FILE) if (folder / FILE).is_file() else None
    return SimpleNamespace(points=points, at=recorder.at, final=module.state_dict(), callback=callback, folder=folder)


def adapters_of(state, layer: str) -> Adapter:
    return Adapter(state[f"{layer}.adapter_down"], state[f"{layer}.adapter_up"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_are_the_cosines_of_the_states(tmp_path, capsys, accumulate):
    """Recomputed from whole products of the states that another callback has recorded."""
    run = trace(tmp_path, accumulate_grad_batches=accumulate)
    layers = [f"net.blocks.{i}" for i in range(3)]
    assert [(p.step, p.since_wake, p.layer) for p in run.points] == [
        (step, step - WAKE, layer) for step in range(WAKE, TOTAL + 1) for layer in layers
    ]
    assert {p.kind for p in run.points} == {"net.blocks"}
    for point in run.points:
        now = adapters_of(run.final if point.step == TOTAL else run.at[point.step], point.layer)
        final, first = adapters_of(run.final, point.layer), adapters_of(run.at[WAKE], point.layer)
        values = (run.final if point.step == TOTAL else run.at[point.step])[f"{point.layer}.values"]

        def cosine(a, b):
            found = float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0, eps=0))
            return pytest.approx(found, abs=1e-6, nan_ok=True)

        assert point.cosine_down == cosine(now.down, final.down)
        assert point.cosine_up == cosine(now.up, final.up)
        assert point.cosine_product == cosine(now.up @ now.down, final.up @ final.down)
        assert point.cosine_down_change == cosine(now.down - first.down, final.down - first.down)
        assert point.product_share == pytest.approx(float((now.up @ now.down / 4).norm() / values.norm()), rel=1e-4)
    assert "<svg" in (run.folder / PICTURE).read_text()
    assert f"9 values of 3 layers' adapters: {run.folder / FILE} and {PICTURE}" in capsys.readouterr().out


def test_srste_is_traced_too(tmp_path):
    run = trace(tmp_path, baseline_runs.fit, baseline_runs.SRSTE)
    assert [p.step for p in run.points] == [step for step in range(WAKE, TOTAL + 1) for _ in range(3)]
    last = run.points[-1]
    assert last.cosine_product == pytest.approx(1)
    layer = adapters_of(run.final, last.layer)
    weight = run.final[f"{last.layer}.weight"] * run.final[f"{last.layer}.mask"]
    assert last.product_share == pytest.approx(float((layer.up @ layer.down / 4).norm() / weight.norm()), rel=1e-4)


@pytest.mark.parametrize("run", [fit, baseline_runs.fit])
def test_rank_zero_says_that_there_is_nothing(tmp_path, capsys, run):
    config = SLoPeConfig(backward_refresh_steps=5) if run is fit else SRSTEConfig(decay=0.01)
    assert trace(tmp_path, run, config, logger=False, max_steps=2).points is None
    assert "AdapterTrace has no effect: the model has no adapters" in capsys.readouterr().out


def test_adapters_that_never_wake_leave_no_file(tmp_path, capsys):

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    fit(tmp_path, None, AdapterTrace(), Stop())
    assert not (tmp_path / FILE).exists()
    assert "no step was made with awake adapters" in capsys.readouterr().out


def test_after_a_resume_the_curve_begins_there(tmp_path, capsys):
    fit(tmp_path, None, saver(tmp_path), enable_checkpointing=True, max_steps=TOTAL)
    callback = AdapterTrace()
    module = Toy()
    make_trainer(tmp_path, callback, SLoPeCallback(CONFIG)).fit(module, ckpt_path=tmp_path / "step=15.ckpt")
    assert sorted({(p.step, p.since_wake) for p in callback.points}) == [(s, s - WAKE) for s in range(15, TOTAL + 1)]
    assert callback.points[0].cosine_up < 1
    assert "the curve begins 3 steps after the wake, where this run did" in capsys.readouterr().out


def test_the_order_of_the_callbacks_does_not_matter(tmp_path):
    callback = AdapterTrace()
    make_trainer(tmp_path, callback, SLoPeCallback(CONFIG)).fit(Toy())
    assert [p.step for p in callback.points][::3] == [*range(WAKE, TOTAL + 1)]


def test_spacing_grows(tmp_path):
    run = trace(tmp_path, full_steps=2)
    assert sorted({p.since_wake for p in run.points}) == [0, 1, 2, 4, 8]
    kept = [age for age in range(4001) if AdapterTrace()._is_kept(age)]
    assert kept[:34] == [*range(33), 34]
    assert len(kept) == 144


def test_too_large_a_trace_is_thinned_with_a_warning(tmp_path):
    size = 4 * 4 * (16 + 32 + 32 + 32 + 32 + 16)  # float32, rank 4, the sides of the three blocks
    callback = AdapterTrace(full_steps=8, max_bytes=6 * size)
    with pytest.warns(UserWarning, match=f"more than max_bytes={6 * size}"):
        fit(tmp_path, None, callback)
    ages = sorted({p.since_wake for p in callback.points})
    assert ages == [0, 1, 2, 4, 8]
    assert callback.points[-1].cosine_product == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"), [({"full_steps": 3}, "a power of two"), ({"max_bytes": 0}, "positive")]
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        AdapterTrace(**options)


def test_without_matplotlib_the_table_alone_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = trace(tmp_path)
    assert run.points
    assert not (run.folder / PICTURE).exists()
    assert "not drawn: matplotlib is not installed" in capsys.readouterr().out
