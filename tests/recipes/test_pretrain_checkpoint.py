"""A pretraining checkpoint in the next model of the chain: what comes along, what is fresh, what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from recipes.bert_large.pretrain_checkpoint import (
    check_masks,
    load_pretraining_checkpoint,
    read_pretraining_checkpoint,
    say_masks_are_kept,
)
from recipes.bert_large.pretrain_module import BertPretraining
from slope_pl import CheckpointError, SLoPeConfig, sparse_layers, sparsify
from slope_pl.models import (
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)

CONFIG = BertConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def save(path, slope, awake=False, change=None):
    """A checkpoint as the recipe writes it, of a model whose weights were moved since its conversion."""
    torch.manual_seed(3)
    module = BertPretraining(bert=CONFIG, slope=slope)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for layer in sparse_layers(module).values():
            layer.refresh_backward_mask()
            if awake:
                layer.wake_adapters()
                layer.adapter_up += torch.randn_like(layer.adapter_up)
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "global_step": 70}
    content["hyper_parameters"]["slope"] = None if slope is None else slope.to_dict()
    module.on_save_checkpoint(content)
    if slope is not None:
        layers = list(sparse_layers(module))
        content["slope_pl"] = {"format": 1, "version": "0", "config": slope.to_dict(), "layers": layers}
    if change is not None:
        change(content)
    torch.save(content, path)
    return module.eval()


def qa():
    return BertForQuestionAnswering(CONFIG).eval()


def classifier():
    return BertForSequenceClassification(CONFIG, 3).eval()


KINDS = {"qa": qa, "classifier": classifier, "pretraining": lambda: BertForPreTraining(CONFIG).eval()}
HEADS = {"qa": {"qa_outputs.weight", "qa_outputs.bias"}, "classifier": {"classifier.weight", "classifier.bias"}}
IDS = torch.arange(5, 15).reshape(1, 10)


def hidden(net):
    with torch.no_grad():
        return net.bert(IDS).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("slope", "awake"),
    [
        (None, False),
        (SLoPeConfig(), False),
        (SLoPeConfig(mask="transposable"), False),
        (SLoPeConfig(mask="random", seed=7), False),
        (SLoPeConfig(adapter_rank=4), False),
        (SLoPeConfig(adapter_rank=4), True),
        (SLoPeConfig(exclude=("net.bert.encoder.layer.1.attention.*",)), False),
    ],
)
def test_the_encoder_computes_what_it_did(tmp_path, kind, slope, awake):
    before = save(tmp_path / "a.ckpt", slope, awake)
    net = KINDS[kind]()
    fresh = {name: parameter.clone() for name, parameter in net.named_parameters()}
    report = load_pretraining_checkpoint(net, tmp_path / "a.ckpt", slope)
    assert torch.equal(hidden(net), hidden(before.net))
    theirs = sparse_layers(before.net)
    own = sparse_layers(net)
    assert set(report.masks) == set(own)
    for name, layer in own.items():
        for buffer in ("indices", "backward_indices", "adapter_active"):
            assert torch.equal(getattr(layer, buffer), getattr(theirs[name], buffer)), name
        assert layer.adapters_awake == awake
    if slope is not None:
        assert {name for name in theirs if name.startswith("bert.encoder")} <= set(own)
        assert check_masks(net, tmp_path / "a.ckpt") == len(own)
    else:
        assert check_masks(net, tmp_path / "a.ckpt") == 0
    assert set(report.fresh) == HEADS.get(kind, set())
    for name in report.fresh:
        assert torch.equal(net.get_parameter(name), fresh[name])
    assert all(name.startswith(("cls.", "bert.pooler.")) for name in report.unused)
    assert (report.step, report.awake) == (70, awake)
    assert f"{len(report.fresh)} fresh" in report.summary()
    if kind == "classifier":
        with torch.no_grad():
            assert torch.equal(net.bert(IDS).pooler_output, before.net.bert(IDS).pooler_output)


def test_the_same_as_the_module_would_make(tmp_path):
    """Seeds go by qualified names: fresh adapters are those of a module whose net is called net."""
    save(tmp_path / "a.ckpt", SLoPeConfig())
    slope = SLoPeConfig(adapter_rank=4)
    net = qa()
    load_pretraining_checkpoint(net, tmp_path / "a.ckpt", slope)
    root = torch.nn.ModuleDict({"net": qa()})
    sparsify(root, slope)
    for name, layer in sparse_layers(net).items():
        assert torch.equal(layer.adapter_down, root["net"].get_submodule(name).adapter_down)
    assert sparsify(torch.nn.ModuleDict({"net": net}), slope).keys() == {f"net.{n}" for n in sparse_layers(net)}


@pytest.mark.parametrize("rank", [0, 8])
def test_sleeping_adapters_may_get_another_rank(tmp_path, rank):
    before = save(tmp_path / "a.ckpt", SLoPeConfig(adapter_rank=4))
    net = qa()
    report = load_pretraining_checkpoint(net, tmp_path / "a.ckpt", SLoPeConfig(adapter_rank=rank))
    assert torch.equal(hidden(net), hidden(before.net))
    adapters = [name for name in report.fresh if "adapter_" in name]
    assert len(adapters) == (2 * len(report.masks) if rank else 0)
    assert {layer.adapter_rank for layer in sparse_layers(net).values()} == {rank}


def test_gradients_flow_into_what_was_loaded(tmp_path):
    save(tmp_path / "a.ckpt", SLoPeConfig(adapter_rank=4), awake=True)
    net = qa()
    load_pretraining_checkpoint(net, tmp_path / "a.ckpt", SLoPeConfig(adapter_rank=4))
    net(IDS).start_logits.square().sum().backward()
    layer = sparse_layers(net)["bert.encoder.layer.1.output.dense"]
    for parameter in (layer.values, layer.adapter_down, layer.adapter_up):
        assert parameter.grad.abs().max() > 0


def test_read_tells_what_the_next_recipe_needs(tmp_path):
    save(tmp_path / "a.ckpt", SLoPeConfig(adapter_rank=4), awake=True)
    found = read_pretraining_checkpoint(tmp_path / "a.ckpt")
    assert (found.bert, found.slope, found.step, found.awake) == (CONFIG, SLoPeConfig(adapter_rank=4), 70, True)
    save(tmp_path / "b.ckpt", None)
    assert read_pretraining_checkpoint(tmp_path / "b.ckpt").slope is None


# Refused: the net is as it was ----------------------------------------------------------------------------------------


def without(name):
    return lambda content: content["state_dict"].pop(name)


def spoil(name, make):
    def change(content):
        content["state_dict"][name] = make(content["state_dict"][name])

    return change


def newer(content):
    content["slope_pl"]["format"] = 99


LAYER = "net.bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize(
    ("slope", "awake", "change", "run", "config", "message"),
    [
        (SLoPeConfig(), False, None, None, {}, "of a 2:4 sparse model, the configuration is dense"),
        (SLoPeConfig(), False, None, SLoPeConfig(mask="random"), {}, "slope.mask='magnitude', this run has 'random'"),
        (
            SLoPeConfig(adapter_rank=4), True, None, SLoPeConfig(adapter_rank=8), {},
            "awake adapters of rank 4, this run asks for 8",
        ),
        (SLoPeConfig(adapter_rank=4), True, None, SLoPeConfig(), {}, "awake adapters of rank 4, this run asks for 0"),
        (
            SLoPeConfig(), False, None, SLoPeConfig(exclude=("*.layer.1.output.dense",)), {},
            r"1 of them would become dense here \(bert.encoder.layer.1.output.dense\), 0 dense ones sparse",
        ),
        (
            SLoPeConfig(), False, None, SLoPeConfig(keep_first_dense=False), {},
            "0 of them would become dense here, 3 dense ones sparse",
        ),
        (SLoPeConfig(), False, None, SLoPeConfig(), {"hidden_size": 64}, "another architecture: hidden_size 32 instead of 64"),
        (None, False, None, SLoPeConfig(), {"vocab_size": 72, "num_hidden_layers": 3}, "vocab_size 64 instead of 72, num_hid"),
        (None, False, None, None, {"hidden_act": "relu"}, "hidden_act gelu instead of relu"),
        (SLoPeConfig(), False, without(f"{LAYER}.values"), SLoPeConfig(), {}, r"damaged: it lacks 1 tensors.*dense.values"),
        (None, False, without("net.bert.embeddings.LayerNorm.bias"), None, {}, "damaged: it lacks 1 tensors of the encoder"),
        (
            SLoPeConfig(), False, spoil(f"{LAYER}.values", lambda t: t[:, :-1]), SLoPeConfig(), {},
            r"values has shape \(32, 31\), expected \(32, 32\)",
        ),
        (
            SLoPeConfig(), False, spoil(f"{LAYER}.indices", torch.zeros_like), SLoPeConfig(), {},
            "names positions 0 and 0; two different positions",
        ),
        (
            SLoPeConfig(), False, spoil(f"{LAYER}.backward_indices", lambda t: t.int()), SLoPeConfig(), {},
            "dtype torch.int32, expected torch.uint8",
        ),
        (SLoPeConfig(), False, newer, SLoPeConfig(), {}, "format 99"),
        (None, False, without("net.cls.predictions.bias"), None, {}, "of another model: it has no net.cls.predictions.bias"),
        (None, False, lambda c: c["hyper_parameters"].pop("bert"), None, {}, "no architecture of a BERT"),
        (None, False, lambda c: c.pop("state_dict"), None, {}, "holds no state_dict"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path, slope, awake, change, run, config, message):
    file = tmp_path / "a.ckpt"
    save(file, slope, awake, change)
    written = file.read_bytes()
    net = BertForSequenceClassification(replace(CONFIG, **config), 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_pretraining_checkpoint(net, file, run)
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert file.read_bytes() == written


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged or no checkpoint"),
        (b"not a checkpoint at all", "is damaged or no checkpoint"),
        (json.dumps({"a": 1}).encode(), "is damaged or no checkpoint"),
        (None, "no such file"),
        ("cut", "is damaged or no checkpoint"),
        ("tensor", "holds no state_dict"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, message):
    file = tmp_path / "a.ckpt"
    match content:
        case bytes():
            file.write_bytes(content)
        case "cut":
            save(file, None)
            file.write_bytes(file.read_bytes()[:-2000])
        case "tensor":
            torch.save(torch.zeros(3), file)
    with pytest.raises(CheckpointError, match=message):
        load_pretraining_checkpoint(qa(), file, None)


def test_a_net_that_is_sparse_already_is_refused(tmp_path):
    save(tmp_path / "a.ckpt", SLoPeConfig())
    net = qa()
    sparsify(net, SLoPeConfig())
    with pytest.raises(CheckpointError, match="sparse already: load the checkpoint before"):
        load_pretraining_checkpoint(net, tmp_path / "a.ckpt", SLoPeConfig())


def test_moved_masks_are_named(tmp_path):
    save(tmp_path / "a.ckpt", SLoPeConfig())
    net = qa()
    load_pretraining_checkpoint(net, tmp_path / "a.ckpt", SLoPeConfig())
    layer = sparse_layers(net)["bert.encoder.layer.1.output.dense"]
    layer.refresh_backward_mask()  # the columns may move, the forward mask may not
    assert check_masks(net, tmp_path / "a.ckpt") == len(sparse_layers(net))
    layer.indices.copy_(layer.indices.flip(0))
    with pytest.raises(CheckpointError, match=r"masks of 1 of 9 layers \(bert.encoder.layer.1.output.dense\)"):
        check_masks(net, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="no sparse layer of the net is one of"):
        check_masks(qa(), tmp_path / "a.ckpt")


def test_what_is_said_of_the_masks_at_the_end(tmp_path, capsys):
    """A checkpoint that was removed while the run went on must not fail it when it is done; a dense one has no masks."""
    net = save(tmp_path / "a.ckpt", SLoPeConfig()).net
    say_masks_are_kept(net, tmp_path / "a.ckpt")
    assert (
        capsys.readouterr().out
        == f"Masks of {len(sparse_layers(net))} layers are still those of {tmp_path / 'a.ckpt'}.\n"
    )
    save(tmp_path / "dense.ckpt", None)
    say_masks_are_kept(net, tmp_path / "dense.ckpt")
    assert capsys.readouterr().out == ""
    (tmp_path / "a.ckpt").unlink()
    say_masks_are_kept(net, tmp_path / "a.ckpt")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'a.ckpt'} is not there any more: WHETHER THE MASKS")
