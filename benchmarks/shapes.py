"""What is measured: linear layers and transformer blocks of real models, as tables.

Sizes are the published ones of each model; token counts are chosen so that a micro-batch fills the GPU.
"""

from dataclasses import dataclass, replace
from typing import Literal

Activation = Literal["gelu_tanh", "gelu", "relu", "swiglu"]


@dataclass(frozen=True)
class LinearShape:
    """One linear layer ``tokens x d_in -> d_out``."""

    name: str
    tokens: int
    d_in: int
    d_out: int


@dataclass(frozen=True)
class BlockShape:
    """One pre-LN transformer block and the batch it gets.

    Attributes:
        name: of the model, as ``--only`` takes it.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        heads: of queries.
        batch: sequences of a micro-batch.
        length: tokens of a sequence.
        activation: ``swiglu`` has a third projection (gate).
        causal: whether attention looks back only.
        kv_heads: of keys and values; as many as ``heads`` unless grouped.
        llama: RMSNorm, rotary positions, separate q, k, v and no biases; else LayerNorm, one qkv, biases everywhere.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    batch: int
    length: int
    activation: Activation = "gelu_tanh"
    causal: bool = True
    kv_heads: int | None = None
    llama: bool = False

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.batch * self.length

    def tiny(self) -> "BlockShape":
        """The same kind of block, small enough for a CPU in milliseconds; named so that nobody takes it for the model."""
        grouped = self.kv_heads is not None and self.kv_heads < self.heads
        return replace(
            self, name=f"tiny-{self.name}", hidden=64, intermediate=128, heads=4, kv_heads=2 if grouped else None,
            batch=2, length=16,
        )  # fmt: skip


# Layers of GPT2, BERT, LLaMA and OPT, and the four of a block of width 1536.
LINEARS = (
    LinearShape("gpt2-small-out", 32768, 768, 768),
    LinearShape("gpt2-small-qkv", 32768, 768, 2304),
    LinearShape("gpt2-small-fc", 32768, 768, 3072),
    LinearShape("gpt2-small-proj", 32768, 3072, 768),
    LinearShape("bert-large-out", 32768, 1024, 1024),
    LinearShape("bert-large-qkv", 32768, 1024, 3072),
    LinearShape("bert-large-fc", 32768, 1024, 4096),
    LinearShape("bert-large-proj", 32768, 4096, 1024),
    LinearShape("1536-out", 16384, 1536, 1536),
    LinearShape("1536-qkv", 16384, 1536, 4608),
    LinearShape("1536-fc", 16384, 1536, 6144),
    LinearShape("1536-proj", 16384, 6144, 1536),
    LinearShape("gpt2-xl-fc", 16384, 1600, 6400),
    LinearShape("gpt2-xl-proj", 16384, 6400, 1600),
    LinearShape("llama-8b-q", 16384, 4096, 4096),
    LinearShape("llama-8b-up", 16384, 4096, 14336),
    LinearShape("llama-8b-down", 16384, 14336, 4096),
    LinearShape("opt-13b-out", 16384, 5120, 5120),
    LinearShape("opt-66b-fc", 8192, 9216, 36864),
)

BLOCKS = (
    BlockShape("gpt2-small", 768, 3072, 12, 32, 1024),
    BlockShape("bert-large", 1024, 4096, 16, 64, 512, "gelu", causal=False),
    BlockShape("1536", 1536, 6144, 16, 16, 1024),
    BlockShape("llama-3-8b", 4096, 14336, 32, 8, 2048, "swiglu", kv_heads=8, llama=True),
    # The block of LLaMA-3-8B again: a window of 4096 does nothing at 2048 tokens. Its row shows what repeats.
    BlockShape("mistral-7b", 4096, 14336, 32, 8, 2048, "swiglu", kv_heads=8, llama=True),
    BlockShape("opt-2.6b", 2560, 10240, 32, 8, 2048, "relu"),
    BlockShape("opt-6.6b", 4096, 16384, 32, 8, 2048, "relu"),
    BlockShape("opt-13b", 5120, 20480, 40, 8, 2048, "relu"),
    BlockShape("opt-30b", 7168, 28672, 56, 4, 2048, "relu"),
    BlockShape("opt-66b", 9216, 36864, 72, 4, 2048, "relu"),
)

# The six that targets are set for (targets.py).
TARGET_BLOCKS = ("gpt2-small", "bert-large", "1536", "llama-3-8b", "opt-13b", "opt-66b")

DECODE_TOKENS = (1, 8, 16, 64, 128, 512)
DECODE_WEIGHTS = (LinearShape("llama-8b-up", 1, 4096, 14336), LinearShape("opt-66b-fc", 1, 9216, 36864))

# Widths of small and large models: for questions that need no full table.
SAMPLE_LINEARS = ("gpt2-small-fc", "bert-large-fc", "llama-8b-up", "opt-66b-fc")

TINY_LINEARS = (LinearShape("tiny", 64, 64, 128),)


def linears(quick: bool, names: tuple[str, ...] | None = None) -> tuple[LinearShape, ...]:
    """The layer table or a part of it; one tiny layer where ``quick``."""
    if quick:
        return TINY_LINEARS
    return tuple(shape for shape in LINEARS if names is None or shape.name in names)


def blocks(quick: bool, names: tuple[str, ...] | None = None) -> tuple[BlockShape, ...]:
    """The block table or a part of it; where ``quick`` one block of each kind, tiny."""
    if quick:
        return tuple(shape.tiny() for shape in BLOCKS if shape.name in ("gpt2-small", "llama-3-8b"))
    return tuple(shape for shape in BLOCKS if names is None or shape.name in names)
