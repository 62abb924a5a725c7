"""What this package writes into a checkpoint: its mark, and the names behind the optimizer's numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from slope_pl.errors import CheckpointError

CHECKPOINT_KEY = "slope_pl"
FORMAT_VERSION = 1
BASELINE_KEY = "slope_pl_baseline"
BASELINE_FORMAT_VERSION = 1
OPTIMIZERS_KEY = "slope_pl_optimizers"
RNG_KEY = "slope_pl_rng"  # of a dense model, whose file has no mark

Groups = list[dict[str, Any]]


def check_format(mark: Mapping[str, Any], newest: int = FORMAT_VERSION) -> None:
    """Raise if a checkpoint was written by a newer version of this package, in a format that it changed."""
    if mark["format"] < 1:
        raise CheckpointError(f"the checkpoint has format {mark['format']}, 1 or more is expected: it is damaged")
    if mark["format"] > newest:
        raise CheckpointError(
            f"the checkpoint has format {mark['format']} (slope_pl {mark['version']}); this slope_pl reads up to {newest}: "
            "update it"
        )


def check_mark(content: Mapping[str, Any]) -> None:
    """:func:`check_format` of a whole checkpoint; one without a mark is of a dense model."""
    for key, newest in ((CHECKPOINT_KEY, FORMAT_VERSION), (BASELINE_KEY, BASELINE_FORMAT_VERSION)):
        if key in content:
            check_format(content[key], newest)


def name_groups(module: nn.Module, optimizer: Optimizer) -> Groups:
    """The groups of an optimizer, ``{"params": names}`` each, in its order.

    A state dict of an optimizer has numbers in place of names. By these names a checkpoint can be sharded, and taken to a
    strategy that numbers in another order. A parameter that the module does not have is called "".
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [{"params": [names.get(id(p), "") for p in group["params"]]} for group in optimizer.param_groups]


def by_name(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An optimizer's state dict with names in place of numbers.

    Args:
        state: as ``optimizer.state_dict()`` gives it; its numbers may be in any order.
        groups: see :func:`name_groups`; matched by position, as ``optimizer.load_state_dict`` does.

    Raises:
        CheckpointError: if the groups have other sizes.
    """
    own, saved = [[len(group["params"]) for group in side] for side in (groups, state["param_groups"])]
    if own != saved:
        raise CheckpointError(
            f"the checkpoint's optimizer has groups of {saved} parameters, expected {own}: resume with the optimizer groups "
            "that it was made with"
        )
    names: dict[int, str] = {}
    for numbers, group in zip(state["param_groups"], groups, strict=True):
        names |= dict(zip(numbers["params"], group["params"], strict=True))
    return {
        "state": {names[number]: entry for number, entry in state["state"].items()},
        "param_groups": [
            {**old, "params": list(group["params"])} for old, group in zip(state["param_groups"], groups, strict=True)
        ],
    }


def by_number(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """The reverse of :func:`by_name`, numbered group by group as a torch optimizer does.

    Args:
        state: with names.
        groups: the order within each group, where it is not that of ``state``.
    """
    order = [list(group["params"]) for group in (groups or state["param_groups"])]
    numbers: dict[str, int] = {}
    for group in order:
        for name in group:
            numbers[name] = len(numbers)
    return {
        "state": {numbers[name]: entry for name, entry in state["state"].items()},
        "param_groups": [
            {**old, "params": [numbers[name] for name in names]}
            for old, names in zip(state["param_groups"], order, strict=True)
        ],
    }


def named_states(content: Mapping[str, Any], path: object) -> list[dict[str, Any]]:
    """The optimizer states of a full checkpoint by the names that it records.

    Raises:
        CheckpointError: if it records none.
    """
    states, record = content.get("optimizer_states", []), content.get(OPTIMIZERS_KEY)
    if states and record is None:
        raise CheckpointError(
            f"{path} numbers the parameters of its optimizer and does not name them: it was not written by this version's "
            "SLoPeCallback or SLoPeLightningModule. Resume it once under the strategy that wrote it and save again, or "
            "take its weights alone"
        )
    return [by_name(state, groups) for state, groups in zip(states, record or [], strict=True)]
