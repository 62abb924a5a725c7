"""The baselines' layer, masks, random pruning, surgery and settings, against cases worked out by hand or in plain loops."""

import itertools
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from slope_pl import CheckpointError, ConfigError, ConversionError, SLoPeConfig, sparsify
from slope_pl.baselines import (
    FSTConfig,
    MaskedLinear,
    SRSTEConfig,
    choose_feed_forward,
    mask_layers,
    masked_layers,
    mvue_two_of_four,
    unmask_layers,
)
from slope_pl.baselines.mvue import _uniform, inclusion_chance
from slope_pl.baselines.product import double_pruned_mask
from slope_pl.models import GPT2, BertConfig, BertForPreTraining, GPT2Config
from slope_pl.nn import SparseLinear, layer_seed

F, T = False, True

# Row by row the two largest are in columns (0, 1), (0, 1), (0, 2), (1, 3).
HAND = torch.tensor([[9.0, -8, 1, 2], [7, 6, -5, 0], [-4, 1, 3, 2], [0, 5, 1, -6]])
HAND_MASK = torch.tensor([[T, T, F, F], [T, T, F, F], [T, F, T, F], [F, T, F, T]])
# Down the columns, of those: 9 and 7 before 4; 8 and 6 before 5; 3 alone; 6 alone.
HAND_TWICE = torch.tensor([[T, T, F, F], [T, T, F, F], [F, F, T, F], [F, F, F, T]])
# 9 + 8, 7 + 5, 3 + 2, 5 + 6 = 45. Greedy is worse: 9 + 8 and 7 + 6 leave 3 + 2 and 1 + 6, 42; that all other patterns keep
# less is tried in the test.
HAND_TILE = torch.tensor([[T, T, F, F], [T, F, T, F], [F, F, T, T], [F, T, F, T]])


def make(tile=HAND, bias=True, kind="linear", repeat=2, **options):
    """A layer of 8x8: the tile four times."""
    weight = tile.repeat(repeat, repeat)
    if kind == "conv":
        linear = Conv1D(weight.shape[0], weight.shape[1])
        linear.weight = nn.Parameter(weight.t().contiguous())
        nn.init.normal_(linear.bias)
    else:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
        linear.weight = nn.Parameter(weight.clone())
    return MaskedLinear(linear, **options)


# ---------------------------------------------------------------------------------------------------- masks


def test_magnitude_mask_by_hand():
    layer = make()
    assert torch.equal(layer.mask, HAND_MASK.repeat(2, 2))
    assert layer.backward_mask is None


def test_double_pruned_mask_by_hand():
    assert torch.equal(double_pruned_mask(HAND, HAND_MASK), HAND_TWICE)
    assert torch.equal(make(backward_pruning="weight").backward_mask, HAND_TWICE.repeat(2, 2))


def test_a_kept_zero_goes_before_a_hidden_entry():
    weight = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 0, 0]])
    mask = torch.tensor([[F, F, T, T], [F, F, T, T], [F, F, T, T], [T, T, F, F]])
    want = torch.tensor([[F, F, T, T], [F, F, T, T], [F, F, F, F], [T, T, F, F]])
    assert torch.equal(double_pruned_mask(weight, mask), want)


def test_a_weight_that_is_not_a_number_stays_visible():
    weight = HAND.clone()
    weight[2, 0] = torch.nan
    assert double_pruned_mask(weight, HAND_MASK)[:, 0].tolist() == [T, F, T, F]


