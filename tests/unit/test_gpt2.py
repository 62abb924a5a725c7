"""GPT-2 against transformers: mathematics, dropout, generation, configuration; and what surgery makes of it."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn import functional as F

from slope_pl import SLoPeConfig, sparsify
from slope_pl.models import GPT2, GPT2Config, causal_lm_loss
from slope_pl.nn.selection import choose_layers

# Weights ten times larger than GPT-2's, so that attention is far from uniform and a wrong mask or scale shows.
MINI = GPT2Config(vocab_size=97, n_positions=24, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2)


def randomise(model):
    """Move biases and LayerNorms off 0 and 1: at those a swap or an omission would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def build(config=MINI, seed=0, **options):
    torch.manual_seed(seed)
    return randomise(GPT2(config, **options)).eval()


def build_theirs(config=MINI, seed=0):
    torch.manual_seed(seed)
    content = config.to_dict() | {"bos_token_id": None, "eos_token_id": None}
    return randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(content))).eval()


def copy_weights(ours, theirs):
    """By hand, not by the loader: its tests compare with transformers on their own."""
    state = {name.removeprefix("transformer."): t for name, t in theirs.state_dict().items()}
    linear = {f"{name}.weight" for name, m in ours.named_modules() if isinstance(m, torch.nn.Linear)} - {
        "lm_head.weight"
    }
    ours.load_state_dict({name: t.t() if name in linear else t for name, t in state.items()})  # strict


def tokens(config=MINI, size=2, length=16, seed=1):
    return torch.randint(0, config.vocab_size, (size, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(ours, theirs, ids):
    return (ours(ids) - theirs(ids).logits).abs().max().item()


# --- the mathematics, against transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"scale_by_inverse_layer_index": True},
        {"n_inner": 48},
        {"activation_function": "gelu"},
        {"layer_norm_epsilon": 1e-2},
    ],
)
def test_logits_equal_transformers(change):
    config = replace(MINI, **change)
    ours, theirs = build(config, seed=9), build_theirs(config)
    ids = tokens(config, length=24)
    assert difference(ours, theirs, ids) > 0.1
    copy_weights(ours, theirs)
    assert difference(ours, theirs, ids) < 1e-5
    assert difference(ours, theirs, ids[:1, :1]) < 1e-5
    if change:  # each option changes the result: were it ignored on both sides, nothing above would tell
        assert "n_inner" in change or (build(config)(ids) - build()(ids)).abs().max() > 1e-3


def test_with_the_same_random_numbers_training_equals_transformers():
    ours, theirs, ids = build(seed=9), build_theirs(), tokens()
    copy_weights(ours, theirs)
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        out = model(ids)
        results.append(out if isinstance(out, torch.Tensor) else out.logits)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def test_loss_and_gradients_equal_transformers():
    ours, theirs, ids = build(seed=9), build_theirs(), tokens()
    copy_weights(ours, theirs)
    labels = ids.clone()
    labels[0, 3:7] = labels[1, 0] = labels[1, -1] = -100
    loss, expected = causal_lm_loss(ours(ids), labels), theirs(ids, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for a, b in (
        (ours.wte.weight.grad, theirs.transformer.wte.weight.grad),  # both as embedding and as head
        (ours.h[0].attn.c_attn.weight.grad, theirs.transformer.h[0].attn.c_attn.weight.grad.t()),
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ours.parameters())


def test_future_tokens_do_not_change_earlier_logits():
    model, ids = build(), tokens()
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % MINI.vocab_size
    a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=0, atol=1e-6)
    assert ((a - b)[:, 9:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("preset", ["small", "medium", "large", "xl"])
def test_presets_have_the_numbers_of_parameters_of_the_released_models(preset):
    with torch.device("meta"):
        model = GPT2(getattr(GPT2Config, preset)())
    released = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}
    assert sum(p.numel() for p in model.parameters()) == released[preset]


def test_initialisation_is_the_published_one_and_the_head_is_tied():
    model = GPT2(replace(MINI, n_embd=128, n_layer=8, initializer_range=0.02))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / 4 if "c_proj" in name else 0.02  # 4 = sqrt(2 * 8 layers)
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
            assert abs(parameter.mean().item()) < 5 * expected / parameter.numel() ** 0.5, name
    assert model.lm_head.weight is model.wte.weight


# --- loss ------------------------------------------------------------------------------------------------------------


def test_loss_of_half_precision_logits_is_taken_in_float32():
    ids = tokens(length=24)
    logits = (8 * torch.randn(2, 24, 97)).bfloat16()
    loss = causal_lm_loss(logits, ids)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 15), (32,), (2, 1)])
