"""GPT-2's weights on disk: what transformers writes we read, what we write it reads, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slope_pl import SLoPeConfig, sparsify
from slope_pl.models import (
    PretrainedFilesError,
    PretrainedMismatchError,
    load_gpt2,
    load_gpt2_config,
    save_gpt2,
)
from slope_pl.nn import dense_state_dict, densify
from tests.unit.test_gpt2 import MINI, build, build_theirs, difference, tokens


def write(folder, tensors, config=MINI, **content):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | content))
    save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def stored(folder):
    """The tensors of a MINI GPT-2 as we write them, under Hugging Face's names and in its layout."""
    return load_file(save_gpt2(build(), folder / "stored") / "model.safetensors")


def fails_untouched(model, folder, message, error=PretrainedMismatchError):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        load_gpt2(model, folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"scale_by_inverse_layer_index": True, "n_inner": 48, "n_head": 2}])
def test_transformers_loads_what_we_save(change, tmp_path):
    config = replace(MINI, **change)
    model = build(config)
    assert save_gpt2(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    auto = transformers.AutoModelForCausalLM
    theirs, info = auto.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs) is transformers.GPT2LMHeadModel
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert difference(model, theirs.eval(), tokens()) < 1e-5


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("change", [{}, {"scale_by_inverse_layer_index": True, "n_inner": 48, "n_head": 2}])
def test_we_load_what_transformers_saves(change, shard, tmp_path):
    config = replace(MINI, **change)
    theirs = build_theirs(config)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("model*.safetensors"))) > 1) == (shard == "20KB")
    assert load_gpt2_config(tmp_path) == config
    ours = build(load_gpt2_config(tmp_path), seed=9)
    load_gpt2(ours, tmp_path)
    assert ours.lm_head.weight is ours.wte.weight
    assert difference(ours, theirs, tokens()) < 1e-5


def test_the_round_trip_keeps_every_bit(tmp_path):
    source, model = build(), build(seed=9)
    load_gpt2(model, save_gpt2(source, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), model.parameters(), strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == {f"transformer.{name}" for name, _ in source.named_parameters()}  # the tied head once


@pytest.mark.parametrize("head", ["absent", "beside", "instead"])
def test_the_released_files_are_understood(head, tmp_path):
    # openai-community/gpt2 has no prefix and has the causal masks; other writers keep either name of the tied tensor.
    tensors = {name.removeprefix("transformer."): t for name, t in stored(tmp_path).items()}
    for layer in range(MINI.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(24, 24).tril()[None, None]
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if head != "absent":
        tensors["lm_head.weight"] = tensors["wte.weight"]
    if head == "instead":
        del tensors["wte.weight"]
    model = build(seed=9)
    load_gpt2(model, write(tmp_path, tensors))
    assert torch.equal(model(tokens()), build()(tokens()))


def test_a_sparse_model_is_saved_through_its_dense_weights(tmp_path):
    model = build()
    sparsify(model, SLoPeConfig(adapter_rank=2))
    with pytest.raises(ValueError, match=r"Not the weights of a dense GPT2: 11 absent \(h.0.attn.c_proj.weight, "):
        save_gpt2(model, tmp_path)
    assert not list(tmp_path.iterdir())
    save_gpt2(model, tmp_path, dense_state_dict(model))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert difference(model.eval(), theirs, tokens()) < 1e-5
    densify(model)
    save_gpt2(model, tmp_path / "densified")
    assert difference(model, theirs, tokens()) < 1e-5


def test_half_precision_checkpoints_take_the_dtype_of_the_model(tmp_path):
    source, model = build().half(), build(seed=9)
    load_gpt2(model, save_gpt2(source, tmp_path))
    assert load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].dtype == torch.float16
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model(tokens()), source.float()(tokens()))


def test_a_larger_vocabulary_gets_mean_rows_that_hardly_change_probabilities(tmp_path):
    source, model = build(), build(replace(MINI, vocab_size=104), seed=9)
    load_gpt2(model, save_gpt2(source, tmp_path))
    ours, theirs = model(tokens()), source(tokens())
    torch.testing.assert_close(ours[..., :97], theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[..., 97:], theirs.mean(-1, keepdim=True).expand(2, 16, 7), rtol=0, atol=1e-5)
    lost = theirs.log_softmax(-1) - ours.log_softmax(-1)[..., :97]
    assert lost.max() <= math.log(1 + 7 / 97)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_smaller_vocabulary_is_refused(tmp_path):
    save_gpt2(build(replace(MINI, vocab_size=104)), tmp_path)
    message = r"wte.weight has shape \(104, 32\) in the checkpoint and \(97, 32\) in the model.*set vocab_size=104"
    fails_untouched(build(seed=9), tmp_path, message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_positions", 16),
        ("n_embd", 64),
        ("n_layer", 2),
        ("n_head", 8),
        ("n_inner", 64),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_by_inverse_layer_index", True),
    ],
)
def test_configs_that_disagree_are_refused_naming_the_field(field, value, tmp_path):
    save_gpt2(build(replace(MINI, **{field: value})), tmp_path)
    # A model of twice the width differs in n_embd and in what follows from it: the first is named.
    fails_untouched(build(), tmp_path, f"{field} is {value!r} in .*config.json and .* Build the model with the config")


