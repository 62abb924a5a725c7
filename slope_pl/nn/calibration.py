"""Activation norms: how large the inputs of every linear layer are, feature by feature, over some data.

A pruned weight changes its layer's output by the weight times its input; ``|W| ||x||_2`` is therefore what Wanda ranks
weights by (Sun, Liu, Bair, Kolter, arXiv 2306.11695, section 3). Transformers have few input features of outlying size,
whose weights magnitude alone would prune. It makes a difference for pretrained weights; fresh ones know nothing of
their inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slope_pl.config import SLoPeConfig
from slope_pl.errors import ConversionError
from slope_pl.nn.selection import choose_layers
from slope_pl.nn.sparse_linear import SparseLinear


def attention_mask(batch: Any) -> Tensor | None:
    """The padding mask of a batch in Hugging Face's convention: ``batch["attention_mask"]``, ``(B, T)``, 0 for padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


@torch.no_grad()
def activation_norms(
    model: nn.Module,
    config: SLoPeConfig,
    batches: Iterable[Any],
    forward: Callable[[Any], object] | None = None,
    mask_of: Callable[[Any], Tensor | None] = attention_mask,
) -> dict[str, Tensor]:
    """Measure the Euclidean norm of every input feature of the layers that are to become sparse.

    The model runs in evaluation mode and without gradients, and is left as it was. Sums are kept in float32. Where
    ``torch.distributed`` is initialised every rank has to come here, with data of its own if it likes: sums are added
    over ranks, and all get the same norms.

    Args:
        model: dense.
        config: which layers; its ``mask`` and ``mask_calibration_batches`` are not looked at: all of ``batches`` are
            taken.
        batches: on the model's device.
        forward: runs the model on a batch; by default ``model(**batch)`` for a mapping, ``model(*batch)`` for a list or
            tuple, else ``model(batch)``.
        mask_of: the padding mask ``(B, T)`` of a batch, 0 for padding, or None. Inputs ``(B, T, d_in)`` and
            ``(B * T, d_in)`` of a layer are counted without padding, inputs of another shape (a pooled token) whole.

    Returns:
        qualified name -> float32 ``(d_in,)``, on the layer's device, for :func:`slope_pl.sparsify`.

    Raises:
        ConversionError: if the model is sparse already, there is no batch, or a layer saw no input or one that is not
            finite.
    """
    if not isinstance(batches, Iterable):
        raise ConversionError(f"batches: an iterable of the model's inputs is expected, got a {type(batches).__name__}")
    choices = choose_layers(model, config)
    layers = {c.name: c.module for c in choices if c.reason is None}
    for name, layer in layers.items():
        if isinstance(layer, SparseLinear):
            raise ConversionError(f"layer {name!r} is sparse already: activation norms are measured on the dense model")
    sums = {name: _zeros(layer) for name, layer in layers.items()}
    current: list[Tensor | None] = [None]  # the mask of the batch that is running, for the hooks

    def counts(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            total, rows = _sum_of_squares(x, current[0])
            sums[name][:-1] += total
            sums[name][-1] += rows

        return hook

    run = forward or (lambda batch: _call(model, batch))
    handles = [layer.register_forward_pre_hook(counts(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model), _eagerly():
            for batch in batches:
                mask = mask_of(batch)
                current[0] = None if mask is None else mask.bool()
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return _norms(_summed_over_ranks(sums))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _eagerly() -> Any:
    """Without torch.compile: compiled code was traced without the hooks, or would be traced for these batches alone."""
    return torch.compiler.set_stance("force_eager") if not torch.compiler.is_compiling() else nullcontext()


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def _zeros(layer: nn.Module) -> Tensor:
    """One sum a feature and, last, the number of rows they are sums over."""
    weight = layer.get_parameter("weight")
    d_in = weight.shape[1] if isinstance(layer, nn.Linear) else weight.shape[0]
    return torch.zeros(d_in + 1, dtype=torch.float32, device=weight.device)


def _sum_of_squares(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """Over all rows of ``(..., d_in)`` that are no padding: sums of squares ``(d_in,)``, number of rows."""
    if mask is not None and x.dim() == 2 and x.shape[0] == mask.numel():
        mask = mask.flatten()
    squares = x.to(torch.float32).square()
    if mask is None or x.shape[:-1] != mask.shape:
        return squares.flatten(0, -2).sum(0) if x.dim() > 1 else squares, x[..., 0].numel()
    # Not a product: what padding computed may be NaN. Not an index: that would wait for the device.
    squares = torch.where(mask[..., None], squares, 0.0)
    return squares.flatten(0, -2).sum(0), mask.sum()


def _summed_over_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return sums
    flat = torch.cat(list(sums.values()))
    dist.all_reduce(flat)
    dist.broadcast(flat, 0)  # ranks may have added in another order; masks have to be the same to the bit
    return dict(zip(sums, flat.split([len(own) for own in sums.values()]), strict=True))


def _norms(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    idle = [name for name, own in sums.items() if own[-1] == 0]
    if sums and len(idle) == len(sums):
        raise ConversionError("no activations were seen: there is no batch, or forward runs none of the model's layers")
    if idle:
        raise ConversionError(
            f"{len(idle)} layers saw no input ({', '.join(idle[:3])}): the forward that is measured does not call them. "
            "Exclude them from sparsity (SLoPeConfig(exclude=...)), or measure a forward that uses them"
        )
    for name, own in sums.items():
        if not bool(torch.isfinite(own).all()):
            raise ConversionError(
                f"the inputs of layer {name!r} are not finite (or their squares overflow float32): look at data and weights"
            )
    return {name: own[:-1].sqrt() for name, own in sums.items()}
