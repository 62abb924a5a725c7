"""AdamW and the schedule of the GLUE recipe: the same as the SQuAD recipe's."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, adapter_weight_decay: float
) -> list[dict[str, Any]]:
    """Weights, what has no decay (biases and norms), and adapters, by their names."""
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "no_decay": [], "adapters": []}
    for name, parameter in parameters:
        if "adapter_" in name:
            groups["adapters"].append(parameter)
        else:
            groups["weights" if parameter.dim() > 1 else "no_decay"].append(parameter)
    decay = {"weights": weight_decay, "no_decay": 0.0, "adapters": adapter_weight_decay}
    return [{"params": ps, "weight_decay": decay[key], "name": key} for key, ps in groups.items() if ps]


def linear_schedule(total: int | float, warmup: float) -> Callable[[int], float]:
    """The rate as a share of its peak, by step: up in the first ``warmup`` of all steps, then down to 0."""
    rising = round(warmup * total)

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return max(0.0, (total - step) / max(1, total - rising))

    return rate
