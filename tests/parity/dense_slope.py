"""The method in dense masked matrices, without slope_pl: what the sparse implementation is compared with."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

GROUP = 4


def two_of_four(key):
    """The two largest of four along the last dimension, by counting who beats whom; the lower index wins a tie."""
    fours = key.unflatten(-1, (-1, GROUP))
    mine, other = fours.unsqueeze(-1), fours.unsqueeze(-2)
    lower = torch.ones(GROUP, GROUP, dtype=torch.bool).tril(-1)
    return (((other > mine) | ((other == mine) & lower)).sum(-1) < 2).flatten(-2)


def best_tiles(weight):
    """The 4x4 pattern with two entries a row and a column that keeps most magnitude: all 90 are tried."""
    rows = [torch.tensor([i in pair for i in range(GROUP)]) for pair in itertools.combinations(range(GROUP), 2)]
    patterns = [torch.stack(four) for four in itertools.product(rows, repeat=GROUP)]
    patterns = torch.stack([p for p in patterns if (p.sum(0) == 2).all()])
    tiles = weight.abs().unflatten(0, (-1, GROUP)).unflatten(-1, (-1, GROUP))  # (I, 4, J, 4)
    best = torch.einsum("iajb,pab->ijp", tiles, patterns.to(weight)).argmax(-1)
    return patterns[best].permute(0, 2, 1, 3).reshape(weight.shape)


class Product(torch.autograd.Function):
    """y = x W^T with the double-pruned input gradient."""

    @staticmethod
    def forward(ctx, x, weight, mask, backward_mask):
        ctx.save_for_backward(x, weight, mask, backward_mask)
        return x @ (weight * mask).t()

    @staticmethod
    def backward(ctx, dy):
        x, weight, mask, backward_mask = ctx.saved_tensors
        dx = dy @ (weight * mask * backward_mask)
        return dx, (dy.flatten(0, -2).t() @ x.flatten(0, -2)) * mask, None, None


class MaskedLinear(nn.Module):
    """A dense weight under a mask, with adapters that sleep at first."""

    def __init__(self, linear, mask, down, exact=False):
        super().__init__()
        self.mask, self.exact = mask, exact
        self.weight = nn.Parameter(linear.weight.detach() * mask)
        self.bias = linear.bias
        self.down = nn.Parameter(down.clone(), requires_grad=False)
        self.up = nn.Parameter(down.new_zeros(len(mask), len(down)), requires_grad=False)
        self.awake = False
        self.backward_mask = mask
        self.changed = 0

    def pick(self):
        """The re-setup: two of four kept weights along the other dimension."""
        key = torch.where(self.mask, self.weight.detach().abs(), -1.0)
        new = two_of_four(key.t()).t() & self.mask
        self.changed += int((new != self.backward_mask).sum())
        self.backward_mask = new

    def project(self):
        """Exact variant: an ordinary gradient, its pruned entries set to zero."""
        if self.exact:
            self.weight.grad *= self.mask

    def wake(self):
        self.awake = True
        self.down.requires_grad_()
        self.up.requires_grad_()

    def forward(self, x):
        if self.exact:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = Product.apply(x, self.weight, self.mask, self.backward_mask) + self.bias
        if self.awake:
            y = y + (x @ self.down.t()) @ self.up.t() / len(self.down)
        return y
