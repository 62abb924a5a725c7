"""Two sparse layers around a GELU as one operation: the numbers, who gets it, and who sees the modules in between."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slope_pl import SLoPeConfig, SparseLinear, sparsify, wake_adapters
from slope_pl.models import BertConfig, BertForQuestionAnswering
from slope_pl.models.gpt2 import GPT2, GPT2Config
from slope_pl.nn import sparse_mlp
from slope_pl.ops import get_backend, register_backend

APPROXIMATE = ("none", "tanh")


@pytest.fixture
def fusing(monkeypatch):
    """The reference backend as one that fuses, and the number of times that it did."""
    reference, calls = get_backend("reference"), []

    def forward_gelu(*args):
        calls.append(args[-1])
        return reference.forward_gelu(*args)

    register_backend(dataclasses.replace(reference, fuses_gelu=lambda place: True, forward_gelu=forward_gelu))
    yield calls
    register_backend(reference)


def layers(dtype=torch.float64, bias=True, rank=0, seed=0, **settings):
    torch.manual_seed(seed)
    config = SLoPeConfig(adapter_rank=rank, backend="reference", **settings)
    up, down = nn.Linear(16, 48, bias, dtype=dtype), nn.Linear(48, 24, bias, dtype=dtype)
    return SparseLinear.from_linear(up, config, seed=1), SparseLinear.from_linear(down, config, seed=2)


def results(x, up, activation, down, call=sparse_mlp):
    """The output and all gradients, after a backward pass."""
    x = x.detach().clone().requires_grad_()
    parameters = [p for layer in (up, down) for p in layer.parameters() if p.requires_grad]
    y = call(x, up, activation, down)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def in_turn(x, up, activation, down):
    return down(activation(up(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (16,), (0, 16)])
def test_equals_the_modules_one_after_the_other(fusing, shape, approximate, dtype):
    up, down = layers(dtype)
    x, gelu = torch.randn(shape, dtype=dtype), nn.GELU(approximate)
    for ours, theirs in zip(results(x, up, gelu, down), results(x, up, gelu, down, in_turn), strict=True):
        assert torch.equal(ours, theirs)
    assert fusing == [True]


def test_against_numbers_written_out(fusing):
    up, down = layers()
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    pre = x.detach() @ up.dense_weight().t() + up.bias
    hidden = pre * torch.special.ndtr(pre)
    y = sparse_mlp(x, up, nn.GELU(), down)
    torch.testing.assert_close(y, hidden @ down.dense_weight().t() + down.bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    density = torch.exp(-pre.square() / 2) / (2 * torch.pi) ** 0.5
    dpre = dy @ (down.dense_weight() * down.backward_mask()) * (torch.special.ndtr(pre) + pre * density)
    torch.testing.assert_close(x.grad, dpre @ (up.dense_weight() * up.backward_mask()))
    torch.testing.assert_close(up.bias.grad, dpre.sum(0))
    torch.testing.assert_close(up.values.grad, (dpre.t() @ x.detach())[up.forward_mask()].view_as(up.values))
    torch.testing.assert_close(down.values.grad, (dy.t() @ hidden)[down.forward_mask()].view_as(down.values))


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gradcheck_where_the_mask_is_transposable(fusing, approximate):
    up, down = layers(mask="transposable")
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    parameters = [up.values, up.bias, down.values, down.bias]
    gelu = nn.GELU(approximate)
    assert torch.autograd.gradcheck(lambda x, *_: sparse_mlp(x, up, gelu, down), (x, *parameters))
    assert fusing


def test_opcheck():
    up, down = layers()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    arguments = (*up._weight(), *down._weight(), "tanh", True, True, "reference")
    torch.library.opcheck(torch.ops.slope.sparse_mlp, (x, *arguments))
    pre = torch.randn(3, 48, dtype=torch.float64)
    weight = (down.values.detach(), down.indices, down.backward_indices)
    torch.library.opcheck(
        torch.ops.slope.dgrad_gelu, (torch.randn(3, 24, dtype=torch.float64), *weight, pre, "none", "reference")
    )


@pytest.mark.parametrize("frozen", ["x", "up", "down", "biases", "all"])
def test_only_what_is_asked_for_has_a_gradient(fusing, frozen):
    up, down = layers()
    chosen = {"x": [], "up": [up.values], "down": [down.values], "biases": [up.bias, down.bias]}
    chosen["all"] = [p for layer in (up, down) for p in layer.parameters()]
    for parameter in chosen[frozen]:
        parameter.requires_grad_(False)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=frozen not in ("x", "all"))
    y = sparse_mlp(x, up, nn.GELU(), down)
    assert y.requires_grad == (frozen != "all")
    assert fusing == [frozen != "all"]
    if y.requires_grad:
        y.sum().backward()
        other = x.detach().clone().requires_grad_(x.requires_grad)
        ours = [p.grad for layer in (up, down) for p in layer.parameters()] + [x.grad]
        for layer in (up, down):
            layer.zero_grad()
        in_turn(other, up, nn.GELU(), down).sum().backward()
        theirs = [p.grad for layer in (up, down) for p in layer.parameters()] + [other.grad]
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_nothing_is_kept_without_gradients(fusing):
    up, down = layers()
    with torch.no_grad():
        y = sparse_mlp(torch.randn(3, 16, dtype=torch.float64), up, nn.GELU(), down)
    assert not y.requires_grad
    assert fusing == [False]


def test_it_cannot_be_differentiated_twice(fusing):
    up, down = layers()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    y = sparse_mlp(x, up, nn.GELU(), down)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def _hooked(up, down):
    up.register_forward_hook(lambda *_: None)


def _awake(up, down):
    down.wake_adapters()


def _parametrized(up, down):
    torch.nn.utils.parametrize.register_parametrization(up, "bias", nn.Identity())


@pytest.mark.parametrize("change", [_hooked, _awake, _parametrized])
def test_what_cannot_be_fused_runs_as_written(fusing, change):
    up, down = layers(rank=2)
    change(up, down)
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(sparse_mlp(x, up, nn.GELU(), down), in_turn(x, up, nn.GELU(), down))
    assert fusing == []


@pytest.mark.parametrize("settings", [{"fuse_gelu": False}, {"bias": False}])
def test_what_is_not_to_be_fused(fusing, settings):
    up, down = layers(**settings)
    sparse_mlp(torch.randn(3, 16, dtype=torch.float64), up, nn.GELU(), down)
    assert fusing == []


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.Sequential(nn.GELU())])
def test_other_activations_run_as_written(fusing, activation):
    up, down = layers()
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(sparse_mlp(x, up, activation, down), in_turn(x, up, activation, down))
    assert fusing == []


def test_dense_layers_run_as_written():
    up, down, x = nn.Linear(8, 16), nn.Linear(16, 8), torch.randn(3, 8)
    assert torch.equal(sparse_mlp(x, up, nn.GELU(), down), down(nn.GELU()(up(x))))


def test_the_reference_alone_does_not_fuse():
    up, down = layers()
    assert not get_backend("reference").fuses_gelu(None)
    y = sparse_mlp(torch.randn(3, 16, dtype=torch.float64), up, nn.GELU(), down)
    assert "MLP" not in type(y.grad_fn).__name__


def test_autocast(fusing):
    up, down = layers(torch.float32)
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(results(x, up, nn.GELU(), down), results(x, up, nn.GELU(), down, in_turn), strict=True):
            assert ours.dtype is theirs.dtype
            assert torch.equal(ours, theirs)
    assert fusing == [True]


def test_compiled_without_breaks(fusing):
    up, down = layers(torch.float32)
    x = torch.randn(3, 16)
    compiled = torch.compile(sparse_mlp, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        results(x, up, nn.GELU(), down, compiled), results(x, up, nn.GELU(), down, in_turn), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert fusing == [True]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, up, nn.GELU(), down), in_turn(x, up, nn.GELU(), down))


def test_flops(fusing):
    up, down = layers()
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        sparse_mlp(x, up, nn.GELU(), down).sum().backward()
    half = 5 * (16 * 48 + 48 * 24)  # kept values times two operations
    assert counter.get_total_flops() == half + half + 2 * half
    assert fusing == [True]


def nets():
    bert = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return {
        "bert": BertForQuestionAnswering(bert),
        "gpt2": GPT2(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)),
    }


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_models_use_it(fusing, name):
    torch.manual_seed(0)
    net = nets()[name].eval()
    sparsify(net, SLoPeConfig(adapter_rank=2))
    plain = copy.deepcopy(net)
    for module in plain.modules():
        if isinstance(module, SparseLinear):
            module.config = dataclasses.replace(module.config, fuse_gelu=False)
    tokens = torch.randint(32, (2, 8))
    outputs = [model(tokens) for model in (net, plain)]
    for ours, theirs in zip(*([o] if isinstance(o, torch.Tensor) else o for o in outputs), strict=True):
        assert torch.equal(ours, theirs)
    assert len(fusing) == 2
    wake_adapters(net)
    net(tokens)
    assert len(fusing) == 2


def test_a_hook_on_berts_intermediate_layer_is_called(fusing):
    net, seen = nets()["bert"].eval(), []
    sparsify(net, SLoPeConfig())
    net.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *args: seen.append(args[2].shape))
    net(torch.randint(32, (2, 8)))
    assert seen == [(2, 8, 32)]
    assert len(fusing) == 1