def test_configs_that_differ_in_dropout_or_in_a_synonym_are_accepted(tmp_path):
    save_gpt2(build(replace(MINI, activation_function="gelu_pytorch_tanh", n_inner=128)), tmp_path)
    load_gpt2(build(replace(MINI, resid_pdrop=0.0), seed=9), tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("h.1.mlp.c_fc.weight", None, r"lacks 1 tensors of the model \(h.1.mlp.c_fc.weight\) and has 0 that"),
        ("wte.weight", None, r"lacks 1 tensors of the model \(wte.weight\)"),
        ("score.weight", torch.ones(2, 32), r"lacks 0 tensors of the model and has 1 that .* \(score.weight\)"),
        ("h.3.ln_1.bias", torch.ones(32), r"has 1 that the model lacks \(h.3.ln_1.bias\)"),
        # Not transposed, as a writer would leave it that takes these layers for nn.Linear.
        (
            "h.1.mlp.c_fc.weight",
            torch.ones(128, 32),
            r"h.1.mlp.c_fc.weight has shape \(32, 128\) in the checkpoint and",
        ),
        ("h.1.mlp.c_fc.bias", torch.ones(127), r"h.1.mlp.c_fc.bias has shape \(127,\) in the checkpoint and \(128,\)"),
        (
            "h.1.mlp.c_fc.weight",
            torch.ones(128, 32, 1),
            r"h.1.mlp.c_fc.weight has shape \(128, 32, 1\) in the checkpoint",
        ),
        ("wte.weight", torch.ones(97, 33), r"wte.weight has shape \(97, 33\) in the checkpoint and \(97, 32\)"),
        ("ln_f.bias", torch.ones(32).to(torch.int8), "ln_f.bias is torch.int8 in the checkpoint"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_refused_by_name(name, tensor, message, tmp_path):
    tensors = stored(tmp_path) | ({} if tensor is None else {f"transformer.{name}": tensor})
    if tensor is None:
        del tensors[f"transformer.{name}"]
    fails_untouched(build(seed=9), write(tmp_path, tensors), message)


def test_a_head_that_is_not_the_embeddings_is_refused(tmp_path):
    tensors = stored(tmp_path)
    folder = write(tmp_path, tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    fails_untouched(build(seed=9), folder, r"lm_head.weight differs from wte.weight in .*tie_word_embeddings")


def test_one_tensor_under_two_names_is_refused(tmp_path):
    folder = write(tmp_path, stored(tmp_path) | {"ln_f.bias": torch.ones(32)})
    fails_untouched(build(seed=9), folder, "has both ln_f.bias and transformer.ln_f.bias, which are the same")


def test_a_sparse_model_and_one_on_the_meta_device_are_refused(tmp_path):
    save_gpt2(build(), tmp_path)
    model = build(seed=9)
    sparsify(model)
    fails_untouched(model, tmp_path, r"\(h.0.attn.c_proj.values, .*replaced by sparse ones, load before that")
    with torch.device("meta"):
        model = build()
    with pytest.raises(PretrainedMismatchError, match=r"wte.weight is on the meta device .*to_empty"):
        load_gpt2(model, tmp_path)


@pytest.mark.parametrize("content", ["{", '{"model_type": "bert"}', '{"n_head": 7}'])
def test_a_bad_config_is_refused_naming_its_path(content, tmp_path):
    (write(tmp_path, {}) / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json: "):
        load_gpt2_config(tmp_path)


def test_lost_files_and_damaged_ones_are_refused(tmp_path):
    with pytest.raises(PretrainedFilesError, match=r"lacks config.json and weights .*It holds: nothing"):
        load_gpt2(build(), tmp_path)
    (write(tmp_path, {}) / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    fails_untouched(build(), tmp_path, "model.safetensors is damaged", PretrainedFilesError)


def test_only_a_gpt2_with_its_own_dense_weights_is_saved(tmp_path):
    with pytest.raises(TypeError, match=r"save_gpt2 writes a slope_pl\.models\.GPT2, not a Linear"):
        save_gpt2(torch.nn.Linear(2, 2), tmp_path)
    model = build()
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"lm_head.weight differs from wte.weight"):
        save_gpt2(model, tmp_path, state | {"lm_head.weight": state["wte.weight"] + 1})
    with pytest.raises(
        ValueError, match=r"1 unexpected \(x\), 1 of another shape \(ln_f.bias \(3,\) instead of \(32,\)"
    ):
        save_gpt2(model, tmp_path, state | {"x": torch.ones(1), "ln_f.bias": torch.ones(3)})
    assert not list(tmp_path.iterdir())
