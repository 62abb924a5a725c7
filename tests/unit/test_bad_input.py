"""What a user can get wrong: each message names the value, what was expected, and the way out."""

import itertools

import pytest
import torch
from torch import nn

from slope_pl import SLoPeConfig, SparseLinear, densify, sparsify
from slope_pl.config import as_config
from slope_pl.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    ConversionError,
    InputError,
    SLoPeError,
)
from slope_pl.ops import resolve_backend
from slope_pl.sparsity import compress, decompress, keep_two_of_four, make_mask, pack_indices, random_mask

NAN = float("nan")


def net(*widths):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "best"}, "mask='best' is unknown; choose one of magnitude, random, transposable"),
        ({"mask": None}, "mask=None is unknown"),
        ({"backend": "cuda"}, "backend='cuda' is unknown; choose one of auto, reference, cusparselt"),
        ({"seed": -1}, "seed=-1: an integer of at least 0"),
        ({"seed": 1.0}, "seed=1.0: an integer of at least 0"),
        ({"backward_refresh_steps": 0}, "backward_refresh_steps=0: .* at least 1 .*; None never re-chooses"),
        ({"backward_refresh_steps": True}, "backward_refresh_steps=True: an integer"),
        ({"adapter_rank": -4}, "adapter_rank=-4: an integer of at least 0 is expected; 0 means no adapters"),
        ({"adapter_rank": 0.5}, "adapter_rank=0.5: an integer"),
        ({"adapter_rank_fraction": 0}, "adapter_rank_fraction=0: a fraction above 0 .*; leave it out for no adapters"),
        ({"adapter_rank_fraction": NAN}, "adapter_rank_fraction=nan: a fraction above 0"),
        (
            {"adapter_rank": 4, "adapter_rank_fraction": 0.1},
            "adapter_rank=4 and adapter_rank_fraction=0.1 are both set",
        ),
        ({"adapter_rank": 4, "adapter_start": 1.5}, "adapter_start=1.5: a fraction above 0 and at most 1"),
        ({"adapter_rank": 4, "adapter_start": "0.5"}, "adapter_start='0.5': a fraction"),
        ({"adapter_rank": 4, "adapter_start_step": -1}, "adapter_start_step=-1: an integer of at least 0"),
        (
            {"adapter_rank": 4, "adapter_start": 0.5, "adapter_start_step": 9},
            "adapter_start=0.5 and adapter_start_step=9 are both set; give one of them",
        ),
        ({"adapter_start": 0.5}, "adapter_start=0.5, .* no effect without adapters; set adapter_rank"),
        ({"adapter_start_step": 9}, "adapter_start_step=9 have no effect without adapters"),
        ({"include": "encoder.*"}, r"include='encoder.\*': a list of patterns is expected, for example"),
        ({"exclude": [3]}, r"exclude=\[3\]: a list of patterns"),
        ({"exclude": [""]}, r"exclude=\[''\]: a list of patterns"),
        ({"rank": 4, "Mask": "random"}, "unknown SLoPe setting 'Mask', 'rank'; known are mask, layer_masks, seed"),
        ({"include": None}, "include=None: a list"),
        ({"exclude": 3}, "exclude=3: a list"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        SLoPeConfig.from_dict(settings)


@pytest.mark.parametrize("value", [3, "random", [("mask", "random")]])
def test_a_config_of_another_type(value):
    with pytest.raises(ConfigError, match=f"a mapping of its fields or None is expected, got {type(value).__name__}"):
        as_config(value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_mask("best", torch.zeros(4, 4)), "mask kind 'best' is unknown; choose one of magnitude"),
        (lambda: make_mask("magnitude", torch.zeros(4, 6)), r"key: last dimension of shape \(4, 6\) is not a multiple"),
        (lambda: make_mask("transposable", torch.zeros(6, 8)), "transposable_mask: shape 6x8 does not divide"),
        (lambda: random_mask((4, 6), 0), "random_mask: d_in = 6 is not a multiple of 4"),
        (lambda: keep_two_of_four(torch.tensor(1.0)), r"key: last dimension of shape \(\) is not a multiple of 4"),
        (lambda: pack_indices(torch.ones(4, 12).bool()), "mask: 12 columns are not a multiple of 8"),
        (lambda: pack_indices(torch.ones(4, 8).bool()), "row 0, columns 0 to 3 keep 4 of four; 2:4 needs exactly 2"),
        (
            lambda: compress(torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.uint8)),
            r"dense of shape \(4, 8\) does not belong to indices of shape \(4, 2\), which cover \(4, 16\)",
        ),
        (
            lambda: decompress(torch.zeros(4, 8), torch.zeros(2, 2, dtype=torch.uint8)),
            r"values of shape \(4, 8\) does not belong to indices of shape \(2, 2\), which cover \(2, 8\)",
        ),
    ],
)
def test_matrices(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (nn.Linear(12, 16), "16x12: both sides must be multiples of 8"),
        (nn.Linear(16, 4), "4x16: both sides must be multiples of 8"),
        (nn.Linear(16, 16, dtype=torch.complex64), "dtype is none of float64, float32, bfloat16, float16"),
        (nn.Conv1d(8, 8, 1), r"\(8, 8, 1\), torch.float32 cannot be 2:4 sparse: it has 3 dimensions, 2 are expected"),
    ],
)
def test_layers_that_cannot_be_sparse(linear, message):
    # A Conv1d is passed through as Linear's weight: only its shape is at fault.
    linear = linear if isinstance(linear, nn.Linear) else with_weight(linear.weight)
    with pytest.raises(ConversionError, match=message):
        SparseLinear.from_linear(linear)


