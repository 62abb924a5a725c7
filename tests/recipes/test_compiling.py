"""Compiling a net whose weights are spread over ranks: block by block, with the numbers of the net as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recipes import compiling
from recipes.compiling import compile_blocks, is_spread, release_blocks
from recipes.gpt2 import module
from recipes.gpt2.module import GPT2Pretraining, next_token_loss
from slope_pl import SLoPeConfig, sparsify
from slope_pl.models import GPT2, GPT2Config


@pytest.fixture
def compiled(monkeypatch):
    """The functions that were compiled, and how often each was called; they are run as they are."""
    calls = []

    def compile_(function, dynamic):
        assert dynamic is False

        def wrapped(*args, **kwargs):
            calls.append(function)
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(compiling.torch, "compile", compile_)
    return calls


def gpt2() -> GPT2:
    torch.manual_seed(0)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    net = GPT2(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=3, n_head=2, **rates))
    sparsify(net, SLoPeConfig(adapter_rank=4))
    return net


def test_blocks_are_compiled_for_training_alone(compiled):
    net, tokens = gpt2(), torch.arange(16).view(1, 16)
    plain = copy.deepcopy(net)
    hooked = []
    net.h[0].register_forward_pre_hook(lambda block, args: hooked.append(len(compiled)))
    assert compile_blocks(net) == 3
    assert compile_blocks(net) == 0
    loss = next_token_loss(net, tokens, tokens)
    assert hooked == [0], "the hook runs before what is compiled, not inside it"
    assert len(compiled) == 3
    assert torch.equal(loss, next_token_loss(plain, tokens, tokens))
    with torch.no_grad():
        next_token_loss(net, tokens[:, :7], tokens[:, :7])
    assert len(compiled) == 3
    assert net.state_dict().keys() == plain.state_dict().keys()
    release_blocks(net)
    next_token_loss(net, tokens, tokens)
    assert len(compiled) == 3
    assert [vars(block).keys() for block in net.h] == [vars(block).keys() for block in plain.h]
    assert copy.deepcopy(net).h[0].forward.__self__ is not net.h[0]


def test_a_spread_net_is_compiled_by_blocks_and_a_whole_one_as_one(compiled, monkeypatch):
    tokens = torch.arange(16).view(1, 16)
    for spread, expected in ((False, [module._whole_loss]), (True, [module._head_loss])):
        compiled.clear()
        pretraining = GPT2Pretraining(1e-3, compile=True)
        pretraining.net = gpt2()
        monkeypatch.setattr(pretraining, "_compiles", lambda: True)
        monkeypatch.setattr(module, "is_spread", lambda net, spread=spread: spread)
        found = pretraining._training_loss()(pretraining.net, tokens, tokens)
        assert torch.equal(found, next_token_loss(pretraining.net, tokens, tokens))
        assert [function for function in compiled if function in (module._whole_loss, module._head_loss)] == expected
        pretraining.teardown("fit")
        assert not any("forward" in vars(block) for block in pretraining.net.h)


def test_deepspeeds_linear_is_out_while_a_compiled_function_runs(compiled, monkeypatch):
    """torch 2.11 makes zeros of its gradients; ``tests/distributed/test_compiled.py`` trains with it."""
    zero = pytest.importorskip("deepspeed.runtime.zero.partition_parameters").InsertPostInitMethodToModuleSubClasses
    own, layer = F.linear, nn.Linear(4, 4)
    monkeypatch.setattr(zero, "linear_bk", own, raising=False)
    within = compiling.compiled(lambda x: (F.linear, layer(x))[0])
    assert within(torch.ones(4)) is own
    monkeypatch.setattr(F, "linear", lambda *args: own(*args))
    patched = F.linear
    assert within(torch.ones(4)) is own
    assert F.linear is patched
    with pytest.raises(RuntimeError):
        within(torch.ones(5))
    assert F.linear is patched, "after an error too"


def test_spread_weights_are_told_by_their_marks():
    net = nn.Linear(4, 4)
    assert not is_spread(net)
    net.weight.ds_id = 0
    assert is_spread(net)
