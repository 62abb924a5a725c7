import pytest
import torch
from safetensors.torch import save
from torch import nn

from slope_pl import SLoPeConfig, sparsify, sparsity_report
from tests.unit.reference import backward_mask_of, mask_of


class Small(nn.Module):
    """Embedding 10x16, linear 16->16 (first, dense), 16->32 at two names (sparse), norm of 32, a buffer that is not saved."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 16, dtype=dtype)
        self.first = nn.Linear(16, 16, dtype=dtype)
        self.a = self.b = nn.Linear(16, 32, dtype=dtype)
        self.norm = nn.BatchNorm1d(32, dtype=dtype)
        self.register_buffer("scratch", torch.zeros(1000), persistent=False)


def payload(model):
    """Bytes of the tensors in a safetensors file of the state dict, where shared modules are written once."""
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            state[name] = tensor
            seen.add(tensor.data_ptr())
    file = save(state)
    return len(file) - 8 - int.from_bytes(file[:8], "little")


def test_counts_by_hand():
    model = Small()
    report = sparsity_report(model)
    # embedding 160, first 256 + 16, shared 512 + 32, norm 32 + 32
    assert (report.sparse_layers, report.dense_layers, report.dense_parameters) == (0, 2, 1040)
    assert (report.forward_density, report.backward_density) == (1.0, 1.0)
    # norm's running mean and variance and an int64 counter
    assert report.stored_bytes == report.dense_bytes == 4 * (1040 + 64) + 8
    sparsify(model, SLoPeConfig(adapter_rank=4))
    report = sparsity_report(model)
    assert (report.sparse_layers, report.dense_layers) == (1, 1)
    assert (report.kept_parameters, report.pruned_entries) == (256, 256)
    assert report.adapter_parameters == 4 * 16 + 32 * 4
    assert report.dense_parameters == 1040 - 512
    assert report.total_parameters == 256 + 192 + 528 == sum(p.numel() for p in model.parameters())
    # values and adapters, forward and backward indices of 512 entries at 1/8 byte each, the phase
    assert report.stored_bytes == 4 * (256 + 192) + 64 + 64 + 1 + 4 * (528 + 64) + 8
    assert report.dense_bytes == 4 * (1040 + 64) + 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [None, {}, {"adapter_rank": 4, "mask": "transposable"}])
def test_bytes_are_those_of_a_file(dtype, settings):
    model = Small(dtype)
    dense = payload(model)
    if settings is not None:
        sparsify(model, SLoPeConfig(**settings))
    report = sparsity_report(model)
    assert report.stored_bytes == payload(model)
    assert report.dense_bytes == dense


@pytest.mark.parametrize("mask", ["magnitude", "random", "transposable"])
def test_densities_are_counted_from_the_masks(mask):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 128))
    layers = sparsify(model, SLoPeConfig(mask=mask)).values()
    kept = sum(int(backward_mask_of(x.dense_weight(), mask_of(x.indices)).sum()) for x in layers)
    report = sparsity_report(model)
    assert report.forward_density == 0.5
    assert report.backward_density == kept / (64 * 64 + 64 * 128)
    assert report.backward_density == pytest.approx(0.5 if mask == "transposable" else 0.406, abs=0.01)


def test_rows_say_what_was_counted():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sparsify(model, SLoPeConfig(mask="transposable"))
    rows = dict(sparsity_report(model).rows())
    assert rows["2:4 linear layers (dense ones)"] == "1 (1)"
    assert rows["kept values of 2:4 weights"] == rows["pruned entries, not stored"] == "2,048"
    assert rows["density forward / backward"] == "0.5000 / 0.5000"
