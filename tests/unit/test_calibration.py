"""Activation norms: what each layer is multiplied with, summed by loops that share no code with the hooks."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from slope_pl import ConversionError, SLoPeConfig, activation_norms, sparse_layers, sparsify
from slope_pl.nn import choose_layers
from slope_pl.sparsity import make_mask
from tests.unit import bert_cases
from tests.unit.reference import gaussian, mask_of

CALIBRATED = SLoPeConfig(mask_calibration_batches=3)


class Net(nn.Module):
    """The input of every sparse layer is easy to write down; dropout and a running mean show a wrong mode."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Linear(16, 16)
            self.norm = nn.BatchNorm1d(16)
            self.dropout = nn.Dropout(0.5)
            self.up = nn.Linear(16, 32)
            self.down = nn.Linear(32, 16)

    def forward(self, x):
        return self.down(F.gelu(self.up(self.dropout(self.norm(self.first(x))))))


def batches(n=3, rows=5):
    return [gaussian(rows, 16, seed=i) for i in range(n)]


def loop_norms(rows):
    """The Euclidean norm of every column, one Python float after the other."""
    rows = [row for part in rows for row in part.double().tolist()]
    return [math.sqrt(math.fsum(row[j] ** 2 for row in rows)) for j in range(len(rows[0]))]


