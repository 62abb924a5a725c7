"""Which layers the baselines mask, and putting masked layers into a model and taking them out again."""

import re
from typing import Any

import torch
from torch import nn

from slope_pl.baselines.config import BaselineConfig, FSTConfig, SRSTEConfig
from slope_pl.baselines.layers import MaskedLinear
from slope_pl.config import SLoPeConfig
from slope_pl.errors import ConfigError, ConversionError
from slope_pl.nn.selection import Choice, all_names, choose_layers
from slope_pl.nn.surgery import layer_seed, log_dense_layers, refuse_wrapped, replace_module, sparse_layers

_FEED_FORWARD = re.compile(
    r"(^|\.)(mlp|ffn|feed_?forward|DenseReluDense)\."  # GPT-2, Llama, ViT, DistilBERT, T5
    r"|(^|\.)intermediate\.dense$|(?<!attention)\.output\.dense$"  # BERT
    r"|(^|\.)(fc1|fc2)$",  # OPT, CLIP
    re.IGNORECASE,
)


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """The masked layers of a model by qualified name; a shared one once, under its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def choose_feed_forward(model: nn.Module, targets: tuple[str, ...] = ()) -> list[Choice]:
    """Choose the layers of FST: the linear layers of feed-forward blocks, those of the first block included.

    Without ``targets`` a layer is one by its qualified name: below a component ``mlp``, ``ffn``, ``feed_forward`` or
    ``DenseReluDense``; BERT's ``intermediate.dense`` and ``output.dense`` (but not ``attention.output.dense``); ``fc1`` and
    ``fc2``. Output heads, tied weights and shapes that cannot be 2:4 stay dense, as in :mod:`slope_pl.nn.selection`.

    Args:
        model: any module.
        targets: shell patterns on qualified names, instead.

    Raises:
        ConversionError: if a pattern matches no linear layer, or an explicit name cannot be masked.
    """
    config = SLoPeConfig(include=targets, keep_first_dense=False)
    return [
        Choice(c.name, c.module, "not a feed-forward layer by its name")
        if not targets and c.reason is None and not _FEED_FORWARD.search(c.name)
        else c
        for c in choose_layers(model, config)
    ]


def mask_layers(model: nn.Module, config: SRSTEConfig | FSTConfig) -> dict[str, MaskedLinear]:
    """Replace linear layers of a model by masked ones, in place; their Parameters stay the same objects.

    A second call finds nothing to do and returns the same mapping.

    Args:
        model: any module, before it is wrapped for distribution.
        config: an :class:`SRSTEConfig` masks what SLoPe would make sparse, an :class:`FSTConfig` feed-forward layers.

    Returns:
        qualified name -> layer.

    Raises:
        ConversionError: if no layer matches, a pattern matches nothing, the model is wrapped already, or it was converted
            by another configuration or method.
    """
    if not isinstance(config, SRSTEConfig | FSTConfig):
        raise ConfigError(f"an SRSTEConfig or an FSTConfig is expected, got a {type(config).__name__}")
    refuse_wrapped(model)
    if sparse_layers(model):
        raise ConversionError(
            f"the model has SLoPe's sparse layers ({next(iter(sparse_layers(model)))}, ...): use one method a model, or "
            "densify it first"
        )
    existing = masked_layers(model)
    for name, layer in existing.items():
        if layer.config != config:
            raise ConversionError(
                f"layer {name!r} is masked already, by {layer.config}, and not by {config}; use one configuration, or "
                "unmask_layers(model) first"
            )
    if existing:
        return existing
    if isinstance(config, FSTConfig):
        choices, fix = choose_feed_forward(model, config.targets), "name the feed-forward layers in targets"
    else:
        choices, fix = choose_layers(model, config.selection()), "see include and keep_first_dense"
    chosen = {id(c.module): c.name for c in choices if c.reason is None}
    log_dense_layers([(c.name, c.reason) for c in choices if c.reason is not None])
    if not chosen:
        reasons = "; ".join(f"{c.name}: {c.reason}" for c in choices[:6]) or "it has none"
        raise ConversionError(
            f"none of the {len(choices)} linear layers of {type(model).__name__} is masked ({reasons}); {fix}"
        )
    unbuilt = [c.name for c in choices if c.reason is None and any(p.is_meta for p in c.module.parameters())]
    if unbuilt:
        raise ConversionError(
            f"{len(unbuilt)} layers ({unbuilt[0]}, ...) are on the meta device and have no values to choose a mask from: "
            "materialise the model first"
        )
    made: dict[int, MaskedLinear] = {}
    for name, old in list(all_names(model)):
        if id(old) in chosen:
            if id(old) not in made:
                made[id(old)] = _make(old, config, layer_seed(config.seed, chosen[id(old)]))
            replace_module(model, name, made[id(old)])
    return masked_layers(model)


@torch.no_grad()
def unmask_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Replace masked layers by dense ones that compute the same, in place: to export a model.

    Hidden entries become zeros unless the mask was dropped; awake adapters are added into the weight.

    Returns:
        qualified name -> new dense layer; empty if there was none.
    """
    refuse_wrapped(model)
    made: dict[int, nn.Module] = {}
    result: dict[str, nn.Module] = {}
    for name, old in list(all_names(model)):
        if isinstance(old, MaskedLinear):
            if id(old) not in made:
                made[id(old)] = result[name] = old.to_dense()
                made[id(old)].made_dense_by_slope = True  # type: ignore[assignment]  # see slope_pl.nn.was_densified
            replace_module(model, name, made[id(old)])
    return result


def _make(old: nn.Module, config: BaselineConfig, seed: int) -> MaskedLinear:
    options: dict[str, Any]
    if isinstance(config, FSTConfig):
        options = {"mask": "transposable", "mvue": config.mvue}
    else:
        assert isinstance(config, SRSTEConfig)
        # The rank depends on the smaller side alone: the orientation of the stored weight does not matter.
        rank = config.selection().rank_for(*old.get_parameter("weight").shape)
        options = {"backward_pruning": config.backward_pruning, "adapter_rank": rank}
    layer = MaskedLinear(old, seed=seed, **options)
    layer.config = config
    return layer