def test_loss_refuses_labels_of_another_shape_and_too_short_ones(shape):
    logits = torch.zeros(2, 1 if shape == (2, 1) else 16, 97)
    with pytest.raises(ValueError, match=r"labels has shape .* expected \(B, T\) and \(B, T, vocab\) with T >= 2"):
        causal_lm_loss(logits, torch.zeros(shape, dtype=torch.int64))


# --- dropout, checkpointing, compilation, autocast -------------------------------------------------------------------


@pytest.mark.parametrize(("field", "count"), [("embd_pdrop", 1), ("resid_pdrop", 6), ("attn_pdrop", 3)])
def test_each_dropout_of_the_original_is_there_once_with_its_rate(field, count, monkeypatch):
    rates = []
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def spy_dropout(x, p=0.5, training=True, inplace=False):
        rates.append(p if training else 0.0)
        return dropout(x, p, training, inplace)

    def spy_attention(*args, dropout_p=0.0, **kwargs):
        rates.append(dropout_p)
        return attention(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "dropout", spy_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy_attention)
    config = replace(MINI, **({"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0} | {field: 0.25}))
    model = build(config).train()
    model(tokens())
    assert [rate for rate in rates if rate] == [0.25] * count
    rates.clear()
    model.eval()(tokens())
    assert not any(rates)


def test_gradient_checkpointing_changes_memory_not_numbers():
    gradients, saved = [], []
    for option in (False, True):
        model, ids, sizes = build(gradient_checkpointing=option).train(), tokens(), []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = causal_lm_loss(model(ids), ids)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 2
    torch.testing.assert_close(gradients[0], gradients[1])


def test_compiled_full_graph_equals_eager():
    torch.compiler.reset()
    model, ids = build(), tokens()
    # Backend eager: what is tested is that dynamo captures one graph; the kernels of inductor are not ours.
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids))


def test_bfloat16_autocast_stays_close():
    model, ids = build(replace(MINI, initializer_range=0.02)), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = causal_lm_loss(model(ids), ids)
    assert loss.item() == pytest.approx(causal_lm_loss(model(ids), ids).item(), rel=1e-2)


# --- sparse ----------------------------------------------------------------------------------------------------------


def test_sparsify_makes_the_published_layers_of_gpt2_small_sparse():
    model = GPT2(GPT2Config.small())
    layers = sparsify(model)
    dense = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(dense) == {"h.0.attn.c_attn", "lm_head"}
    assert len(layers) == 4 * 12 - 1
    sparse_weights = 2 * sum(layer.values.numel() for layer in layers.values())
    assert sparse_weights == 83_165_184
    assert sparse_weights + dense["h.0.attn.c_attn"].weight.numel() == 84_934_656


def test_in_gpt2_large_the_same_layers_stay_dense():
    with torch.device("meta"):
        model = GPT2(GPT2Config.large())
    choices = choose_layers(model, SLoPeConfig())
    reasons = {c.name: c.reason for c in choices if c.reason is not None}
    assert reasons == {"h.0.attn.c_attn": "first linear layer after the input", "lm_head": "its weight is tied to wte"}
    assert sum(c.module.weight.numel() for c in choices if c.name not in reasons) == 702_873_600


def test_a_sparse_gpt2_trains_and_generates():
    model, ids = build().train(), tokens()
    layers = sparsify(model, SLoPeConfig(adapter_rank=2))
    assert len(layers) == 4 * 3 - 1
    assert {"h.0.attn.c_attn", "lm_head"}.isdisjoint(layers)
    assert model.lm_head.weight is model.wte.weight
    causal_lm_loss(model(ids), ids).backward()
    assert all(layer.values.grad.abs().max() > 0 for layer in layers.values())
    assert model.generate(ids, 2).shape == (2, 18)


# --- generation ------------------------------------------------------------------------------------------------------


def test_greedy_generation_equals_transformers():
    ours, theirs, ids = build(seed=9), build_theirs(), tokens(length=5)
    copy_weights(ours, theirs)
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert torch.equal(ours.generate(ids, 12, temperature=0), expected)
    assert torch.equal(ours.generate(ids, 12, top_k=1), expected)
    assert torch.equal(ours.generate(ids, 0), ids)


def test_generation_repeats_with_the_generator_and_leaves_the_model_as_it_was():
    model, ids = build().train(), tokens()

    def draw(seed):
        return model.generate(ids, 6, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(draw(0), first)
    assert not torch.equal(draw(1), first)
    assert torch.equal(torch.get_rng_state(), state)  # neither dropout nor sampling took from the global one
    assert torch.equal(first[:, :16], ids)
    assert all(module.training for module in model.modules())


def test_generation_past_the_context_sees_the_newest_tokens():
    model, ids = build(), tokens(length=30)
    generated = model.generate(ids, 8, generator=torch.Generator().manual_seed(0))
    # Drawn, not greedy: greedily a model of random weights repeats one token, wherever it looks.
    generator, expected = torch.Generator().manual_seed(0), ids
    for _ in range(8):
        chances = model(expected[:, -24:])[:, -1].softmax(-1)
        expected = torch.cat([expected, torch.multinomial(chances, 1, generator=generator)], dim=1)
    assert torch.equal(generated, expected)


def test_temperature_and_top_k_shape_the_distribution():
    model, ids = build(), tokens(size=1, length=4).expand(4000, 4)
    logits = model(ids[:1])[0, -1]
    for temperature, top_k in ((1.0, None), (0.7, 5), (2.0, 500)):
        best = logits.topk(min(top_k or 97, 97))
        expected = torch.zeros(97).index_put((best.indices,), (best.values / temperature).softmax(0))
        drawn = model.generate(ids, 1, temperature, top_k, torch.Generator().manual_seed(0))[:, -1]
        shares = drawn.bincount(minlength=97) / 4000
        error = (expected * (1 - expected) / 4000).sqrt()
        assert (shares[expected == 0] == 0).all()
        assert ((shares - expected).abs() <= 5 * error + 1e-3).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1, expected at least 0"),
        ({"temperature": -0.5}, "temperature=-0.5, expected at least 0"),
        ({"temperature": math.nan}, "temperature=nan, expected at least 0"),
        ({"top_k": 0}, "top_k=0, expected at least 1, or None"),
    ],
)
def test_generation_refuses_values_out_of_range(change, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        build().generate(**({"tokens": tokens(), "max_new_tokens": 1} | change))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16,), (2, 25), (2, 0), (1, 2, 3)])
def test_forward_refuses_wrong_shapes_and_too_long_sequences(shape):
    with pytest.raises(ValueError, match=r"input_ids has shape \(.*, expected \(B, T\) with 1 <= T <= n_positions=24"):
        build()(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("bad", [97, -1, -100])
def test_forward_refuses_token_ids_out_of_range(bad):
    ids = tokens()
    ids[1, 3] = bad
    with pytest.raises(ValueError, match=rf"input_ids holds {bad}, expected token ids in \[0, vocab_size=97\)"):
        build()(ids)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("vocab_size", 0, "an integer of at least 1"),
        ("n_embd", 768.0, "an integer of at least 1"),
        ("n_layer", True, "an integer of at least 1"),
        ("n_inner", 0, "an integer of at least 1"),
        ("n_head", 5, "a divisor of n_embd=768"),
        ("activation_function", "swish", "one of"),
        ("resid_pdrop", 1.0, r"a number in \[0, 1\)"),
        ("attn_pdrop", math.nan, r"a number in \[0, 1\)"),
        ("embd_pdrop", "0.1", r"a number in \[0, 1\)"),
        ("initializer_range", -0.02, "a positive number"),
        ("layer_norm_epsilon", math.inf, "a positive number"),
        ("scale_by_inverse_layer_index", 1, "True or False"),
    ],
)
def test_config_refuses_naming_field_value_and_expectation(field, value, expected):
    with pytest.raises(ValueError, match=rf"GPT2Config: {field}={value!r}, expected {expected}.*; .+\."):
        GPT2Config(**{field: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "bert"),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("quantization_config", {"bits": 4}),
        ("activation_function", "silu"),
    ],
)
def test_from_dict_refuses_other_mathematics(key, value):
    with pytest.raises(ValueError, match=f"GPT2Config: {key}="):
        GPT2Config.from_dict(MINI.to_dict() | {key: value})


def test_from_dict_reads_what_transformers_writes_and_to_dict_gives_it_back():
    content = transformers.GPT2Config(n_embd=36, scale_attn_by_inverse_layer_idx=True).to_dict()
    config = GPT2Config.from_dict(content)
    assert config == GPT2Config(n_embd=36, scale_by_inverse_layer_index=True)
    assert GPT2Config.from_dict(config.to_dict()) == config
    assert config.to_dict()["scale_attn_by_inverse_layer_idx"] is True


def test_presets_take_overrides():
    config = GPT2Config.xl(n_layer=2, vocab_size=50304, scale_by_inverse_layer_index=True)
    assert (config.n_embd, config.n_head, config.inner, config.n_layer) == (1600, 25, 6400, 2)
    assert (config.vocab_size, config.scale_by_inverse_layer_index) == (50304, True)
