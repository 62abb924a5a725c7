"""The folder that DeepSpeed's ZeRO leaves, as the full checkpoint that a single device would have written.

Each rank has its share of a flat vector per group of the optimizer: of the fp32 weights, and of each moment. Stages 1 and 2 cut
the vector of a whole group; stage 3 cuts each parameter, and may spread a group over several vectors. The order of the
parameters is in the model's file (``param_shapes``); sizes follow ``zero_to_fp32.py`` of deepspeed 0.19, which is not needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slope_pl.checkpoint.mark import OPTIMIZERS_KEY, Groups, by_number
from slope_pl.checkpoint.trusted import load_trusted
from slope_pl.errors import CheckpointError

_TAG = "checkpoint"  # Lightning's
# What DeepSpeed puts beside what Lightning gave it.
_OF_DEEPSPEED = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "sparse_tensor_module_names",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "num_experts",
    "ds_config",
    "ds_version",
}


@dataclass(frozen=True)
class ZeroFolder:
    """What a folder says of itself.

    Attributes:
        stage: of ZeRO.
        world_size: how many processes wrote it.
        models: the files with model states, by rank; one alone in stages 1 and 2.
        optimizers: the files with optimizer states, by rank.
    """

    stage: int
    world_size: int
    models: tuple[Path, ...]
    optimizers: tuple[Path, ...]


def is_zero_folder(path: Path) -> bool:
    """Whether DeepSpeed wrote the folder."""
    return any((path / _TAG).glob("*_model_states.pt"))


def describe_zero(path: Path) -> ZeroFolder:
    """Stage and number of processes of a folder.

    Raises:
        CheckpointError: if files of some ranks are missing, damaged, or would call something; or it is not ZeRO's.
    """
    models = tuple(sorted((path / _TAG).glob("*mp_rank_00_model_states.pt"), key=_rank))
    optimizers = tuple(sorted((path / _TAG).glob("*zero_pp_rank_*_optim_states.pt"), key=_rank))
    if not models:
        raise CheckpointError(f"{path} has no model states: expected the folder that a DeepSpeedStrategy wrote")
    model = load_trusted(models[0])
    try:
        stage = int(model.get("ds_config", {}).get("zero_optimization", {}).get("stage", 0))
        world_size = int(model.get("dp_world_size", 0))
        whole = model.get("mp_world_size", 1) == 1
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{models[0]} does not say its stage of ZeRO and its number of processes as DeepSpeed does ({error}): it is damaged"
        ) from error
    if not whole or stage == 0:
        raise CheckpointError(f"{path} is of ZeRO stage {stage} or of model parallelism: expected ZeRO 1, 2 or 3")
    if len(optimizers) != world_size or len(models) != (world_size if stage == 3 else 1):
        raise CheckpointError(
            f"{path} was written by {world_size} processes, but has {len(models)} files of model states and "
            f"{len(optimizers)} of optimizer states: its save was not finished, or files are missing"
        )
    return ZeroFolder(stage, world_size, models, optimizers)


def check_zero(folder: ZeroFolder) -> None:
    """Raise a CheckpointError if DeepSpeed, which unpickles one file of each kind on each rank, would call something.

    Every rank has to look at all files: one that fails alone leaves the others waiting for it.
    """
    for file in (*folder.models, *folder.optimizers):
        load_trusted(file)


def read_zero(path: Path, optimizer: bool = True) -> dict[str, Any]:
    """Weights in fp32 where the optimizer has them so, its state, and all that Lightning saved.

    The state of adapters that sleep is left out, as a single device has none: ZeRO counts their steps from the start, of
    zeros.

    Raises:
        CheckpointError: see :func:`describe_zero`; or if the files hold other sizes than they say.
    """
    folder = describe_zero(path)
    models = [load_trusted(file) for file in folder.models]
    shards = [load_trusted(file)["optimizer_state_dict"] for file in folder.optimizers]
    shapes: list[dict[str, torch.Size]] = models[0]["param_shapes"]
    read = _Cutter(folder, shapes, shards, path)
    weights = read.vectors(
        lambda shard: shard["fp32_flat_groups" if folder.stage == 3 else "single_partition_of_fp32_groups"]
    )
    state = {key: tensor for key, tensor in models[0]["module"].items() if tensor is not None}
    state |= weights | _frozen(folder, models)
    for copy, original in models[0]["shared_params"].items():
        state[copy] = state[original]
    content = {key: value for key, value in models[0].items() if key not in _OF_DEEPSPEED}
    content["state_dict"] = {key: _own(tensor) for key, tensor in state.items()}
    if optimizer:
        named = read.optimizer(asleep=_asleep(state))
        groups: Groups | None = content.get(OPTIMIZERS_KEY, [None])[0]
        for index, group in enumerate(groups or []):
            if "weight_decay" in group:  # ZeRO has 0 for adapters as long as they sleep
                named["param_groups"][index]["weight_decay"] = group["weight_decay"]
        content["optimizer_states"] = [by_number(named, groups)]
        content[OPTIMIZERS_KEY] = [groups or [{"params": group["params"]} for group in named["param_groups"]]]
    return content


class _Cutter:
    """Cuts the ranks' vectors back into parameters."""

    def __init__(
        self, folder: ZeroFolder, shapes: list[dict[str, torch.Size]], shards: list[dict[str, Any]], path: Path
    ) -> None:
        self._folder, self._shapes, self._shards, self._path = folder, shapes, shards, path

    def vectors(self, of: Callable[[dict[str, Any]], Any]) -> dict[str, Tensor]:
        """Name -> tensor, from the vectors (one for each entry of ``param_shapes``) that ``of`` finds in a rank's file."""
        found: dict[str, Tensor] = {}
        for index, shapes in enumerate(self._shapes):
            parts = [of(shard)[index] for shard in self._shards]
            if parts[0] is not None:
                found |= self._whole(parts, shapes) if self._folder.stage == 3 else self._flat(parts, shapes, index)
        return found

    def _flat(self, parts: list[Tensor], shapes: dict[str, torch.Size], index: int) -> dict[str, Tensor]:
        vector, offset, found = torch.cat(parts), 0, {}
        paddings = self._shards[0].get("param_alignment_paddings")
        for place, (name, shape) in enumerate(shapes.items()):
            self._check(offset + shape.numel(), vector.numel(), name)
            found[name] = vector.narrow(0, offset, shape.numel()).view(shape)
            offset += shape.numel() + (paddings[index][place] if paddings else 0)
        return found

    def _whole(self, parts: list[Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        offset, found = 0, {}
        for name, shape in shapes.items():
            share = -(-shape.numel() // len(parts))
            self._check(offset + share, parts[0].numel(), name)
            pieces = [part.narrow(0, offset, share) for part in parts]
            found[name] = torch.cat(pieces)[: shape.numel()].view(shape)
            offset += share
        return found

    def _check(self, wanted: int, there: int, name: str) -> None:
        if wanted > there:
            raise CheckpointError(f"{self._path}: {name} ends at entry {wanted} of a vector of {there}: it is damaged")

    def optimizer(self, asleep: frozenset[str]) -> dict[str, Any]:
        """The optimizer's state by name."""
        key = "optimizer_state_dict" if self._folder.stage == 3 else "base_optimizer_state"
        states = [shard[key] for shard in self._shards]
        if not isinstance(states[0], dict):
            raise CheckpointError(
                f"{self._path} has DeepSpeed's elastic optimizer states: save it with elastic_checkpoint false"
            )
        groups = states[0]["param_groups"]
        numbers = [number for group in groups for number in group["params"]]  # one for each vector
        names = {number: list(shapes) for number, shapes in zip(numbers, self._shapes, strict=True)}
        state: dict[str, dict[str, Any]] = {}
        for kind in sorted({kind for entry in states[0]["state"].values() for kind in entry}):
            for number in numbers:
                value = states[0]["state"].get(number, {}).get(kind)
                if value is not None and not (isinstance(value, Tensor) and value.dim()):
                    for name in names[number]:  # the steps that Adam counts
                        state.setdefault(name, {})[kind] = value.clone() if isinstance(value, Tensor) else value
            of = partial(_vectors, key=key, numbers=numbers, kind=kind)
            for name, tensor in self.vectors(of).items():
                state.setdefault(name, {})[kind] = _own(tensor)
        return {
            "state": {name: entry for name, entry in state.items() if name not in asleep},
            "param_groups": [
                {**group, "params": [name for number in group["params"] for name in names[number]]} for group in groups
            ],
        }


def _vectors(shard: dict[str, Any], key: str, numbers: list[int], kind: str) -> list[Tensor | None]:
    """One kind of state (``exp_avg``) of each vector of a rank; None where there is none."""
    values = [shard[key]["state"].get(number, {}).get(kind) for number in numbers]
    return [value if isinstance(value, Tensor) and value.dim() else None for value in values]


def _frozen(folder: ZeroFolder, models: list[dict[str, Any]]) -> dict[str, Tensor]:
    shapes = models[0].get("frozen_param_shapes") or {}
    if folder.stage < 3:
        return {name: models[0]["frozen_param_fragments"][name].view(shape) for name, shape in shapes.items()}
    fragments = {name: torch.cat([m["frozen_param_fragments"][name].flatten() for m in models]) for name in shapes}
    return {name: fragments[name][: shape.numel()].view(shape) for name, shape in shapes.items()}


def _asleep(state: dict[str, Tensor]) -> frozenset[str]:
    layers = [n.removesuffix("adapter_active") for n, t in state.items() if n.endswith("adapter_active") and not t]
    return frozenset(layer + adapter for layer in layers for adapter in ("adapter_down", "adapter_up"))


def _own(tensor: Tensor) -> Tensor:
    """A tensor that keeps no vector alive, and writes none into a file."""
    return tensor.detach().clone().contiguous()


def _rank(file: Path) -> int:
    parts = file.name.split("_")
    return int(parts[parts.index("rank") + 1]) if file.name.startswith(("zero_pp", "bf16_zero_pp")) else 0