def captured_inputs(model, name, run):
    """Inputs of one layer, as a model in evaluation mode sees them."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        run()
    handle.remove()
    return seen


def test_norms_equal_a_loop():
    model = Net().train()
    norms = activation_norms(model, CALIBRATED, batches())
    assert set(norms) == {"up", "down"}, "those that become sparse: the first layer does not"
    model.eval()
    up, down = [], []
    with torch.no_grad():
        for x in batches():
            up.append(model.norm(model.first(x)))
            down.append(F.gelu(model.up(up[-1])))
    for name, rows in (("up", up), ("down", down)):
        assert norms[name].dtype == torch.float32
        assert norms[name].tolist() == pytest.approx(loop_norms(rows), rel=1e-5)


def test_the_model_is_left_as_it_was():
    model = Net().train()
    model.dropout.eval()  # frozen by its owner
    before = copy.deepcopy(model.state_dict())
    activation_norms(model, CALIBRATED, batches())
    assert [m.training for m in (model, model.norm, model.dropout, model.up)] == [True, True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), (
        "no running mean moved"
    )
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_model_is_left_as_it_was_after_an_error():
    model = Net().train()
    with pytest.raises(RuntimeError, match="shapes"):
        activation_norms(model, CALIBRATED, [torch.zeros(2, 7)])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_forward_of_ones_own_runs_without_gradients():
    model, graphs = Net(), []
    norms = activation_norms(model, CALIBRATED, batches(), lambda x: graphs.append(model(2 * x).requires_grad))
    assert graphs == [False] * 3
    doubled = activation_norms(model, CALIBRATED, [2 * x for x in batches()])
    torch.testing.assert_close(norms, doubled, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["qa", "classification"])
def test_padding_does_not_count(kind):
    model = bert_cases.build(kind)
    data = [bert_cases.batch(seed=seed) for seed in (1, 2)]
    norms = activation_norms(model, CALIBRATED, data)
    for name in ("bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.2.attention.self.key"):
        inputs = captured_inputs(model, name, lambda: [model(**batch) for batch in data])
        rows = [
            x[i, : int(batch["attention_mask"][i].sum())]
            for x, batch in zip(inputs, data, strict=True)
            for i in range(len(x))
        ]
        assert sum(map(len, rows)) == 2 * (16 + 11)
        assert norms[name].tolist() == pytest.approx(loop_norms(rows), rel=1e-5)
    if kind == "classification":  # a pooled token is no padding
        pooled = captured_inputs(model, "bert.pooler.dense", lambda: [model(**batch) for batch in data])
        assert norms["bert.pooler.dense"].tolist() == pytest.approx(loop_norms(pooled), rel=1e-5)


class Flat(nn.Module):
    """Hands a layer ``(B * T, d)``, with NaN at padding."""

    def __init__(self):
        super().__init__()
        self.first, self.flat, self.deep = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, attention_mask):
        x = torch.where(attention_mask[..., None].bool(), x, math.nan)
        return self.deep(x), self.flat(x.flatten(0, 1))


def test_flattened_inputs_and_nan_at_padding():
    x = gaussian(2, 3, 16)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    norms = activation_norms(Flat(), CALIBRATED, [{"x": x, "attention_mask": mask}])
    expected = loop_norms([x[0, :2], x[1, :1]])
    assert norms["flat"].tolist() == pytest.approx(expected, rel=1e-5)
    assert norms["deep"].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_mask_can_come_from_elsewhere():
    x = gaussian(2, 3, 16)
    net = nn.Sequential(nn.Linear(16, 16), nn.Identity(), nn.Linear(16, 16))
    whole = activation_norms(net, CALIBRATED, [(x,)])
    part = activation_norms(net, CALIBRATED, [(x,)], mask_of=lambda batch: torch.tensor([[1, 1, 1], [0, 0, 0]]))
    alone = activation_norms(net, CALIBRATED, [(x[:1],)])
    torch.testing.assert_close(part, alone)
    assert not torch.allclose(whole["2"], part["2"])


def test_conv1d_has_its_features_first():
    config = hf.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, n_positions=16, vocab_size=64, bos_token_id=0, eos_token_id=0
    )
    model = hf.GPT2LMHeadModel(config).eval()
    ids = {"input_ids": torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))}
    norms = activation_norms(model, CALIBRATED, [ids])
    assert {name: len(norm) for name, norm in norms.items()} == {
        "transformer.h.0.attn.c_proj": 32,
        "transformer.h.0.mlp.c_fc": 32,
        "transformer.h.0.mlp.c_proj": 128,
    }
    inputs = captured_inputs(model, "transformer.h.0.mlp.c_proj", lambda: model(**ids))
    rows = [x.flatten(0, 1) for x in inputs]
    assert norms["transformer.h.0.mlp.c_proj"].tolist() == pytest.approx(loop_norms(rows), rel=1e-5)


def test_low_precision_is_summed_in_float32():
    model = Net().to(torch.bfloat16).eval()
    data = [x.to(torch.bfloat16) for x in batches(n=40, rows=64)]
    norms = activation_norms(model, CALIBRATED, data)
    rows = captured_inputs(model, "up", lambda: [model(x) for x in data])
    # 2,560 squares near 1: a sum in bfloat16 stops at 256.
    assert norms["up"].tolist() == pytest.approx(loop_norms(rows), rel=1e-4)


# ---------------------------------------------------------------------------------------------------- errors


def test_no_batch():
    with pytest.raises(ConversionError, match="no activations were seen: there is no batch"):
        activation_norms(Net(), CALIBRATED, [])


def test_a_layer_that_is_never_called():
    model = Net()
    model.unused = nn.Linear(16, 16)
    with pytest.raises(ConversionError, match=r"1 layers saw no input \(unused\).*Exclude them"):
        activation_norms(model, CALIBRATED, batches())


def test_activations_that_are_not_finite():
    with pytest.raises(ConversionError, match="inputs of layer 'up' are not finite"):
        activation_norms(Net(), CALIBRATED, [torch.full((2, 16), math.inf)])


def test_a_sparse_model_has_no_dense_activations():
    model = Net()
    sparsify(model, SLoPeConfig())
    with pytest.raises(ConversionError, match="'up' is sparse already"):
        activation_norms(model, CALIBRATED, batches())


# ---------------------------------------------------------------------------------------------------- sparsify


@pytest.mark.parametrize("kind", ["magnitude", "transposable"])
def test_sparsify_chooses_by_the_norms(kind):
    config = SLoPeConfig(mask=kind, mask_calibration_batches=3)
    model = Net()
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in ("up", "down")}
    norms = activation_norms(model, config, batches())
    for name, layer in sparsify(model, config, norms=norms).items():
        expected = make_mask(kind, dense[name], scale=norms[name])
        assert torch.equal(mask_of(layer.indices), expected)
        assert not torch.equal(expected, make_mask(kind, dense[name]))


def test_wanda_loses_less_of_the_outputs_where_features_differ_in_size():
    """What it is for: inputs with outlying features, as transformers have them."""
    weight, x = gaussian(64, 64), gaussian(512, 64, seed=1) * gaussian(64, seed=2).mul(1.5).exp()
    exact = x @ weight.t()
    lost = [
        float(
            (x @ torch.where(make_mask("magnitude", weight, scale=scale), weight, 0.0).t() - exact).norm()
            / exact.norm()
        )
        for scale in (None, x.norm(dim=0))
    ]
    assert lost[1] < 0.6 * lost[0]


def test_norms_are_needed_wanted_and_complete():
    model, norms = Net(), activation_norms(Net(), CALIBRATED, batches())
    with pytest.raises(ConversionError, match=r"mask_calibration_batches=3.*no norms are given.*activation_norms"):
        sparsify(model, CALIBRATED)
    with pytest.raises(ConversionError, match="mask_calibration_batches=0 says that masks are chosen by magnitude"):
        sparsify(model, SLoPeConfig(), norms=norms)
    with pytest.raises(ConversionError, match=r"the norms lack 1 layers \(down, ...\)"):
        sparsify(model, CALIBRATED, norms={"up": norms["up"]})
    with pytest.raises(ConversionError, match=r"the norms hold 1 layers \(first, ...\)"):
        sparsify(model, CALIBRATED, norms=norms | {"first": torch.ones(16)})
    assert not sparse_layers(model), "an error changes nothing"
    assert all(c.reason is None for c in choose_layers(model, CALIBRATED) if c.name != "first")


def test_masks_that_follow_are_held_by_magnitude():
    model, plain = Net(), Net()
    sparsify(model, CALIBRATED, masks_follow=True)
    sparsify(plain, SLoPeConfig())
    assert torch.equal(model.up.indices, plain.up.indices)
    norms = activation_norms(Net(), CALIBRATED, batches())
    chosen = Net()
    sparsify(chosen, CALIBRATED, norms=norms)
    model.load_state_dict(chosen.state_dict())
    x = gaussian(3, 16)
    assert torch.equal(model.eval()(x), chosen.eval()(x))


def test_a_shared_layer_is_measured_once_and_over_all_its_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(self.first(x)))

    model = Twice().eval()
    norms = activation_norms(model, CALIBRATED, batches())
    rows = captured_inputs(model, "a", lambda: [model(x) for x in batches()])
    assert len(rows) == 6
    assert norms["a"].tolist() == pytest.approx(loop_norms(rows), rel=1e-5)
    layers = sparsify(model, CALIBRATED, norms=norms)
    assert set(layers) == {"a"}
    assert model.a is model.b
