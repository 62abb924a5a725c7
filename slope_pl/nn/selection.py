"""Which linear layers become sparse, and why the others stay dense.

The rule is the paper's (section 4: all attention and MLP weights are pruned, "the first linear layer after the input and the
classification heads" stay dense), written down so that it can be applied to a model nobody here has seen:

* **first layer**: the first linear layer in definition order that is no head (some families define theirs first); where
  its name says query, key or value (``q_proj``, ``c_attn`` ...), its query, key and value siblings under the same parent too;
* **heads**: layers named as output heads (:data:`HEAD_NAMES`), and layers whose weight is tied to another module's;
* **shape guard**: a layer whose longer side is more than five times the shorter one (the rule of the published speed runs,
  which is how vocabulary projections drop out).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from slope_pl.config import SLoPeConfig
from slope_pl.errors import ConversionError
from slope_pl.nn.eligibility import check_model, is_conv1d, why_ineligible
from slope_pl.nn.sharding import whole_in_place
from slope_pl.nn.sparse_linear import SparseLinear

HEAD_NAMES = frozenset(
    {
        *("lm_head", "head", "classifier", "score", "qa_outputs", "decoder", "seq_relationship", "embed_out"),
        "pre_classifier",  # DistilBERT's: fresh, and of the task, as the layer below RoBERTa's classifier
        *("output_projection", "vocab_projector", "vocab_projection", "classification_head", "mlm_head", "nsp_head"),
    }
)
"""Last components of a qualified name that mark an output head."""

HEAD_PARENTS = frozenset({"lm_head", "classifier", "classification_head", "score"})
"""Components anywhere in a qualified name below which everything belongs to a head."""

MAX_SIDE_RATIO = 5

_QUERY_KEY_VALUE = re.compile(r"(w|to_|c_)?(q|k|v|qkv|query|key|value|query_key_value|attn)(_proj|_lin|_linear)?", re.I)


@dataclass(frozen=True)
class Choice:
    """What happens to one linear layer.

    Attributes:
        name: qualified name, the first one of a shared module.
        module: the layer.
        reason: why it stays dense; None if it becomes (or is) sparse.
    """

    name: str
    module: nn.Module
    reason: str | None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer that can be replaced: ``nn.Linear`` or Hugging Face's ``Conv1D``.

    Subclasses of ``nn.Linear`` do not count (a parametrised layer is one): their forward, or their parent's, may use the
    weight in its own way.
    """
    return type(module) is nn.Linear or is_conv1d(module)


def choose_layers(model: nn.Module, config: SLoPeConfig) -> list[Choice]:
    """Apply the rule to every linear layer of a model, in definition order.

    Raises:
        ConversionError: if a pattern matches no linear layer, or an explicit request names one that cannot be sparse.
    """
    check_model(model)
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if is_linear(module) or isinstance(module, nn.Linear | SparseLinear)
    ]
    names = [name for name, _ in candidates]
    for kind, patterns in (("include", config.include), ("exclude", config.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConversionError(
                    f"{kind} pattern {pattern!r} matches no linear layer. There are {len(names)}: {_some(names)}"
                )
    first = _first_layers(names) if config.keep_first_dense else set()
    tied = _tied_weights(model)
    choices = []
    for name, module in candidates:
        explicit = name in config.include
        reason = None
        if not isinstance(module, SparseLinear):
            reason = _why_dense(name, module, config, first, tied, explicit)
            if explicit and reason is not None:
                raise ConversionError(f"layer {name!r} is asked for in include, but cannot be 2:4 sparse: {reason}")
        choices.append(Choice(name, module, reason))
    return choices


def _why_dense(
    name: str, module: nn.Module, config: SLoPeConfig, first: set[str], tied: dict[int, list[str]], explicit: bool
) -> str | None:
    """The first reason that holds, or None. An explicit request passes over the rules, not over the impossible."""
    if not is_linear(module):
        return f"a {type(module).__name__}, which may use its weight in its own way"
    if module._parameters.get("weight") is None:
        return "its weight is computed (pruned, normalised or otherwise re-parametrised)"
    if any(fnmatchcase(name, pattern) for pattern in config.exclude):
        return "excluded by pattern"
    if config.include and not any(fnmatchcase(name, pattern) for pattern in config.include):
        return "not among the include patterns"
    others = [owner for owner in tied.get(id(module.weight), []) if owner != name]
    if others:
        return f"its weight is tied to {', '.join(others)}"
    if not explicit:
        if name in first:
            return "first linear layer after the input"
        if config.keep_heads_dense and is_head(name):
            return "output head"
    parameter = module.get_parameter("weight")
    with whole_in_place(parameter):
        weight = parameter.detach()
        weight = weight if isinstance(module, nn.Linear) else weight.t()
        reason = why_ineligible(weight)
    if reason is None and not explicit:
        short, long = sorted(weight.shape)
        if long > MAX_SIDE_RATIO * short:
            reason = (
                f"{weight.shape[0]}x{weight.shape[1]} is too lopsided (sides differ more than {MAX_SIDE_RATIO}-fold)"
            )
    return reason


def is_head(name: str) -> bool:
    """Whether a qualified name says that the layer belongs to an output head."""
    *parents, leaf = name.split(".")
    return leaf in HEAD_NAMES or not HEAD_PARENTS.isdisjoint(parents)


def _first_layers(names: list[str]) -> set[str]:
    """The first layer, with its query, key and value siblings where it is one of them."""
    if not names:
        return set()
    first = next((name for name in names if not is_head(name)), names[0])
    parent, _, leaf = first.rpartition(".")
    if not _QUERY_KEY_VALUE.fullmatch(leaf):
        return {first}
    siblings = (name for name in names if name.rpartition(".")[0] == parent)
    return {name for name in siblings if _QUERY_KEY_VALUE.fullmatch(name.rpartition(".")[2])}


def _tied_weights(model: nn.Module) -> dict[int, list[str]]:
    """Parameters that several *different* modules hold: id -> names of the modules, one each."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in owners.items() if len(names) > 1}


def all_names(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every qualified name with its module, a shared module once a name."""
    yield from model.named_modules(remove_duplicate=False)


def _some(names: list[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return f"{shown}, ..." if len(names) > most else shown or "none"
