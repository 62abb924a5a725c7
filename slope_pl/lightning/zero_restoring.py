"""DeepSpeed's ZeRO filled from a full checkpoint: weights, fp32 weights, the optimizer's state and the engine's counters.

DeepSpeed itself resumes from the folder of the same stage and number of processes alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from slope_pl.checkpoint.mark import by_name
from slope_pl.checkpoint.trusted import load_trusted
from slope_pl.errors import CheckpointError

State = Mapping[str, Mapping[str, Any]]
Cut = Callable[[Callable[[str], Tensor | None]], Tensor]


@contextmanager
def trusted_engine(engine: Any) -> Iterator[None]:
    """Let an engine read its files as :func:`load_trusted` does; by itself it runs what is pickled in them."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)
    reader = engine.checkpoint_engine
    reader.load = lambda path, map_location=None: load_trusted(path, classes, map_location)
    try:
        yield
    finally:
        del reader.load


def restore_zero(
    strategy: DeepSpeedStrategy,
    checkpoint: Mapping[str, Any],
    strict: bool,
    groups: Sequence[Mapping[str, Any]] | None,
) -> None:
    """Load a full checkpoint into a model under DeepSpeed; every rank has to come here with all of it.

    The loss scale of fp16 is not part of it and begins anew.

    Args:
        strategy: with its engine.
        checkpoint: as ``read_checkpoint`` gives it.
        strict: whether the model must have exactly its tensors.
        groups: names in the groups of the optimizer; None to load the weights alone.

    Raises:
        CheckpointError: if the tensors or the optimizer's groups are others, parameters of a group have had different
            numbers of steps, or the engine runs an optimizer without ZeRO.
    """
    assert strategy.lightning_module is not None
    weights: Mapping[str, Tensor] = checkpoint["state_dict"]
    load_whole(strategy.lightning_module, weights, strict)
    if groups is None:
        return
    engine: Any = strategy.deepspeed_engine
    optimizer = engine.optimizer
    named = by_name(checkpoint["optimizer_states"][0], groups)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        _fill_stage_3(engine, weights, named)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        _fill_stage_1_and_2(engine, weights, named)
    else:
        raise CheckpointError(
            f"DeepSpeed runs {type(optimizer).__name__}: a full checkpoint can be loaded under ZeRO stage 1, 2 and 3 alone"
        )
    engine.global_steps = int(checkpoint["global_step"])
    engine.global_samples = engine.global_steps * engine.train_batch_size()


def load_whole(module: nn.Module, state: Mapping[str, Tensor], strict: bool) -> None:
    """``module.load_state_dict`` of a module that ZeRO-3 may have spread over ranks."""
    own = module.state_dict(keep_vars=True)
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"the checkpoint is of another model than this {type(module).__name__}: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} have no place ({', '.join(unexpected[:3])})"
        )
    errors: list[str] = []
    for prefix, part in module.named_modules():
        prefix = f"{prefix}." if prefix else ""
        spread = [p for p in part.parameters(recurse=False) if hasattr(p, "ds_id")]
        with _whole(spread):
            # Every rank reads all of it: buffers and what a layer concludes from them are each rank's own.
            part._load_from_state_dict(dict(state), prefix, {}, False, [], [], errors)
    if errors:
        raise CheckpointError(f"the checkpoint does not fit this {type(module).__name__}: {'; '.join(errors[:3])}")


