"""The same dense model made into each of those that are compared."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slope_pl import SLoPeConfig, SparseLinear, sparsify, wake_adapters
from slope_pl.sparsity import make_mask

ADAPTER_FRACTION = 0.0156  # 1.56 % of the hidden size: rank 64 at 4096, the larger one of the paper's speed table


def slope(model: nn.Module, backend: str, rank_fraction: float | None = None) -> nn.Module:
    """Every linear layer 2:4 sparse by this project; with a rank, its adapters awake and not zero.

    Raises:
        RuntimeError: if a layer stayed dense: then the comparison would not be of what it says.
    """
    count = sum(isinstance(module, nn.Linear) for module in model.modules())
    layers = sparsify(model, config(backend, rank_fraction))
    if len(layers) != count:
        raise RuntimeError(f"{len(layers)} of {count} linear layers became sparse; all of them are to be measured")
    if rank_fraction is not None:
        wake_adapters(model)
        for layer in layers.values():
            assert layer.adapter_up is not None
            nn.init.normal_(layer.adapter_up, std=0.02)
    return model


def slope_linear(linear: nn.Linear, backend: str, rank: int = 0) -> SparseLinear:
    """One linear layer by this project; adapters, if there are any, awake and not zero."""
    layer = SparseLinear.from_linear(linear, SLoPeConfig(backend=backend, adapter_rank=rank))  # type: ignore[arg-type]
    if layer.wake_adapters():
        assert layer.adapter_up is not None
        nn.init.normal_(layer.adapter_up, std=0.02)
    return layer


def config(backend: str, rank_fraction: float | None = None) -> SLoPeConfig:
    """All layers sparse: a block has neither a first layer nor a head."""
    return SLoPeConfig(
        backend=backend,  # type: ignore[arg-type]
        keep_first_dense=False,
        keep_heads_dense=False,
        adapter_rank_fraction=rank_fraction,
    )


@torch.no_grad()
def torch_sparse(model: nn.Module, backend: str) -> nn.Module:
    """PyTorch's own semi-structured weights (inference only), cuSPARSELt behind them."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(semi_structured(pruned(module.weight)), requires_grad=False)
    return model


def semi_structured(weight: Tensor) -> Tensor:
    """``torch.sparse.to_sparse_semi_structured``, by cuSPARSELt."""
    torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = False
    with warnings.catch_warnings():  # says once that it is a prototype
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse.to_sparse_semi_structured(weight)


@torch.no_grad()
def pruned(weight: Tensor) -> Tensor:
    """A dense weight with the smaller two of four set to zero."""
    return weight.detach() * make_mask("magnitude", weight.detach(), 0)


def torchao(model: nn.Module, backend: str) -> nn.Module:
    """Torchao's training layer, which prunes its weight anew in every forward; deleted upstream after 0.18."""
    training: Any = importlib.import_module("torchao.sparsity.training")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    training.swap_linear_with_semi_sparse_linear(model, dict.fromkeys(names, training.SemiSparseLinear))
    return model


TRANSFORMS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "dense": lambda model, backend: model,
    "slope": slope,
    "slope_r1.56%": lambda model, backend: slope(model, backend, ADAPTER_FRACTION),
    "torch_sparse_cusparselt": torch_sparse,
    "torchao_semisparse": torchao,
}
"""Name in the CSV -> what makes a dense model into it, given the backend of the sparse layers."""