def test_transposable_mask_by_hand():
    layer = make(mask="transposable")
    assert torch.equal(layer.mask, HAND_TILE.repeat(2, 2))
    rows = [[i in pair for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    tiles = [torch.tensor(t) for t in itertools.product(rows, repeat=4)]
    sums = [(HAND.abs() * t).sum().item() for t in tiles if (t.sum(0) == 2).all()]
    assert max(sums) == (HAND.abs() * HAND_TILE).sum().item() == 45
    assert sums.count(45) == 1


def test_refresh_follows_the_weight_and_counts_flips():
    layer = make(backward_pruning="weight")
    assert layer.refresh_mask() == 0
    with torch.no_grad():
        layer.weight[0, 3] = -100.0  # of the first group: 9, -8, 1, -100
    flips = layer.refresh_mask()
    assert layer.mask[0, :4].tolist() == [T, F, F, T]
    assert flips == pytest.approx(2 / 64)
    # Column 3 has 100 and 6 in the upper tile; column 1 lost its 8, so 6 and 5 stay.
    assert layer.backward_mask[:4, 3].tolist() == [T, F, F, T]
    assert layer.backward_mask[:4, 1].tolist() == [F, T, F, T]


# ---------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("pruning", ["none", "weight", "gradient"])
def test_forward_and_gradients(kind, pruning):
    layer = make(torch.randn(4, 4), kind=kind, backward_pruning=pruning).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 5, 8, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    stored = layer.weight.t() if kind == "conv" else layer.weight
    w, m, b = stored.detach(), layer.mask, layer.bias.detach()
    torch.testing.assert_close(y, x.detach() @ (m * w).t() + b)
    if pruning == "weight":
        dx = dy @ (layer.backward_mask * w)
        assert layer.backward_mask.sum() < m.sum(), "or the test does not tell it from none"
    elif pruning == "none":
        dx = dy @ (m * w)
    else:
        fours = dy.view(3, 5, 2, 4)
        smaller = fours.abs().argsort(-1)[..., :2]
        dx = fours.scatter(-1, smaller, 0.0).view(3, 5, 8) @ (m * w)
    torch.testing.assert_close(x.grad, dx)
    dw = torch.einsum("abi,abj->ij", dy, x.detach())
    got = layer.weight.grad.t() if kind == "conv" else layer.weight.grad
    torch.testing.assert_close(got, dw)
    assert (got[~m] != 0).all(), "straight through: hidden entries get a gradient as well"
    torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)))


@pytest.mark.parametrize("mask", ["magnitude", "transposable"])
def test_gradcheck(mask):
    """Numerically: x and bias under a mask, the adapters on top of it."""
    layer = make(torch.randn(4, 4), mask=mask, adapter_rank=2).double()
    layer.wake_adapters()
    nn.init.normal_(layer.adapter_up)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)

    def output(x, bias, down, up):
        values = {"bias": bias, "adapter_down": down, "adapter_up": up}
        return torch.func.functional_call(layer, values, (x,))

    assert torch.autograd.gradcheck(output, (x, layer.bias, layer.adapter_down, layer.adapter_up))


def test_gradcheck_of_kept_weights():
    """The straight-through gradient is the true one where the mask keeps: as a function of the kept weights alone."""
    layer = make(torch.randn(4, 4)).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    kept = layer.weight.detach()[layer.mask].requires_grad_()

    def output(kept):
        weight = torch.zeros_like(layer.weight).masked_scatter(layer.mask, kept)
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(output, kept)


def test_no_bias_and_frozen_weight():
    layer = make(bias=False)
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


