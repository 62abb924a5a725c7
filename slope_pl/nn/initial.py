"""What a sparse layer begins with: kept values and masks of a dense weight, adapters; and all of that drawn anew."""

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from slope_pl.config import SLoPeConfig
from slope_pl.errors import ConversionError
from slope_pl.sparsity import choose_backward_indices, compress, make_mask, pack_indices


def prune(weight: Tensor, config: SLoPeConfig, seed: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the masks of a dense weight; of one on the meta device the results are there, too.

    Args:
        weight: ``(d_out, d_in)``.
        config: which kind of mask.
        seed: for a random one.
        scale: ``(d_in,)``, norms of the input features that magnitudes are weighed with.

    Returns:
        values ``(d_out, d_in / 2)``, indices uint8 ``(d_out, d_in / 8)`` and backward indices uint8 ``(d_in, d_out / 8)``.
    """
    if weight.is_meta:
        d_out, d_in = weight.shape
        make = weight.detach().new_empty
        return (
            make(d_out, d_in // 2),
            make(d_out, d_in // 8, dtype=torch.uint8),
            make(d_in, d_out // 8, dtype=torch.uint8),
        )
    indices = pack_indices(make_mask(config.mask, weight, seed, scale))
    values = compress(weight.detach(), indices)
    return values, indices, choose_backward_indices(values, indices)


def first_adapters(values: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Down ``(r, d_in)`` standard normal, up ``(d_out, r)`` zero, as in the published code: the wake does not move the output.

    Args:
        values: of the layer; their dtype and device.
        rank: r.
        seed: of the CPU generator that ``down`` is drawn from: the same on every rank and device.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    down = torch.randn(rank, values.shape[1] * 2, generator=generator, dtype=torch.float32, device="cpu")
    return down.to(values), values.new_zeros(values.shape[0], rank)


def draw_dense(kind: type[nn.Module], d_out: int, d_in: int, bias: bool, like: Tensor, seed: int) -> nn.Module:
    """A dense layer as its own constructor makes it, the same on all ranks; torch's random state is left alone.

    Args:
        kind: ``nn.Linear`` or a subclass, which is drawn as ``nn.Linear`` is; or a Hugging Face ``Conv1D``.
        d_out: features out.
        d_in: features in.
        bias: whether it has one.
        like: its dtype and device.
        seed: of the layer; a generator of its own is seeded by it, for masks and adapters are drawn from the seed itself.
    """
    device = like.device
    plain: Callable[[], Any] = lambda: nn.Linear(d_in, d_out, bias)  # noqa: E731 (one of two)
    make = plain if issubclass(kind, nn.Linear) else lambda: kind(d_out, d_in)
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type), device:
        torch.manual_seed(zlib.crc32(f"{seed}:weight".encode()))
        return make().to(like.dtype)


def begin_anew(layer: Any) -> None:
    """Give a ``SparseLinear`` what a new one of its shape, config and seed has, also where its parameters are sharded.

    Raises:
        ConversionError: see :func:`fill`.
    """
    like, d_out, d_in = layer.indices.new_empty(0, dtype=layer.values.dtype), layer.out_features, layer.in_features
    dense = draw_dense(layer._made_from, d_out, d_in, layer.bias is not None, like, layer.seed)
    weight = dense.get_parameter("weight")
    values, indices, columns = prune(weight.t() if layer.transposed else weight, layer.config, layer.seed)
    new = [(layer.values, values), (layer.indices, indices), (layer.backward_indices, columns)]
    if layer.bias is not None:
        new.append((layer.bias, dense.get_parameter("bias")))
    if layer.adapter_rank:
        down, up = first_adapters(values, layer.adapter_rank, layer.seed)
        new += [(layer.adapter_down, down), (layer.adapter_up, up)]
    for own, whole in new:
        fill(own, whole)
    layer.adapter_active.zero_()
    layer.is_drawn = True


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Write a whole tensor, which every rank has, into one that may lie in parts on several ranks.

    Raises:
        ConversionError: if it is in parts as ZeRO-3 has it.
    """
    if hasattr(tensor, "ds_id"):
        raise ConversionError(
            "a layer that ZeRO-3 has spread cannot be drawn anew: build it within deepspeed.zero.Init, which spreads each "
            "layer as soon as it is built"
        )
    if isinstance(tensor, DTensor):
        part = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(part.to_local())
    else:
        tensor.copy_(whole)