def with_weight(weight):
    linear = nn.Linear(8, 8)
    linear.weight = weight
    return linear


def test_a_partitioned_weight():
    with pytest.raises(ConversionError, match=r"it is empty .*ZeRO-3.*: convert before it is sharded"):
        SparseLinear.from_linear(with_weight(nn.Parameter(torch.empty(0, 0))))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.zeros(2, 16, dtype=torch.float64),
            RuntimeError,
            "input is torch.float64, weights are torch.float32; cast",
        ),
        (torch.zeros(2, 8), RuntimeError, r"input of shape \(2, 8\) does not end in in_features = 16"),
        (torch.zeros(2, 16, dtype=torch.long), RuntimeError, "input is torch.int64, weights are torch.float32"),
        (torch.zeros(()), RuntimeError, "input of shape"),
    ],
)
def test_inputs(x, error, message):
    with pytest.raises(error, match=message):
        SparseLinear(16, 8)(x)


def test_integer_input_under_autocast():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        SparseLinear(16, 8)(torch.zeros(2, 16, dtype=torch.long))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            net(16, 16, 16),
            {"include": ["encoder.*"]},
            r"include pattern 'encoder.\*' matches no linear layer. .*2: 0, 1",
        ),
        (net(16, 16, 16), {"exclude": ["7"]}, "exclude pattern '7' matches no linear layer"),
        (net(*[8] * 9), {"exclude": ["x"]}, r"There are 8: 0, 1, 2, 3, 4, 5, \.\.\."),
        (net(16, 16, 12), {"include": ["1"]}, "layer '1' is asked for in include, .*12x16: both sides"),
        (net(16, 16, 16), {"include": ["1"], "exclude": ["1"]}, "layer '1' is asked for .*: excluded by pattern"),
        (net(16, 16), {}, "none of the 1 linear layers of Sequential can be sparse: 0: first linear layer"),
        (net(16, 16, 12, 16), {}, "none of the 3 .*; 1: 12x16: both sides must be multiples of 8; 2: 16x12"),
        (nn.Sequential(nn.ReLU()), {}, "Sequential has no linear layer to make sparse"),
        (nn.Linear(16, 16), {"keep_first_dense": False}, "itself is a linear layer: use SparseLinear.from_linear"),
    ],
)
def test_models(model, settings, message):
    with pytest.raises(ConversionError, match=message):
        sparsify(model, SLoPeConfig(**settings))