def test_after_drop_mask_it_is_a_linear_layer():
    layer = make(torch.randn(4, 4), mask="transposable", mvue=True)
    x, dy = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)
    layer.drop_mask()
    dense = nn.Linear(8, 8)
    dense.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    layer(x).backward(dy)
    own, x.grad = x.grad, None
    dense(x).backward(dy)
    torch.testing.assert_close(own, x.grad, rtol=0, atol=0)
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"backward_pruning": "weight", "adapter_rank": 2}, {"mvue": True}], ids=str)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_autocast_and_half_storage(options, storage):
    layer = make(torch.randn(4, 4), **options).to(storage)
    layer.wake_adapters()
    x = torch.randn(3, 8, dtype=storage, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype is layer.weight.grad.dtype is layer.bias.grad.dtype is storage
    torch.testing.assert_close(y.float(), make_like(layer)(x.float()), rtol=0.03, atol=0.05)


def make_like(layer):
    dense = nn.Linear(8, 8)
    dense.load_state_dict({"weight": layer.effective_weight().float(), "bias": layer.bias.float()})
    return dense


@pytest.mark.parametrize(
    "options",
    [
        {"backward_pruning": "weight", "adapter_rank": 2},
        {"backward_pruning": "gradient"},
        {"mask": "transposable", "mvue": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")  # torch's own tracing does that
def test_compiled_in_one_graph_gives_the_same(options):
    layer = make(torch.randn(4, 4), **options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for phase in ("masked", "awake", "dense"):
        if phase == "awake":
            layer.wake_adapters()
        if phase == "dense":
            layer.drop_mask()
        layer.noise_seed.fill_(123)
        results = []
        for forward in (layer, compiled):
            layer.zero_grad()
            x = torch.arange(48.0).sin().view(6, 8).requires_grad_()
            y = forward(x)
            y.backward(torch.arange(48.0).cos().view(6, 8))
            results.append((y.detach(), x.grad, layer.weight.grad, layer.bias.grad))
        torch.testing.assert_close(*results)


# ---------------------------------------------------------------------------------------------------- random pruning


def draw(gradient, seed=1, stream=0):
    return mvue_two_of_four(gradient, torch.tensor(seed), stream)


def test_inclusion_chance_by_enumeration():
    a = torch.tensor([0.1, 1.0, 2.5, 7.0], dtype=torch.float64)
    want = [0.0] * 4
    for i, j in itertools.permutations(range(4), 2):
        chance = a[i] / a.sum() * a[j] / (a.sum() - a[i])
        want[i] += chance
        want[j] += chance
    got = inclusion_chance(a.view(1, 4, 1)).flatten()
    torch.testing.assert_close(got, torch.stack(want))
    assert got.sum().item() == pytest.approx(2)


def test_random_pruning_is_unbiased():
    """The mean over independent groups lies within 5 standard errors of the entry, for each of 4; and none is exact."""
    x = torch.tensor([0.05, -1.0, 2.0, -0.6])
    count = 200_000
    pruned = draw(x.view(4, 1).expand(4, count).contiguous())
    error = pruned.mean(1) - x
    assert (error.abs() <= 5 * pruned.std(1) / count**0.5).all()
    assert (pruned.std(1) > 0).all()
    chance = (pruned != 0).float().mean(1)
    torch.testing.assert_close(chance, inclusion_chance(x.abs().view(1, 4, 1)).flatten(), rtol=0.02, atol=0.002)


def test_random_pruning_is_unbiased_over_seeds():
    x = torch.randn(8, 3)
    total = sum(draw(x, seed) for seed in range(4000)) / 4000
    assert (total - x).abs().max() < 0.15
    assert (draw(x) - x).abs().max() > 0.3


def test_two_of_four_tokens_stay():
    pruned = draw(torch.randn(40, 6))
    assert ((pruned != 0).view(10, 4, 6).sum(1) == 2).all()


def test_kept_entries_are_scaled_by_their_chance():
    x = torch.randn(40, 6)
    pruned = draw(x)
    ratio = (x / pruned)[pruned != 0]
    want = inclusion_chance(x.abs().view(10, 4, 6)).view(40, 6)[pruned != 0]
    torch.testing.assert_close(ratio, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_does_not_matter(scale):
    x = torch.randn(8, 4, dtype=torch.float64)
    torch.testing.assert_close(draw(x * scale) / scale, draw(x))


def test_groups_with_zeros():
    x = torch.zeros(8, 1)
    x[5] = 3.0
    torch.testing.assert_close(draw(x), x, rtol=1e-5, atol=0)
    two = torch.tensor([[1.0], [0.0], [-2.0], [0.0]])
    torch.testing.assert_close(draw(two), two, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7])
def test_rows_that_do_not_fill_a_group(rows):
    x = torch.randn(rows, 5)
    pruned = draw(x)
    assert pruned.shape == x.shape
    last = rows % 4
    if last <= 2:
        torch.testing.assert_close(pruned[-last:], x[-last:], rtol=1e-4, atol=1e-5)
    total = sum(draw(x, seed) for seed in range(3000)) / 3000
    assert (total - x).abs().max() < 0.2


def test_draws_are_a_function_of_seed_and_stream():
    x = torch.randn(64, 8)
    before = torch.get_rng_state()
    assert torch.equal(draw(x, 5, 1), draw(x, 5, 1))
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    kept = {(seed, stream): draw(x, seed, stream) != 0 for seed in (5, 6) for stream in (0, 1)}
    for a, b in itertools.combinations(kept, 2):
        assert 0.3 < (kept[a] == kept[b]).float().mean() < 0.75, (a, b)


def test_uniform_numbers_are_uniform_and_independent():
    first, second = _uniform(1 << 18, torch.tensor(7), 0)
    for u in (first, second):
        assert 0 <= u.min() < 1e-4
        assert 1 - 1e-4 < u.max() < 1
        counts = torch.histc(u, 64, 0, 1)
        chi2 = ((counts - 4096) ** 2 / 4096).sum().item()
        assert abs(chi2 - 63) < 5 * math.sqrt(2 * 63)
    pairs = torch.stack([first, second, first.roll(1), first.roll(8)])
    off = torch.corrcoef(pairs) - torch.eye(4)
    assert off.abs().max() < 5 / (1 << 9)


def test_bfloat16_and_not_a_number():
    x = torch.randn(8, 4).bfloat16()
    assert draw(x).dtype is torch.bfloat16
    x[3, 2] = torch.nan
    assert draw(x)[:, 2].isnan().any(), "a gradient that became NaN stays visible"


def test_random_pruning_touches_the_weight_gradient_alone():
    exact, pruned = make(mask="transposable"), make(mask="transposable", mvue=True)
    pruned.load_state_dict(exact.state_dict())
    grads = []
    for layer in (exact, pruned):
        torch.manual_seed(1)
        x = torch.randn(8, 8, requires_grad=True)
        y = layer(x)
        layer.noise_seed.fill_(99)  # DDP and the next micro-batch move it before a late backward
        y.backward(torch.randn(8, 8))
        grads.append((y.detach(), x.grad, layer.bias.grad, layer.weight.grad))
    for a, b in zip(grads[0][:3], grads[1][:3], strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(1)
    x, dy = torch.randn(8, 8), torch.randn(8, 8)
    torch.testing.assert_close(grads[1][3], draw(dy, 0).t() @ x)


# ---------------------------------------------------------------------------------------------------- decay, phases


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_decay_pulls_hidden_weights_alone(kind):
    layer = make(kind=kind)
    layer.weight.grad = torch.ones_like(layer.weight)
    layer.add_decay(0.5)
    got = layer.weight.grad.t() if kind == "conv" else layer.weight.grad
    assert torch.equal(got[0, :4], torch.tensor([1.0, 1.0, 1.5, 2.0]))  # 9, -8 kept; 1, 2 hidden
    assert torch.equal(got[1, :4], torch.tensor([1.0, 1.0, -1.5, 1.0]))  # -5 and 0 hidden


def test_no_decay_without_gradient_or_mask():
    layer = make()
    layer.add_decay(0.5)
    assert layer.weight.grad is None
    layer.weight.grad = torch.zeros_like(layer.weight)
    layer.drop_mask()
    layer.add_decay(0.5)
    assert not layer.weight.grad.any()


def test_adapters_are_slopes_and_do_not_move_the_output_at_the_wake():
    linear = nn.Linear(16, 8)
    sparse = SparseLinear.from_linear(linear, SLoPeConfig(adapter_rank=4), seed=11)
    layer = MaskedLinear(linear, adapter_rank=4, seed=11)
    assert torch.equal(layer.adapter_down, sparse.adapter_down)
    assert not layer.adapter_up.any()
    assert not layer.adapter_up.requires_grad
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), sparse(x))
    before = layer(x)
    assert layer.wake_adapters()
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        layer.adapter_up.normal_()
        sparse.adapter_up.copy_(layer.adapter_up)
    sparse.wake_adapters()
    torch.testing.assert_close(layer(x), sparse(x))
    torch.testing.assert_close(layer.to_dense()(x), layer(x))


# ---------------------------------------------------------------------------------------------------- state


def test_parameters_stay_the_same_objects():
    linear = nn.Linear(8, 8)
    layer = MaskedLinear(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dense_checkpoint_loads_and_sets_the_mask(kind):
    layer = make(torch.randn(4, 4), kind=kind, backward_pruning="weight", adapter_rank=2)
    down = layer.adapter_down.clone()
    hand = HAND.repeat(2, 2)
    state = {"weight": hand.t() if kind == "conv" else hand, "bias": torch.ones(8)}
    layer.load_state_dict(state)
    assert set(state) == {"weight", "bias"}
    assert torch.equal(layer.mask, HAND_MASK.repeat(2, 2))
    assert torch.equal(layer.backward_mask, HAND_TWICE.repeat(2, 2))
    assert torch.equal(layer.adapter_down, down)


def test_own_state_brings_mask_and_phase():
    a = make(torch.randn(4, 4), adapter_rank=2)
    a.wake_adapters()
    with torch.no_grad():
        a.weight.mul_(torch.rand_like(a.weight))  # now the mask is an old one
    b = make(torch.randn(4, 4), adapter_rank=2)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.mask, b.mask)
    assert b.adapters_awake
    assert b.adapter_up.requires_grad
    b.load_state_dict(make(adapter_rank=2).state_dict())
    assert not b.adapters_awake
    assert not b.adapter_up.requires_grad
    dropped = make()
    dropped.drop_mask()
    c = make()
    c.load_state_dict(dropped.state_dict())
    assert not c.masked


def test_slope_checkpoint_is_refused():
    with pytest.raises(CheckpointError, match="SLoPe's 'values'"):
        make().load_state_dict(SparseLinear(8, 8).state_dict())


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_ineligible_shape(shape):
    with pytest.raises(ConversionError, match="multiples of 8"):
        MaskedLinear(nn.Linear(*shape))


# ---------------------------------------------------------------------------------------------------- surgery


def gpt2():
    return GPT2(GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2))


def bert():
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForPreTraining(BertConfig(**sizes, intermediate_size=64, max_position_embeddings=16))


@pytest.mark.parametrize("make_model", [gpt2, bert])
def test_srste_masks_what_slope_makes_sparse(make_model):
    masked, sparse = make_model(), make_model()
    sparse_names = set(sparsify(sparse, SLoPeConfig(adapter_rank=4)))
    layers = mask_layers(masked, SRSTEConfig(adapter_rank=4))
    assert set(layers) == sparse_names
    assert set(masked_layers(masked)) == sparse_names
    for name, layer in layers.items():
        assert torch.equal(layer.adapter_down, sparse.get_submodule(name).adapter_down), name


def test_gpt2_layers():
    model = gpt2()
    dense = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = dense - set(mask_layers(model, SRSTEConfig()))
    assert left == {"h.0.attn.c_attn", "lm_head"}
    assert set(mask_layers(gpt2(), FSTConfig())) == {f"h.{i}.mlp.{x}" for i in (0, 1) for x in ("c_fc", "c_proj")}


def test_bert_layers():
    want = {f"bert.encoder.layer.{i}.{x}.dense" for i in (0, 1) for x in ("intermediate", "output")}
    assert set(mask_layers(bert(), FSTConfig())) == want


def test_feed_forward_by_name():
    names = {
        "model.layers.0.mlp.gate_proj": T,
        "transformer.layer.0.ffn.lin1": T,
        "encoder.block.0.layer.1.DenseReluDense.wi": T,
        "decoder.layers.0.fc1": T,
        "encoder.layer.0.output.dense": T,
        "encoder.layer.0.attention.output.dense": F,
        "pooler.dense": F,
        "attn.c_proj": F,
        "smlp.x": F,
    }
    model = nn.Module()
    for name in names:
        parent = model
        *path, leaf = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, nn.Linear(8, 8))
    got = {c.name: c.reason is None for c in choose_feed_forward(model)}
    assert got == names


def test_targets():
    layers = mask_layers(gpt2(), FSTConfig(targets=["h.*.mlp.c_fc"]))
    assert set(layers) == {"h.0.mlp.c_fc", "h.1.mlp.c_fc"}
    assert all(layer.mask_kind == "transposable" and layer.mvue for layer in layers.values())
    with pytest.raises(ConversionError, match=r"include pattern 'h\.9\.\*' matches no linear layer"):
        mask_layers(gpt2(), FSTConfig(targets=["h.9.*"]))


def test_nothing_to_mask():
    with pytest.raises(ConversionError, match=r"not a feed-forward layer by its name.*targets"):
        mask_layers(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), FSTConfig())
    with pytest.raises(ConversionError, match="none of the 1 linear layers"):
        mask_layers(nn.Sequential(nn.Linear(8, 8)), SRSTEConfig())


def test_second_call_and_other_configs():
    model = gpt2()
    config = SRSTEConfig(adapter_rank=2)
    assert mask_layers(model, config) == mask_layers(model, SRSTEConfig(adapter_rank=2))
    with pytest.raises(ConversionError, match="masked already"):
        mask_layers(model, SRSTEConfig())
    with pytest.raises(ConversionError, match="masked already"):
        mask_layers(model, FSTConfig())
    sparse = gpt2()
    sparsify(sparse)
    with pytest.raises(ConversionError, match="SLoPe's sparse layers"):
        mask_layers(sparse, config)


@pytest.mark.parametrize("config", [SRSTEConfig(adapter_rank=2), FSTConfig()], ids=["srste", "fst"])
def test_unmask_computes_the_same(config):
    model, ids = gpt2().eval(), torch.randint(32, (2, 8))
    layers = mask_layers(model, config)
    for layer in layers.values():
        layer.wake_adapters()
        if layer.adapter_up is not None:
            nn.init.normal_(layer.adapter_up)
    want = model(ids)
    names = set(layers)
    assert set(unmask_layers(model)) == names
    assert not masked_layers(model)
    torch.testing.assert_close(model(ids), want)
    gpt2().load_state_dict(model.state_dict())


def test_conv1d_comes_back_as_conv1d():
    model = nn.Sequential(nn.Linear(8, 8), Conv1D(16, 8))
    mask_layers(model, SRSTEConfig())
    x = torch.randn(2, 8)
    want = model(x)
    unmask_layers(model)
    assert type(model[1]) is Conv1D
    torch.testing.assert_close(model(x), want)


def test_shared_layer_stays_shared():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "a": shared, "b": shared})
    assert set(mask_layers(model, SRSTEConfig())) == {"a"}
    assert model["a"] is model["b"]


