"""The products of a masked layer: one forward, and the gradients that a method makes of it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slope_pl.baselines.config import BackwardPruning
from slope_pl.baselines.mvue import mvue_two_of_four
from slope_pl.sparsity import keep_two_of_four


def double_pruned_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """Prune a masked weight a second time, two of four along the output dimension (SLoPe, section 3.2).

    Args:
        weight: ``(d_out, d_in)``, floating, ``d_out`` a multiple of 4.
        mask: bool ``(d_out, d_in)``: the forward mask.

    Returns:
        bool ``(d_out, d_in)``, a subset of ``mask``. A kept weight, even a zero, goes before a pruned one.
    """
    magnitude = weight.detach().abs()
    key = torch.where(mask, torch.where(torch.isnan(magnitude), torch.inf, magnitude), -1.0)
    return keep_two_of_four(key.t()).t() & mask


class MaskedProduct(torch.autograd.Function):
    """``x (mask * W)^T + b``, straight through to W, with an input gradient of its own.

    Arguments of ``apply``: x ``(N, d_in)``, W ``(d_out, d_in)`` and b ``(d_out,)`` or None, of one floating dtype; mask bool
    ``(d_out, d_in)``; backward mask likewise, or None for the mask; see ``SRSTEConfig.backward_pruning``; seed, int64
    scalar, and stream of :func:`mvue_two_of_four`, seed None for the whole output gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        backward_mask: Tensor | None,
        backward_pruning: BackwardPruning,
        seed: Tensor | None,
        stream: int,
    ) -> Tensor:
        """``(N, d_out)``; the class says what the arguments are."""
        ctx.save_for_backward(x, weight, mask, backward_mask, seed)
        ctx.backward_pruning, ctx.stream = backward_pruning, stream
        return F.linear(x, weight * mask, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, W and b, each where it is asked for; dy is ``(N, d_out)``."""
        x, weight, mask, backward_mask, seed = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            pruned = dy * keep_two_of_four(dy.abs()) if ctx.backward_pruning == "gradient" else dy
            dx = pruned @ (weight * (mask if backward_mask is None else backward_mask))
        if ctx.needs_input_grad[1]:
            # The straight-through estimator: the gradient of mask * W, passed to all of W.
            dw = (dy if seed is None else mvue_two_of_four(dy, seed, ctx.stream)).t() @ x
        if ctx.needs_input_grad[2]:
            db = dy.sum(0)
        return dx, dw, db, None, None, None, None, None
