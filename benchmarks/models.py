"""Pre-LN transformer blocks, plain and fast: what a dense user would compile. Built alike from the same seed."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import BlockShape
from slope_pl.nn import sparse_mlp

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
}


class Attention(nn.Module):
    """Self-attention ``(batch, length, hidden) -> same``; q, k, v from one projection, or from three where grouped."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.head_dim = shape.hidden // shape.heads
        kv_width = (shape.kv_heads or shape.heads) * self.head_dim
        self.causal, self.llama = shape.causal, shape.llama
        self.grouped = kv_width != shape.hidden
        bias = not shape.llama
        if shape.llama:
            self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=bias)
            self.k_proj = nn.Linear(shape.hidden, kv_width, bias=bias)
            self.v_proj = nn.Linear(shape.hidden, kv_width, bias=bias)
            cos, sin = rotary_angles(shape.length, self.head_dim)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        else:
            self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden, bias=bias)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend; which kernel does it is set in :mod:`benchmarks.session` (flash on a GPU)."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x)) if self.llama else self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected)
        if self.llama:
            q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Two projections with an activation between them, or SwiGLU's three; ``(..., hidden) -> (..., hidden)``."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.activation = shape.activation
        bias = not shape.llama
        if shape.activation == "swiglu":
            self.gate = nn.Linear(shape.hidden, shape.intermediate, bias=bias)
        self.up = nn.Linear(shape.hidden, shape.intermediate, bias=bias)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=bias)
        if shape.activation != "swiglu":
            self.between = ACTIVATIONS[shape.activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Widen, activate, narrow."""
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return sparse_mlp(x, self.up, self.between, self.down)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        norm = nn.RMSNorm if shape.llama else nn.LayerNorm
        self.attention_norm, self.attention = norm(shape.hidden, eps=1e-5), Attention(shape)
        self.mlp_norm, self.mlp = norm(shape.hidden, eps=1e-5), MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, hidden) -> same``."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def rotary_angles(length: int, head_dim: int, base: float = 500000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(length, head_dim)`` of rotary positions; the base is LLaMA-3's."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs ``(i, i + head_dim / 2)`` of ``x (batch, heads, length, head_dim)`` by position."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def build(shape: BlockShape, count: int, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Sequential:
    """``count`` dense blocks with random weights, made on the device.

    Args:
        shape: of a block.
        count: blocks, one after the other.
        device: where the weights are drawn.
        dtype: of the parameters; rotary angles as well.
        seed: the same one gives the same weights.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        return nn.Sequential(*(Block(shape) for _ in range(count))).to(dtype)
