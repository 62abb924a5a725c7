"""``down(activation(up(x)))``, with the activation inside the sparse products where that is possible."""

from torch import Tensor, nn

from slope_pl import ops
from slope_pl.nn.hooks import is_hooked
from slope_pl.nn.sparse_linear import SparseLinear


def sparse_mlp(x: Tensor, up: nn.Module, activation: nn.Module, down: nn.Module) -> Tensor:
    """A feed-forward network: ``down(activation(up(x)))``.

    Two sparse layers around a GELU become one operation where their backend has kernels for that (narrow layers on Hopper):
    GELU and its gradient then cost no pass over memory. Everything else runs as written, module after module: dense layers,
    awake adapters, other activations, layers with hooks, ``fuse_gelu=False``.

    Args:
        x: ``(..., d_in)``.
        up: ``(..., d_in) -> (..., d_hidden)``, dense or sparse.
        activation: elementwise.
        down: ``(..., d_hidden) -> (..., d_out)``, dense or sparse.

    Returns:
        ``(..., d_out)``.
    """
    if not can_fuse(up, activation, down):
        return down(activation(up(x)))
    assert isinstance(up, SparseLinear)
    assert isinstance(down, SparseLinear)
    assert isinstance(activation, nn.GELU)
    ready, first, backend = up._ready(x)
    places = (up.out_features, up.in_features), (down.in_features, down.out_features)
    if (
        first.bias is None
        or down.in_features != up.out_features
        or down.values.dtype is not up.values.dtype
        or backend != ops.resolve_backend(down.config.backend, x.device.type, ready.dtype, *places[1])
        or not all(ops.fuses_gelu(backend, x.device.type, ready.dtype, *place) for place in places)
    ):
        return down(activation(up(x)))
    second = down._weight()
    return ops.sparse_mlp(ready, first, second, activation.approximate, backend, (up._operands, down._operands))


def can_fuse(up: nn.Module, activation: nn.Module, down: nn.Module) -> bool:
    """Whether these modules are two sparse layers around a GELU of which nobody sees the inside."""
    if not (type(up) is SparseLinear and type(down) is SparseLinear and type(activation) is nn.GELU):
        return False
    if not (up.config.fuse_gelu and down.config.fuse_gelu) or up.adapters_awake or down.adapters_awake:
        return False
    return not is_hooked(up, activation, down)
