"""What the kinds of optimizers do with values of half the size, and with adapters that begin to train late.

An optimizer that treats every entry by itself (SGD, Adam and all that are like it) does to ``values`` what it would do to the
kept entries of a dense weight. One that needs the norm of a tensor (LAMB) does, too, since pruned entries have none. One that
looks at rows and columns does not: the columns of ``values`` are the first and second kept weights of each group of four, not
input features.
"""

from typing import Any

import torch
from torch.optim import Optimizer

from slope_pl.errors import ScheduleError
from slope_pl.nn import SparseLinear
from slope_pl.optim import Lamb

_BY_SHAPE = {
    "Muon": "orthogonalises them as matrices (d_out, d_in / 2)",
    "Adafactor": "estimates their second moments by rows and columns of (d_out, d_in / 2)",
}


def optimizer_notes(optimizers: list[Any], layers: dict[str, SparseLinear]) -> list[str]:
    """Look at the kinds of a run's optimizers.

    Args:
        optimizers: of the Trainer.
        layers: qualified name -> layer.

    Returns:
        a line for each that is not on sparse layers what it is on dense ones.

    Raises:
        ScheduleError: for an optimizer whose groups have to begin to train together, if adapters share one with other
            parameters.
    """
    values = {id(layer.values) for layer in layers.values()}
    adapters = {
        id(adapter): f"{name}.{label}"
        for name, layer in layers.items()
        for label, adapter in (("adapter_down", layer.adapter_down), ("adapter_up", layer.adapter_up))
        if adapter is not None and not layer.adapters_awake
    }
    notes = []
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        for index, group in enumerate(getattr(optimizer, "param_groups", [])):
            ids = {id(parameter) for parameter in group["params"]}
            inside = [name for key, name in adapters.items() if key in ids]
            reason = _why_one_group(optimizer, group)
            if reason is not None and inside and len(inside) < len(ids):
                raise ScheduleError(
                    f"{kind} {reason}, and {inside[0]} shares group {index} of it with parameters that train from the start, "
                    "while adapters begin when they wake. Put parameters with 'adapter_' in their name into a group of their "
                    "own, or use torch.optim.AdamW(fused=True)"
                )
        held = {id(parameter) for group in getattr(optimizer, "param_groups", []) for parameter in group["params"]}
        by_shape = _BY_SHAPE.get(kind)
        if by_shape is not None and held & values:
            notes.append(
                f"SLoPe: {kind} trains the values of sparse layers and {by_shape}; their columns are slots of groups of "
                "four and not input features, so this is not what it does to a dense weight."
            )
    return notes


def refuse_flattened(optimizer: Optimizer) -> None:
    """Raise a ScheduleError for an optimizer that needs tensors as they are, under ZeRO, which flattens and divides them."""
    needs = {Lamb: "the norm of each tensor", torch.optim.Muon: "each tensor as a matrix"}
    for kind, what in needs.items():
        if isinstance(optimizer, kind):
            raise ScheduleError(
                f"{kind.__name__} under DeepSpeed: ZeRO flattens parameters and divides them over ranks, and {kind.__name__} "
                f"needs {what}. Use AdamW, or strategy 'slope_ddp'"
            )


def _why_one_group(optimizer: Any, group: dict[str, Any]) -> str | None:
    """Why the members of a group have to begin together, or None: not so with torch's fused Adam, which counts for each."""
    kind = type(optimizer)
    if kind.__name__ == "FusedAdam" and kind.__module__.startswith("deepspeed."):
        return "counts the steps of a group together"
    if isinstance(optimizer, torch.optim.SGD) and group.get("fused") and group.get("momentum"):
        return "with fused=True and momentum keeps the momenta of a group together"
    return None
