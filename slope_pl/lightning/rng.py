"""The random state of every rank in a checkpoint, so that dropout goes on where it was.

Lightning saves the position in the data, the optimizer and the schedules, but not the generators; without them a resumed
run draws other dropout masks and is a different run.
"""

from typing import Any

import torch
import torch.distributed as dist

States = list[dict[str, torch.Tensor]]


def collect(device: torch.device) -> States:
    """The states of torch's generators, one entry a rank; every rank must call this.

    Args:
        device: of this rank's model; a CUDA device's generator is saved as well.
    """
    own = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, own)
    return states


def restore(states: States, rank: int, world_size: int, device: torch.device) -> str | None:
    """Set this rank's generators.

    Returns:
        None, or why they could not be set: the number of ranks or the kind of device changed.
    """
    if len(states) != world_size:
        return f"the checkpoint has the random state of {len(states)} ranks, this run has {world_size}"
    own = states[rank]
    if ("cuda" in own) != (device.type == "cuda"):
        return f"the checkpoint's random state is of another kind of device than {device.type!r}"
    torch.set_rng_state(own["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"].cpu(), device)
    return None