def test_seed_of_the_adapters_is_the_layers_own():
    model = gpt2()
    layers = mask_layers(model, SRSTEConfig(adapter_rank=2, seed=3))
    name, layer = next(iter(layers.items()))
    want = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(layer_seed(3, name)))
    assert torch.equal(layer.adapter_down, want)


# ---------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("make_config", "settings", "message"),
    [
        (SRSTEConfig, {"decay": -1e-6}, r"decay=-1e-06: a number of at least 0"),
        (SRSTEConfig, {"decay": float("nan")}, "decay=nan"),
        (SRSTEConfig, {"decay": "6e-6"}, "decay='6e-6'"),
        (SRSTEConfig, {"mask_refresh_steps": 0}, "mask_refresh_steps=0: an integer of at least 1"),
        (SRSTEConfig, {"backward_pruning": "input"}, "backward_pruning='input' is unknown; choose one of weight, grad"),
        (SRSTEConfig, {"adapter_rank": -1}, "adapter_rank=-1"),
        (SRSTEConfig, {"adapter_rank": 4, "adapter_fraction": 0}, "adapter_fraction=0: a fraction"),
        (SRSTEConfig, {"adapter_rank": 4, "adapter_fraction": 0.1, "adapter_start_step": 3}, "both set"),
        (SRSTEConfig, {"adapter_rank": 4, "adapter_rank_fraction": 0.1}, "both"),
        (SRSTEConfig, {"adapter_start_step": 3}, "no effect without adapters"),
        (SRSTEConfig, {"adapter_fraction": 0.5}, "no effect without adapters"),
        (SRSTEConfig, {"include": "mlp"}, "include='mlp': a list of patterns"),
        (SRSTEConfig, {"seed": -1}, "seed=-1"),
        (FSTConfig, {"targets": "mlp"}, "targets='mlp': a list of patterns"),
        (FSTConfig, {"mvue": "yes"}, "mvue='yes': True or False"),
        (FSTConfig, {"dense_finish_fraction": 1.5}, "dense_finish_fraction=1.5"),
        (FSTConfig, {"dense_finish_fraction": False}, "dense_finish_fraction=False"),
        (FSTConfig, {"dense_finish_fraction": 0.5, "dense_finish_step": 3}, "both set"),
        (FSTConfig, {"dense_finish_step": -3}, "dense_finish_step=-3"),
        (FSTConfig, {"decay": float("inf")}, "decay=inf"),
    ],
)
def test_bad_settings(make_config, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**settings)


def test_defaults_are_as_published():
    assert (SRSTEConfig().decay, SRSTEConfig().mask_refresh_steps) == (6e-6, 1)
    assert (SRSTEConfig().backward_pruning, SRSTEConfig().adapter_fraction) == ("weight", 0.01)
    assert (FSTConfig().decay, FSTConfig().mask_refresh_steps, FSTConfig().mvue) == (6e-5, 40, True)
    assert FSTConfig().dense_finish_fraction == pytest.approx(50 / 300)


@pytest.mark.parametrize("config", [SRSTEConfig(adapter_rank=4, include=("a",)), FSTConfig(targets=("a", "b"))])
def test_mappings(config):
    assert type(config).coerce(config.to_dict()) == config
    assert type(config).coerce(config) is config
    with pytest.raises(ConfigError, match=r"unknown .*Config setting 'rank'; known are"):
        type(config).coerce({"rank": 4})
    with pytest.raises(ConfigError, match="got int"):
        type(config).coerce(3)
