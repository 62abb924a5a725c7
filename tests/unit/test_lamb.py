"""LAMB against the paper's algorithm written out, closed forms, and what sparse layers and resume ask of it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slope_pl import SLoPeConfig, SparseLinear
from slope_pl.optim import Lamb
from slope_pl.sparsity import decompress


def paper_step(w, g, state, lr, decay, betas=(0.9, 0.999), eps=1e-6, correct=True, adapt=True):
    """Algorithm 2 of You et al. 2019 for one layer, in float64, with phi the identity."""
    m, v, t = state.get("m", torch.zeros_like(w)), state.get("v", torch.zeros_like(w)), state.get("t", 0) + 1
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    state.update(m=m, v=v, t=t)
    m_hat, v_hat = (m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)) if correct else (m, v)
    r = m_hat / (v_hat.sqrt() + eps)
    update = r + decay * w
    ratio = 1.0
    if adapt and w.norm() > 0 and update.norm() > 0:
        ratio = (w.norm() / update.norm()).item()
    return w - lr * ratio * update


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("always", [True, False])
def test_steps_are_those_of_the_paper(decay, correct, always):
    torch.manual_seed(0)
    shapes = [(5, 3), (7,), (2, 3, 4), (1,)]
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    expected, states = [p.detach().clone() for p in parameters], [{} for _ in shapes]
    options = {"betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": decay, "bias_correction": correct}
    optimizer = Lamb(parameters, lr=0.1, always_adapt=always, state_dtype=None, **options)
    for _ in range(6):
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            adapt = always or decay > 0
            expected[i] = paper_step(
                expected[i], p.grad, states[i], 0.1, decay, (0.8, 0.95), 1e-4, correct=correct, adapt=adapt
            )
        optimizer.step()
        for p, e in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.floats(1e-4, 1.0), st.floats(0.0, 0.5), st.floats(0.0, 0.99), st.floats(0.0, 0.9999), st.integers(1, 5),
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_setting_is_the_papers(lr, decay, beta1, beta2, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    expected, state = p.detach().clone(), {}
    optimizer = Lamb([p], lr=lr, betas=(beta1, beta2), weight_decay=decay, state_dtype=None)
    for _ in range(steps):
        p.grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        expected = paper_step(expected, p.grad, state, lr, decay, (beta1, beta2))
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-9)


def test_first_step_is_the_sign_of_the_gradient_as_long_as_lr_times_the_weight():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))  # norm 5
    p.grad = torch.tensor([1e-3, -7.0])
    Lamb([p], lr=0.1, weight_decay=0.0, eps=1e-12).step()
    step = 0.1 * 5 / math.sqrt(2)
    torch.testing.assert_close(p.detach(), torch.tensor([3.0 - step, 4.0 + step]))


def test_a_constant_gradient_keeps_the_length_of_a_step():
    """m and v with bias correction stay g and g²; without it, the first step would be longer by (1-b1)/sqrt(1-b2)."""
    p = nn.Parameter(torch.full((4,), 10.0, dtype=torch.float64))
    optimizer = Lamb([p], lr=0.01, weight_decay=0.0, eps=1e-15, state_dtype=None)
    for t in range(1, 20):
        p.grad = torch.full((4,), 0.3, dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((4,), 10 * 0.99**t, dtype=torch.float64))


def test_a_zero_weight_or_a_zero_update_has_ratio_one():
    zero, still = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
    zero.grad, still.grad = torch.ones(4), torch.zeros(4)
    Lamb([zero, still], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(zero.detach(), torch.full((4,), -0.1), rtol=1e-4, atol=0)
    assert torch.equal(still.detach(), torch.ones(4))


def test_scaling_the_loss_changes_nothing():
    """What the method is for: the step does not depend on the size of the gradient."""
    results = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6))
        optimizer = Lamb([p], lr=0.1, weight_decay=0.0, eps=1e-12)
        for _ in range(3):
            p.grad = torch.randn(6) * scale
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_each_tensor_has_its_own_ratio_and_its_own_clock():
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(4)), nn.Parameter(100 * torch.randn(4))
    alone = nn.Parameter(b.detach().clone())
    optimizer, other = Lamb([a, b], lr=0.1), Lamb([alone], lr=0.1)
    for step in range(6):
        a.grad = torch.randn(4)
        b.grad = torch.randn(4) if step >= 4 else None  # as of adapters that wake late
        before = b.detach().clone()
        if step >= 4:
            alone.grad = b.grad.clone()
            other.step()
        optimizer.step()
        assert step >= 4 or torch.equal(b.detach(), before)
    assert torch.equal(b.detach(), alone.detach())
    assert (optimizer.state[a]["step"], optimizer.state[b]["step"]) == (6, 2)


def test_groups_have_their_own_settings():
    torch.manual_seed(0)
    a, b = (nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(2))
    expected = [p.detach().clone() for p in (a, b)]
    optimizer = Lamb(
        [{"params": [a], "weight_decay": 0.1, "lr": 0.5}, {"params": [b], "weight_decay": 0.0}], lr=0.2,
        always_adapt=False, state_dtype=None,
    )  # fmt: skip
    a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
    optimizer.step()
    torch.testing.assert_close(a.detach(), paper_step(expected[0], a.grad, {}, 0.5, 0.1))
    torch.testing.assert_close(b.detach(), paper_step(expected[1], b.grad, {}, 0.2, 0.0, adapt=False))


def test_kept_values_move_as_the_dense_weight_with_zeros_does():
    """The trust ratio of half-size ``values`` is that of the kept weights: zeros add nothing to a norm."""
    torch.manual_seed(0)
    layer = SparseLinear(16, 8, config=SLoPeConfig(backend="reference"))
    layer.double()
    dense, mask = layer.dense_weight().clone(), layer.forward_mask()
    optimizer, state = Lamb([layer.values], lr=0.05, weight_decay=0.01, state_dtype=None), {}
    x = torch.randn(5, 16, dtype=torch.float64)
    for _ in range(5):
        before = layer(x).detach()
        layer(x).square().sum().backward()
        gradient = decompress(layer.values.grad, layer.indices)
        optimizer.step()
        optimizer.zero_grad()
        dense = paper_step(dense, gradient, state, 0.05, 0.01)
        torch.testing.assert_close(layer.dense_weight(), dense, rtol=1e-10, atol=1e-12)
        assert (dense[~mask] == 0).all()
        assert not torch.equal(layer(x), before), "the operands follow the step"
    assert layer.values.shape == (8, 8)
    assert optimizer.state[layer.values]["exp_avg"].shape == (8, 8)


def test_clipping_to_a_global_norm_comes_before():
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(2)]
    expected, states = [p.detach().clone() for p in ps], [{}, {}]
    optimizer = Lamb(ps, lr=0.1, state_dtype=None)
    for scale in (10.0, 0.01, 3.0):
        grads = [scale * torch.randn_like(p) for p in ps]
        norm = torch.cat(grads).norm()
        for i, p in enumerate(ps):
            p.grad = grads[i].clone()
            expected[i] = paper_step(expected[i], grads[i] / max(1.0, norm.item()), states[i], 0.1, 0.01)
        nn.utils.clip_grad_norm_(ps, 1.0)
        optimizer.step()
    for p, e in zip(ps, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-5, atol=1e-5)


# State ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state_dtype", "kept"), [(torch.float32, torch.float32), (None, torch.bfloat16)])
def test_state_of_bfloat16_parameters(state_dtype, kept):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(64).bfloat16())
    exact, state = p.detach().double(), {}
    optimizer = Lamb([p], lr=0.1, state_dtype=state_dtype)
    p.grad = torch.randn(64).bfloat16()
    exact = paper_step(exact, p.grad.double(), state, 0.1, 0.01)
    optimizer.step()
    assert {optimizer.state[p][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {kept}
    assert p.dtype == torch.bfloat16
    if state_dtype is not None:  # computed in float32, rounded once
        assert ((p.detach().double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_equals_going_on(dtype, tmp_path):
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.randn(8).to(dtype)) for _ in range(2))
    optimizer = Lamb([{"params": [p]}, {"params": [q], "weight_decay": 0.0}], lr=0.1)

    def step(optimizer, parameters, seed):
        torch.manual_seed(seed)
        for x in parameters:
            x.grad = torch.randn(8).to(dtype)
        optimizer.step()

    for seed in range(3):
        step(optimizer, (p, q), seed)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    others = [nn.Parameter(x.detach().clone()) for x in (p, q)]
    again = Lamb([{"params": [others[0]]}, {"params": [others[1]]}], lr=9.0)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert again.param_groups[0]["lr"] == 0.1
    assert again.state[others[0]]["exp_avg"].dtype == torch.float32
    assert again.state[others[0]]["step"] == 3
    for seed in range(3, 6):
        step(optimizer, (p, q), seed)
        step(again, others, seed)
    assert torch.equal(p, others[0])
    assert torch.equal(q, others[1])
    copied = copy.deepcopy(again)
    assert copied.state_dict().keys() == again.state_dict().keys()


def test_a_closure_is_called_with_gradients_on():
    p = nn.Parameter(torch.ones(2))
    optimizer = Lamb([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0
    assert not torch.equal(p.detach(), torch.ones(2))


def test_a_schedule_moves_it():
    p = nn.Parameter(torch.ones(2))
    optimizer = Lamb([p], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    p.grad = torch.ones(2)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "Lamb: lr=-0.1, expected 0 or more"),
        ({"betas": (0.9, 1.0)}, r"Lamb: betas=\(0.9, 1.0\), expected two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "Lamb: betas="),
        ({"eps": 0.0}, "Lamb: eps=0.0, expected a number above 0"),
        ({"weight_decay": -1.0}, "Lamb: weight_decay=-1.0, expected 0 or more"),
        ({"state_dtype": torch.int32}, "Lamb: state_dtype=torch.int32, expected a floating-point dtype"),
        ({"params": [{"params": [nn.Parameter(torch.ones(1))], "lr": -1.0}]}, "Lamb: lr=-1.0"),
        ({"params": []}, "empty parameter list"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        Lamb(**({"params": [nn.Parameter(torch.ones(1))]} | options))


def test_what_it_cannot_do_is_an_error(tmp_path):
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.eye(2).to_sparse()
    with pytest.raises(TypeError, match=r"gradient has layout torch.sparse_coo, expected torch.strided"):
        Lamb([p]).step()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "f"), 1), rank=0, world_size=1
    )
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    sharded = nn.Parameter(
        torch.distributed.tensor.distribute_tensor(torch.ones(4), mesh, [torch.distributed.tensor.Shard(0)])
    )
    sharded.sum().backward()
    with pytest.raises(TypeError, match="a parameter is sharded"):
        Lamb([sharded]).step()
