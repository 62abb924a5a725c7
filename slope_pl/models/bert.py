"""BERT (Devlin et al. 2018) with the parameter names of Hugging Face and nothing of sparsity.

Every matrix is a plain ``nn.Linear`` that is only ever *called*, so that surgery can replace it by a sparse layer.
Losses live with the training code; a model returns logits. Weights are read and written by :mod:`slope_pl.models.hf`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slope_pl.nn import built_whole, can_fuse, is_hooked, sparse_mlp

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,  # the exact one, with erf
    "gelu_new": partial(nn.GELU, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
}

# Hugging Face keys outside BertConfig that change the maths, and the one value of each that this module computes.
_ONLY_VALUE: dict[str, Any] = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "quantization_config": None,
}


@dataclass(frozen=True)
class BertConfig:
    """Sizes and rates of a BERT, under Hugging Face's names; the defaults are BERT-Base, uncased.

    A value out of range raises a ValueError with the field, the value, what is expected and the fix.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if field.type is int and (type(value) is not int or value < 1):
                _refuse(name, value, "an integer of at least 1", f"BERT-Base has {field.default}")
            if name.endswith("dropout_prob") and not (number and 0 <= value < 1):
                _refuse(name, value, "a number in [0, 1)", "pass 0.1 as published, or 0.0 for no dropout")
            if name in ("initializer_range", "layer_norm_eps") and not (number and 0 < value < float("inf")):
                _refuse(name, value, "a positive number", f"pass {field.default} as published")
        if self.hidden_size % self.num_attention_heads:
            expected = f"a divisor of hidden_size={self.hidden_size}"
            _refuse("num_attention_heads", self.num_attention_heads, expected, "change one of the two")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            _refuse("hidden_act", self.hidden_act, f"one of {sorted(ACTIVATIONS)}", "BERT as published uses 'gelu'")
        pad = self.pad_token_id
        if pad is not None and (type(pad) is not int or not 0 <= pad < self.vocab_size):
            expected = f"None or an integer in [0, vocab_size={self.vocab_size})"
            _refuse("pad_token_id", pad, expected, "pass the tokenizer's id of [PAD]")

    @classmethod
    def base(cls, **overrides: Any) -> "BertConfig":
        """BERT-Base: 12 layers of 768, 12 heads, 110 million parameters (Devlin et al. 2018, section 3)."""
        return cls(**overrides)

    @classmethod
    def large(cls, **overrides: Any) -> "BertConfig":
        """BERT-Large: 24 layers of 1024, 16 heads, 340 million parameters (Devlin et al. 2018, section 3).

        It has the 30522 words of the tokenizer. Published BERT-Large training recipes pad the vocabulary to 30528, a
        multiple of 8 for the tensor cores: pass ``vocab_size=30528``, a checkpoint of 30522 rows loads into it.
        """
        sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        return cls(**(sizes | overrides))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "BertConfig":
        """Read the content of a Hugging Face ``config.json``.

        Keys that do not change the maths (``use_cache``, ``architectures``, ...) are ignored; those that ask for maths
        this module does not have, and values out of range, raise a ValueError.
        """
        if not isinstance(content, Mapping):
            raise ValueError(
                f"BertConfig: the content of a config.json is expected, a mapping of its keys, got {type(content).__name__}."
            )
        for key, value in _ONLY_VALUE.items():
            if content.get(key) is not None and content[key] != value:
                _refuse(key, content[key], f"{value!r} or no such key", "this module computes nothing else")
        known = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        config = cls(**known)
        head = content.get("classifier_dropout")
        if head is not None and head != config.hidden_dropout_prob:
            expected = f"null or hidden_dropout_prob={config.hidden_dropout_prob}"
            _refuse("classifier_dropout", head, expected, "the two share one rate here: delete the key to use that")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a Hugging Face ``config.json``; :meth:`from_dict` reads it back to an equal config."""
        return {"model_type": "bert"} | asdict(self)


def _refuse(field: str, value: object, expected: str, fix: str) -> NoReturn:
    raise ValueError(f"BertConfig: {field}={value!r}, expected {expected}; {fix}.")


class BertModelOutput(NamedTuple):
    """``last_hidden_state`` ``(B, T, hidden)``; ``pooler_output`` ``(B, hidden)``, or None without a pooler."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None


