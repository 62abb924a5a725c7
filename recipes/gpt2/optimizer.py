"""AdamW as GPT-2 is pretrained with: groups by kind of parameter, a warm-up and a decay counted in steps."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import nn

from slope_pl import sparse_layers
from slope_pl.nn import full_shape

Schedule = Literal["linear", "cosine"]


def rate_schedule(schedule: Schedule, total: int, warmup: int | float, min_rate_share: float) -> Callable[[int], float]:
    """The rate of each step as a share of its peak.

    Args:
        schedule: how it falls after the warm-up: ``linear`` or ``cosine``.
        total: optimizer steps of the run.
        warmup: steps (an integer) or share of all steps (a fraction below 1) in which it rises from 0.
        min_rate_share: what it falls to at ``total``.

    Raises:
        ValueError: if the warm-up is as long as the run.
    """
    rise = warmup if isinstance(warmup, int) else round(warmup * total)
    if rise >= total:
        raise ValueError(f"warmup={warmup} is {rise} steps, and the run ends after {total}: choose a shorter warm-up")

    def share(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        left = max(0.0, (total - step) / (total - rise))
        fall = left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
        return min_rate_share + (1 - min_rate_share) * fall

    return share


def parameter_groups(
    module: nn.Module,
    learning_rate: float,
    *,
    decay: dict[str, float],
    scale: dict[str, float],
) -> list[dict[str, Any]]:
    """All parameters by kind, sleeping adapters included.

    Kinds: ``values`` (kept values of 2:4 weights), ``weights`` (dense matrices and embeddings), ``no_decay`` (biases and
    norms) and ``adapters``.

    Args:
        module: the converted model.
        learning_rate: of a kind that ``scale`` does not name.
        decay: weight decay by kind; 0 where it names none.
        scale: factor on the rate by kind.
    """
    values = {id(layer.values) for layer in sparse_layers(module).values()}
    groups: dict[str, list[nn.Parameter]] = {"values": [], "weights": [], "no_decay": [], "adapters": []}
    for name, parameter in module.named_parameters():
        if "adapter_" in name:
            groups["adapters"].append(parameter)
        elif id(parameter) in values:
            groups["values"].append(parameter)
        else:
            groups["weights" if len(full_shape(parameter)) > 1 else "no_decay"].append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * scale.get(kind, 1.0),
            "weight_decay": decay.get(kind, 0.0),
            "name": kind,
        }
        for kind, parameters in groups.items()
        if parameters
    ]


def refuse_idle(levers: Iterable[tuple[str, Any, Any, str]], groups: list[dict[str, Any]]) -> None:
    """Refuse settings of parameters that the model has none of.

    Args:
        levers: name, value, default, and the kind of parameters.
        groups: of the optimizer.

    Raises:
        ValueError: if one has another value than its default.
    """
    kinds = [group["name"] for group in groups]
    for name, value, default, kind in levers:
        if value != default and kind not in kinds:
            raise ValueError(f"{name}={value} has no effect: this model has no {kind}; leave it out")
