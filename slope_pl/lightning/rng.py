"""The random state of every rank in a checkpoint, so that dropout goes on where it was.

Lightning saves the position in the data, the optimizer and the schedules, but not the generators; without them a resumed
run draws other dropout masks and is a different run.

What lies between two training batches draws numbers too: validation, and the iterator of a data loader, whose shuffling at the
beginning of an epoch depends on them. A checkpoint may be written before or after that. So validation leaves the generators as
it found them, and a resumed run sets them before its loader is made, and again at its first batch if that is within an epoch.
"""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from slope_pl.checkpoint.mark import RNG_KEY
from slope_pl.errors import CheckpointError
from slope_pl.lightning.resume import make_loader_anew

State = dict[str, torch.Tensor]
States = list[State]


class RandomState:
    """The generators of this rank over a fit: continued from a checkpoint, and kept apart from validation."""

    def __init__(self) -> None:
        self._saved: States | None = None
        self._after_batch: State | None = None
        self._at_start: State | None = None

    def load(self, states: States | None) -> None:
        """What a checkpoint holds; None if it holds nothing.

        Raises:
            CheckpointError: if it is nothing that :func:`collect` gives.
        """
        if states is not None:
            _check(states)
        self._saved = states

    def begin(self, trainer: pl.Trainer, device: torch.device) -> None:
        """Before the training loop makes its loader's iterator; once restored and, for strategies that restore late, again.

        If it was made earlier, for a schedule that asked how many steps there are, it is made anew.
        """
        make_loader_anew(trainer)
        self._after_batch = None
        if self._saved is not None:
            restore(self._saved, trainer.global_rank, trainer.world_size, device)

    def start(self, device: torch.device) -> None:
        """At the start of training, where the first epoch's iterator has been made and no batch of it."""
        self._at_start = _own(device)

    def before_batch(self, trainer: pl.Trainer, device: torch.device, batch_idx: int) -> str | None:
        """Before each training batch; returns why the first one's numbers are not those of the uninterrupted run, or None."""
        if self._saved is None:
            return None
        states, self._saved = self._saved, None
        if batch_idx == 0 and len(states) == trainer.world_size and self._at_start is not None:
            # The checkpoint is of the end of an epoch, begin() has set its state. If that is where the loader left it, it draws
            # nothing; what has drawn since is a validation that was due. A loader that shuffles with these generators goes on
            # from what it drew, which that validation may have moved.
            own = states[trainer.global_rank]
            if own.keys() == self._at_start.keys() and all(torch.equal(own[k], self._at_start[k]) for k in own):
                _set(own, device)
            return mismatch(own, device)
        return restore(states, trainer.global_rank, trainer.world_size, device)

    def after_batch(self, device: torch.device) -> None:
        """At the end of each training batch."""
        self._after_batch = _own(device)

    def after_validation(self, device: torch.device) -> None:
        """At the end of a validation within a fit: as if it had not been."""
        if self._after_batch is not None:
            _set(self._after_batch, device)


class KeepRandomState(pl.Callback):
    """Lets random numbers of a dense run go on from a checkpoint, as ``SLoPeCallback`` does for a sparse one."""

    def __init__(self) -> None:
        self._random = RandomState()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restored, and before the data loader draws."""
        self._random.begin(trainer, pl_module.device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The loader has drawn."""
        self._random.start(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Say so if the numbers could not be restored."""
        problem = self._random.before_batch(trainer, pl_module.device, batch_idx)
        if problem is not None:
            pl_module.print(f"{problem}; random numbers (dropout) differ from the uninterrupted run's.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Before a validation."""
        self._random.after_batch(pl_module.device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As if it had not been."""
        self._random.after_validation(pl_module.device)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The states of all ranks."""
        checkpoint[RNG_KEY] = collect(pl_module.device)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep them for the start; now too, for strategies that restore after ``on_fit_start``."""
        self._random.load(checkpoint.get(RNG_KEY))
        self._random.begin(trainer, pl_module.device)


def keeps_random_state(callbacks: Iterable[pl.Callback]) -> bool:
    """Whether one of these callbacks does already."""
    return any(isinstance(getattr(callback, "_random", None), RandomState) for callback in callbacks)


def collect(device: torch.device) -> States:
    """The states of torch's generators, one entry a rank; every rank must call this.

    Args:
        device: of this rank's model; a CUDA device's generator is saved as well.
    """
    own = _own(device)
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
    problem = mismatch(states[rank], device)
    if problem is None:
        _set(states[rank], device)
    return problem


def _check(states: Any) -> None:
    size = torch.get_rng_state().shape
    good = isinstance(states, list) and all(
        isinstance(own, dict)
        and isinstance(own.get("cpu"), torch.Tensor)
        and all(isinstance(state, torch.Tensor) and state.dtype is torch.uint8 for state in own.values())
        and own["cpu"].shape == size
        for own in states
    )
    if not good:
        raise CheckpointError(
            "the checkpoint's random state is damaged: one mapping of generators to bytes is expected for each rank"
        )


def mismatch(state: State, device: torch.device) -> str | None:
    """Why a state cannot be set on a device, or None."""
    if ("cuda" in state) != (device.type == "cuda"):
        return f"the checkpoint's random state is of another kind of device than {device.type!r}"
    return None


def _own(device: torch.device) -> State:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set(state: State, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