class BertModelStates(NamedTuple):
    """The same with ``hidden_states``: those of the embeddings and of every layer, each ``(B, T, hidden)``."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    hidden_states: tuple[Tensor, ...]


class BertEmbeddings(nn.Module):
    """Word + position + segment embeddings, LayerNorm, dropout (Devlin et al. 2018, figure 2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Embed ``(B, T)`` token ids as ``(B, T, hidden)``."""
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(position_ids)))


class BertSelfAttention(nn.Module):
    """Bidirectional multi-head attention without its output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend over ``x`` ``(B, T, hidden)``; ``mask`` bool ``(B, 1, 1, T)``, True for the keys that may be seen."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        dropout = self.dropout_prob if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return context.transpose(1, 2).flatten(2)


class BertOutput(nn.Module):
    """The end of both halves of a layer: projection, dropout, residual, LayerNorm (post-LN, as in the original)."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Project ``x`` ``(B, T, in_features)`` and add it to ``residual`` ``(B, T, hidden)``."""
        return self.finish(self.dense(x), residual)

    def finish(self, projected: Tensor, residual: Tensor) -> Tensor:
        """What follows the projection; both ``(B, T, hidden)``."""
        return self.LayerNorm(self.dropout(projected) + residual)


class BertLayer(nn.Module):
    """One encoder layer: attention, then a feed-forward network."""

    gathered_whole = True  # the unit under ZeRO-3: nobody calls what is inside but forward

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        self.attention = nn.ModuleDict({"self": BertSelfAttention(config), "output": BertOutput(hidden, config)})
        self.intermediate = chain(dense=nn.Linear(hidden, wide), activation=ACTIVATIONS[config.hidden_act]())
        self.output = BertOutput(wide, config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map ``(B, T, hidden)`` to the same shape; ``mask`` as in :class:`BertSelfAttention`."""
        x = self.attention["output"](self.attention["self"](x, mask), x)
        widen, activation = self.intermediate
        parts = widen, activation, self.output.dense
        if can_fuse(*parts) and not is_hooked(self.intermediate, self.output):
            return self.output.finish(sparse_mlp(x, *parts), x)
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None, between: list[Tensor] | None = None) -> Tensor:
        """Map ``(B, T, hidden)`` to the same shape; ``mask`` as in :class:`BertSelfAttention`.

        ``between`` is a list to which the output of every layer is appended.
        """
        for layer in self.layer:
            x = layer(x, mask)
            if between is not None:
                between.append(x)
        return x


class BertModel(nn.Module):
    """The encoder (Devlin et al. 2018, section 3), with the pooler unless ``add_pooling_layer`` is False."""

    @built_whole()  # initialise reaches into modules that ZeRO-3 would have emptied by then
    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        dense = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.pooler = None if dense is None else chain(dense=dense, activation=nn.Tanh())
        initialise(self, config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> BertModelOutput | BertModelStates:
        """Encode a batch of token ids.

        Args:
            input_ids: int64 ``(B, T)``, ``T`` at most ``max_position_embeddings``.
            attention_mask: bool or integer ``(B, T)``, 0 for padding; None where there is no padding, which is faster.
            token_type_ids: int64 ``(B, T)``, the segment of each token; None for all 0.
            position_ids: int64 ``(B, T)`` or ``(T,)``; None for ``0 .. T-1``.
            output_hidden_states: whether to return what the embeddings and every layer give.

        Raises:
            ValueError: if a shape, or the dtype of the mask, is not as above.
        """
        shape, limit = tuple(input_ids.shape), self.config.max_position_embeddings
        if len(shape) != 2 or shape[1] > limit:
            raise ValueError(f"input_ids has shape {shape}, expected (B, T) with T <= {limit}.")
        for name, ids in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if ids is not None and ids.shape != shape:
                raise ValueError(f"{name} has shape {tuple(ids.shape)}, expected that of input_ids, {shape}.")
        if position_ids is not None and position_ids.shape not in (shape, shape[1:]):
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, expected {shape} or {shape[1:]}.")
        # A mask of 0 and -inf, the other convention, would be read upside down.
        if attention_mask is not None and attention_mask.is_floating_point():
            raise ValueError(f"attention_mask is {attention_mask.dtype}, expected bool or integers, 0 for padding.")
        mask = None if attention_mask is None else attention_mask.to(torch.bool)[:, None, None, :]
        x = self.embeddings(input_ids, token_type_ids, position_ids)
        states = [x] if output_hidden_states else None
        x = self.encoder(x, mask, states)
        pooled = None if self.pooler is None else self.pooler(x[:, 0])
        return BertModelOutput(x, pooled) if states is None else BertModelStates(x, pooled, tuple(states))


def chain(**modules: nn.Module) -> nn.Sequential:
    """Modules one after the other, by Hugging Face's names."""
    return nn.Sequential(OrderedDict(modules))


@torch.no_grad()
def initialise(root: nn.Module, config: BertConfig) -> None:
    """Draw weights from N(0, initializer_range²), as Hugging Face; Google's code cuts that normal at two deviations."""
    for module in root.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(std=config.initializer_range)
        if isinstance(module, nn.Linear):
            module.bias.zero_()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