def _whole(parameters: list[nn.Parameter]) -> Any:
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _fill_stage_1_and_2(engine: Any, weights: Mapping[str, Tensor], named: Mapping[str, Any]) -> None:
    """A rank has one contiguous part of a group's flat vector."""
    optimizer = engine.optimizer
    state = {}
    for index, (own, group) in enumerate(
        zip(optimizer.single_partition_of_fp32_groups, optimizer.round_robin_bit16_groups, strict=True)
    ):
        places = list(zip(_names(engine, group), optimizer.round_robin_bit16_offsets[index], strict=True))
        rank = dist.get_rank(group=optimizer.real_dp_process_group[index])
        total = optimizer.bit16_groups_flat[index].numel()

        def cut(
            find: Callable[[str], Tensor | None],
            places: Any = places,
            rank: int = rank,
            total: int = total,
            own: Tensor = own,
        ) -> Tensor:
            vector = torch.zeros(total)
            for name, offset in places:
                tensor = find(name)
                if tensor is not None:
                    vector[offset : offset + tensor.numel()] = tensor.flatten().float()
            return vector[rank * own.numel() : (rank + 1) * own.numel()]

        own.data.copy_(cut(weights.__getitem__))
        state[index] = _entry(cut, [name for name, _ in places], named["state"])
    groups = optimizer.optimizer.state_dict()["param_groups"]
    optimizer.optimizer.load_state_dict(_inner(state, groups, named))


def _fill_stage_3(engine: Any, weights: Mapping[str, Tensor], named: Mapping[str, Any]) -> None:
    """A rank has a part of each parameter; a group may be spread over several vectors."""
    optimizer = engine.optimizer
    rank, size = dist.get_rank(group=optimizer.dp_process_group), dist.get_world_size(group=optimizer.dp_process_group)
    optimizer.checkpoint_event_prologue()
    content = optimizer.state_dict()  # with all that DeepSpeed wants to find in its own files
    state, vectors = {}, []
    numbers = [number for group in content["optimizer_state_dict"]["param_groups"] for number in group["params"]]
    for number, group in zip(numbers, optimizer.fp16_groups, strict=True):
        names = _names(engine, group)
        shares = {name: parameter.partition_numel() for name, parameter in zip(names, group, strict=True)}

        def cut(find: Callable[[str], Tensor | None], shares: dict[str, int] = shares) -> Tensor:
            parts = []
            for name, share in shares.items():
                tensor, padded = find(name), torch.zeros(share * size)
                if tensor is not None:
                    padded[: tensor.numel()] = tensor.flatten().float()
                parts.append(padded[rank * share : (rank + 1) * share])
            return torch.cat(parts)

        vectors.append(cut(weights.__getitem__))
        state[number] = _entry(cut, names, named["state"])
    content["fp32_flat_groups"] = vectors
    content["optimizer_state_dict"] = _inner(state, content["optimizer_state_dict"]["param_groups"], named)
    optimizer.load_state_dict({rank: content})
    optimizer.checkpoint_event_epilogue()


def _names(engine: Any, group: Sequence[nn.Parameter]) -> list[str]:
    return [engine.param_names[parameter] for parameter in group]


def _entry(cut: Cut, names: Sequence[str], saved: State) -> dict[str, Any]:
    """The optimizer's state of one flat vector; empty if none of its parameters has had a step."""
    found = [saved[name] for name in names if saved.get(name)]
    entry: dict[str, Any] = {}
    for kind in {kind for state in found for kind in state}:
        values = [state[kind] for state in found if kind in state]
        if isinstance(values[0], Tensor) and values[0].dim():
            tensors = {name: saved[name][kind] for name in names if kind in saved.get(name, {})}
            entry[kind] = cut(tensors.get)
            continue
        if len({float(value) for value in values}) > 1:
            raise CheckpointError(
                f"the parameters {names[0]} to {names[-1]} are one group under DeepSpeed, which keeps one {kind!r} for all of "
                f"them; in the checkpoint they differ, {min(map(float, values))} to {max(map(float, values))}. Put "
                "parameters that are trained for different times into groups of their own"
            )
        entry[kind] = values[0].clone() if isinstance(values[0], Tensor) else values[0]
    return entry


def _inner(
    state: dict[int, dict[str, Any]], groups: Sequence[Mapping[str, Any]], named: Mapping[str, Any]
) -> dict[str, Any]:
    """A state dict of the optimizer within ZeRO: settings of the checkpoint, vectors in place of parameters."""
    return {
        "state": {number: entry for number, entry in state.items() if entry},
        "param_groups": [
            {**saved, "params": own["params"]} for saved, own in zip(named["param_groups"], groups, strict=True)
        ],
    }
