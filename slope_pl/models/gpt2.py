"""GPT-2 (Radford et al. 2019) with the parameter names of Hugging Face and nothing of sparsity.

Every matrix is a plain ``nn.Linear`` that is only ever *called*, so that surgery can replace it by a sparse layer; on disk
they lie transposed, which :mod:`slope_pl.models.hf_gpt2` sees to. A model returns logits, :func:`causal_lm_loss` their loss.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from slope_pl.models.bert import ACTIVATIONS
from slope_pl.nn import built_whole, sparse_mlp

IGNORED = -100
"""The label of a token that is not to be predicted."""

# Hugging Face's name of the one field that has another here.
_SCALE_KEY = "scale_attn_by_inverse_layer_idx"
# Hugging Face keys outside GPT2Config that change the maths, and the one value of each that this module computes.
_ONLY_VALUE: dict[str, Any] = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "quantization_config": None,
}


@dataclass(frozen=True)
class GPT2Config:
    """Sizes and rates of a GPT-2, under Hugging Face's names; the defaults are GPT-2 small.

    ``n_inner`` None is four times ``n_embd``. ``scale_by_inverse_layer_index`` divides the attention scores of layer i,
    counted from 1, by i, as the published SLoPe runs do (Hugging Face: ``scale_attn_by_inverse_layer_idx``). To train from
    scratch on tensor cores, ``vocab_size=50304``, a multiple of 64, is the usual choice.

    A value out of range raises a ValueError with the field, the value, what is expected and the fix.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_by_inverse_layer_index: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            sized = field.type is int or (name == "n_inner" and value is not None)
            if sized and (type(value) is not int or value < 1):
                _refuse(name, value, "an integer of at least 1", f"GPT-2 small has {field.default or 3072}")
            if name.endswith("_pdrop") and not (number and 0 <= value < 1):
                _refuse(name, value, "a number in [0, 1)", "pass 0.1 as published, or 0.0 for no dropout")
            if name in ("initializer_range", "layer_norm_epsilon") and not (number and 0 < value < float("inf")):
                _refuse(name, value, "a positive number", f"pass {field.default} as published")
            if field.type is bool and type(value) is not bool:
                _refuse(name, value, "True or False", "pass False for GPT-2 as published")
        if self.n_embd % self.n_head:
            _refuse("n_head", self.n_head, f"a divisor of n_embd={self.n_embd}", "change one of the two")
        if not isinstance(self.activation_function, str) or self.activation_function not in ACTIVATIONS:
            expected = f"one of {sorted(ACTIVATIONS)}"
            _refuse("activation_function", self.activation_function, expected, "GPT-2 as published uses 'gelu_new'")

    @property
    def inner(self) -> int:
        """Width of the feed-forward network."""
        return self.n_inner or 4 * self.n_embd

    @classmethod
    def small(cls, **overrides: Any) -> "GPT2Config":
        """GPT-2 small: 12 layers of 768, 12 heads, 124 million parameters (the paper of 2019 counts 117)."""
        return cls(**overrides)

    @classmethod
    def medium(cls, **overrides: Any) -> "GPT2Config":
        """GPT-2 medium: 24 layers of 1024, 16 heads, 355 million parameters."""
        return cls(**({"n_embd": 1024, "n_layer": 24, "n_head": 16} | overrides))

    @classmethod
    def large(cls, **overrides: Any) -> "GPT2Config":
        """GPT-2 large: 36 layers of 1280, 20 heads, 774 million parameters."""
        return cls(**({"n_embd": 1280, "n_layer": 36, "n_head": 20} | overrides))

    @classmethod
    def xl(cls, **overrides: Any) -> "GPT2Config":
        """GPT-2 XL: 48 layers of 1600, 25 heads, 1.56 billion parameters."""
        return cls(**({"n_embd": 1600, "n_layer": 48, "n_head": 25} | overrides))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "GPT2Config":
        """Read the content of a Hugging Face ``config.json``.

        Keys that do not change the maths (``use_cache``, ``bos_token_id``, ...) are ignored; those that ask for maths this
        module does not have, and values out of range, raise a ValueError.
        """
        if not isinstance(content, Mapping):
            raise ValueError(
                f"GPT2Config: the content of a config.json is expected, a mapping of its keys, got {type(content).__name__}."
            )
        for key, value in _ONLY_VALUE.items():
            if content.get(key) is not None and content[key] != value:
                _refuse(key, content[key], f"{value!r} or no such key", "this module computes nothing else")
        known = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        if _SCALE_KEY in content:
            known["scale_by_inverse_layer_index"] = content[_SCALE_KEY]
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a Hugging Face ``config.json``; :meth:`from_dict` reads it back to an equal config."""
        content = {"model_type": "gpt2"} | asdict(self)
        content[_SCALE_KEY] = content.pop("scale_by_inverse_layer_index")
        return content


def _refuse(field: str, value: object, expected: str, fix: str) -> NoReturn:
    raise ValueError(f"GPT2Config: {field}={value!r}, expected {expected}; {fix}.")


class GPT2Attention(nn.Module):
    """Causal multi-head attention with one matrix for query, key and value; ``index`` counts layers from 0."""

    def __init__(self, config: GPT2Config, index: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.heads = config.n_head
        self.dropout_prob = config.attn_pdrop
        self.scale = (config.n_embd // config.n_head) ** -0.5
        if config.scale_by_inverse_layer_index:
            self.scale /= index + 1

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, n_embd)`` to the same shape; a position sees itself and those before it."""
        q, k, v = (part.transpose(1, 2) for part in self.c_attn(x).unflatten(-1, (3, self.heads, -1)).unbind(2))
        dropout = self.dropout_prob if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=self.scale)
        return self.dropout(self.c_proj(context.transpose(1, 2).flatten(2)))


