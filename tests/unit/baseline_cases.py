"""Masks of one 4x4 tile worked out by hand, and a layer of four such tiles."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from slope_pl.baselines import (
    MaskedLinear,
)

F, T = False, True

# Row by row the two largest are in columns (0, 1), (0, 1), (0, 2), (1, 3).
HAND = torch.tensor([[9.0, -8, 1, 2], [7, 6, -5, 0], [-4, 1, 3, 2], [0, 5, 1, -6]])
HAND_MASK = torch.tensor([[T, T, F, F], [T, T, F, F], [T, F, T, F], [F, T, F, T]])
# Down the columns, of those: 9 and 7 before 4; 8 and 6 before 5; 3 alone; 6 alone.
HAND_TWICE = torch.tensor([[T, T, F, F], [T, T, F, F], [F, F, T, F], [F, F, F, T]])
# 9 + 8, 7 + 5, 3 + 2, 5 + 6 = 45. Greedy is worse: 9 + 8 and 7 + 6 leave 3 + 2 and 1 + 6, 42; that all other patterns keep
# less is tried in the test.
HAND_TILE = torch.tensor([[T, T, F, F], [T, F, T, F], [F, F, T, T], [F, T, F, T]])


def make(tile=HAND, bias=True, kind="linear", repeat=2, **options):
    """A layer of 8x8: the tile four times."""
    weight = tile.repeat(repeat, repeat)
    if kind == "conv":
        linear = Conv1D(weight.shape[0], weight.shape[1])
        linear.weight = nn.Parameter(weight.t().contiguous())
        nn.init.normal_(linear.bias)
    else:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
        linear.weight = nn.Parameter(weight.clone())
    return MaskedLinear(linear, **options)