def test_tied_weight_asked_for_by_name():
    model = net(16, 16, 16, 16)
    model[2].weight = model[1].weight
    with pytest.raises(ConversionError, match=r"layer '2' is asked for in include, .*: its weight is tied to 1"):
        sparsify(model, SLoPeConfig(include=["2"]))


def test_two_configurations_for_one_model():
    model = net(16, 16, 16)
    sparsify(model, SLoPeConfig(seed=1))
    message = "layer '1' is sparse already, with mask='magnitude' instead of 'random', seed=1 instead of 2; .*densify"
    with pytest.raises(ConversionError, match=message):
        sparsify(model, SLoPeConfig(mask="random", seed=2))
    densify(model)
    sparsify(model, SLoPeConfig(mask="random", seed=2))


@pytest.mark.parametrize("make", [lambda c: SparseLinear(16, 16, config=c), lambda c: sparsify(net(16, 16, 16), c)])
def test_a_backend_that_cannot_run_is_refused_at_conversion(make):
    message = "backend='cusparselt' cannot run on 'cuda': .*Use backend='auto' or 'reference'"
    with pytest.raises(BackendUnavailableError, match=message):
        make(SLoPeConfig(backend="cusparselt"))


def test_an_unknown_backend():
    with pytest.raises(
        BackendUnavailableError, match="no backend 'nope' is registered; there are reference, cusparselt"
    ):
        resolve_backend("nope", "cpu")


def damaged(**changes):
    state = SparseLinear(16, 16).state_dict()
    return {f"net.{name}": changes.get(name, tensor) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (
            nn.Sequential(nn.Linear(16, 16)),
            CheckpointError,
            "dense 'net.weight', but that layer is 2:4 sparse here: load dense",
        ),
        (
            damaged(indices=torch.full((16, 2), 0x40, dtype=torch.uint8)),
            CheckpointError,
            "net.indices: row 0, group 0 names positions 0 and 0; .*the buffer is damaged or not from slope_pl",
        ),
        (
            damaged(backward_indices=torch.full((16, 2), 0x14, dtype=torch.uint8)),
            CheckpointError,
            "net.backward_indices: row 0, group 1 names positions 1 and 0",
        ),
        (
            damaged(indices=torch.full((16, 2), 0x44)),
            CheckpointError,
            "net.indices: dtype torch.int64, expected torch.uint8",
        ),
        (damaged(values=torch.zeros(16, 4)), CheckpointError, r"net.values has shape \(16, 4\) .* \(16, 8\) in this"),
        (
            damaged(indices=torch.zeros(16, 4, dtype=torch.uint8)),
            CheckpointError,
            r"net.indices has shape \(16, 4\) in the checkpoint and \(16, 2\)",
        ),
        ({}, RuntimeError, "Missing key.*net.values.*net.indices"),
    ],
)
def test_states(state, error, message):
    model = nn.Module()
    model.net = SparseLinear(16, 16)
    if isinstance(state, nn.Module):
        state = {f"net.{name[2:]}": tensor for name, tensor in state.state_dict().items()}
    with pytest.raises(error, match=message):
        model.load_state_dict(state)


def test_a_damaged_state_changes_nothing_in_the_layer():
    layer = SparseLinear(16, 16)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other = SparseLinear(16, 16).state_dict() | {"indices": torch.zeros(16, 2, dtype=torch.uint8)}
    with pytest.raises(CheckpointError):
        layer.load_state_dict(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("error", [ConfigError, ConversionError, CheckpointError, InputError, BackendUnavailableError])
def test_every_error_can_be_caught_as_one(error):
    assert issubclass(error, SLoPeError)
    assert issubclass(error, ValueError | RuntimeError)