class GPT2MLP(nn.Module):
    """Two projections around an activation, then dropout."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.inner)
        self.act = ACTIVATIONS[config.activation_function]()
        self.c_proj = nn.Linear(config.inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, n_embd)`` to the same shape."""
        return self.dropout(sparse_mlp(x, self.c_fc, self.act, self.c_proj))


class GPT2Block(nn.Module):
    """One layer: attention, then a feed-forward network, each on the LayerNorm of its input (pre-LN)."""

    gathered_whole = True  # the unit under ZeRO-3: nobody calls what is inside but forward

    def __init__(self, config: GPT2Config, index: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, index)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, n_embd)`` to the same shape."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """GPT-2 with its language-model head, whose weight is the token embeddings.

    Args:
        config: sizes and rates.
        gradient_checkpointing: whether training keeps only the inputs of the layers and computes the rest again in the
            backward pass: the same gradients, less memory, about a third more time. An attribute, free to change.
    """

    @built_whole()  # _initialise reaches into modules that ZeRO-3 would have emptied by then
    def __init__(self, config: GPT2Config, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config, index) for index in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        _initialise(self, config)
        # "meta": the weight is replaced at once, allocating and filling it would be wasted.
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False, device="meta")
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits of the next token at every position.

        There is no mask: pad on the right, where no token before the padding sees it.

        Args:
            input_ids: int64 ``(B, T)``, ``1 <= T <= n_positions``, in ``0 .. vocab_size-1``.

        Returns:
            ``(B, T, vocab_size)``.

        Raises:
            ValueError: if the shape is not as above; on a CPU also if a token id is not.
        """
        return self.lm_head(self.hidden_states(input_ids))

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Return what the head reads, ``(B, T, n_embd)``; argument and errors as :meth:`forward`."""
        self._check(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.drop(self.wte(input_ids) + self.wpe(positions))
        for block in self.h:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.ln_f(x)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue ``tokens``, without dropout; beyond ``n_positions`` the oldest tokens drop out of sight.

        Args:
            tokens: int64 ``(B, T)``, ``T`` at least 1 and of any length.
            max_new_tokens: how many to add, one forward pass each; none ends early.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: sample among this many likeliest tokens; None among all.
            generator: where random numbers come from, on the device of ``tokens``; None for torch's own.

        Returns:
            int64 ``(B, T + max_new_tokens)``, ``tokens`` included.

        Raises:
            ValueError: if a value is out of its range; for ``tokens`` as :meth:`forward`.
        """
        for name, value, good, expected in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
            ("temperature", temperature, 0 <= temperature < float("inf"), "at least 0; 0 takes the likeliest token"),
            ("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None to sample among all tokens"),
        ):
            if not good:
                raise ValueError(f"generate: {name}={value!r}, expected {expected}.")
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                x = self.hidden_states(tokens[:, -self.config.n_positions :])
                logits = self.lm_head(x[:, -1]).float()
                tokens = torch.cat([tokens, _sample(logits, temperature, top_k, generator)], dim=1)
        finally:
            self.train(was_training)
        return tokens

    def _check(self, input_ids: Tensor) -> None:
        shape, limit, words = tuple(input_ids.shape), self.config.n_positions, self.config.vocab_size
        if len(shape) != 2 or not 1 <= shape[1] <= limit:
            raise ValueError(f"input_ids has shape {shape}, expected (B, T) with 1 <= T <= n_positions={limit}.")
        # On a GPU looking at values would wait for it; there the embedding stops the process with an assertion.
        if input_ids.device.type == "cpu" and input_ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in input_ids.aminmax())
            if low < 0 or high >= words:
                raise ValueError(
                    f"input_ids holds {low if low < 0 else high}, expected token ids in [0, vocab_size={words}); "
                    "use the tokenizer that belongs to the model."
                )


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each next token, in float32 whatever the dtype of the logits.

    Args:
        logits: ``(B, T, vocab)``, as :class:`GPT2` returns them.
        labels: int64 ``(B, T)``, the tokens the logits come from, not shifted: position t predicts ``labels[:, t + 1]``.
            -100 where nothing is to be predicted.

    Returns:
        A scalar, in nats; NaN if every label is -100.

    Raises:
        ValueError: if the shapes are not as above, or ``T`` is 1, which leaves nothing to predict.
    """
    if labels.shape != logits.shape[:-1] or labels.ndim != 2 or labels.shape[1] < 2:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and logits {tuple(logits.shape)}, expected (B, T) and "
            "(B, T, vocab) with T >= 2; pass the tokens as labels, they are shifted here."
        )
    # The labels move, not the logits: slicing those would copy the largest tensor of the step.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), ignore_index=IGNORED)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw one token per row of ``(B, vocab)``: ``(B, 1)``."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        best, tokens = logits.topk(min(top_k, logits.shape[-1]))
        return tokens.gather(1, _sample(best, temperature, None, generator))
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


@torch.no_grad()
def _initialise(root: nn.Module, config: GPT2Config) -> None:
    """Draw weights from N(0, initializer_range²), those that feed the residual stream smaller by sqrt(2 * n_layer).

    Radford et al. 2019, section 2.3: 1/sqrt(N) for N residual layers, two in each block. Like Hugging Face, and unlike
    OpenAI's code, which has 0.01 there, position embeddings are drawn like the rest.
    """
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            residual = name.endswith(".c_proj")
            module.weight.normal_(std=config.initializer_range / ((2 * config.n_layer) ** 0.5 if residual else 1.0))
        if isinstance(module, nn.Linear):
            module.bias.zero_()
