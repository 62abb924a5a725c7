"""Loaders that can be stopped after any batch, and what the data modules share of making them."""

import os
from collections.abc import Iterator
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from slope_pl.data.signals import outlive_signals

Batch = dict[str, Tensor]
T = TypeVar("T")


def check_integer(name: str, value: Any, least: int, hint: str = "") -> None:
    """Raise TypeError or ValueError unless an argument is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if value < least:
        raise ValueError(f"{name} is {value}, expected {least} or more{hint}")


def check_place(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless an argument names a place: a path, or an id on the hub."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} is {value!r}, expected a string: a path, or an id on the hub")
    if not os.fspath(value):
        raise ValueError(f"{name} is '', expected a path, or an id on the hub")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless an argument is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected True or False")


def as_is(batch: Batch) -> Batch:
    """A collate function for data sets that hand out whole batches."""
    return batch


class EpochSampler(DistributedSampler[int]):
    """Shuffled indices of one rank, a function of ``(seed, epoch)`` and the number of ranks.

    Unlike its base class, which seeds with ``seed + epoch``, seed 0's second epoch is not seed 1's first. Ranks get the
    same number of indices; the first few are repeated where needed. Lightning leaves a `DistributedSampler` as it is
    and calls ``set_epoch``.
    """

    def __iter__(self) -> Iterator[int]:
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]) >> 1)
        order = torch.randperm(len(self.dataset), generator=generator).numpy()  # type: ignore[arg-type]
        return iter(np.resize(order, self.total_size)[self.rank :: self.num_replicas].tolist())


class ResumableDataLoader(DataLoader[Batch]):
    """A data loader that can be saved after any batch and goes on with the next one.

    The state is the epoch of the sampler and the number of batches handed out (not those that workers have prepared).
    After `load_state_dict` the next pass over that epoch leaves out as many batches; other epochs are complete. The
    batches left out are made and thrown away, which takes well under a millisecond each here. ``len()`` is always that
    of the whole epoch, as Lightning expects.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Of its own: otherwise each pass draws the workers' seed from the numbers that dropout goes on with.
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(*args, **kwargs)
        self._epoch = self._batches = 0
        self._resume: dict[str, int] | None = None

    def _layout(self) -> dict[str, int]:
        """What must not change for a position within an epoch to mean the same batches."""
        sampler = self.sampler
        names = {"seed": "seed", "num_replicas": "ranks"}
        found = {name: int(getattr(sampler, key)) for key, name in names.items() if hasattr(sampler, key)}
        return {"windows": len(self.dataset), "batch_size": self.batch_size or 0, **found}  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, int]:
        """Return the position: epoch, batches handed out, and the layout they belong to."""
        return self._resume or {"epoch": self._epoch, "batches": self._batches, **self._layout()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a position, the next time its epoch is iterated."""
        self._resume = dict(state_dict)

    def _skip(self, epoch: int) -> int:
        """How many batches of this epoch were handed out before the checkpoint.

        Ranks take turns in one order. So with more ranks and batches smaller in proportion, all ranks together have had the
        same items.

        Raises:
            ValueError: The data, the seed, or the items of a batch of all ranks changed in the middle of an epoch.
        """
        state, self._resume = self._resume, None
        if state is None or state["epoch"] != epoch or state["batches"] == 0:
            return 0
        layout = self._layout()
        changed = [f"{key} was {state[key]} and is {own}" for key, own in layout.items() if state.get(key, own) != own]
        before, now = ({key: own for key, own in part.items() if key in layout} for part in (state, layout))
        if changed and "ranks" in before and _all_ranks(before) == _all_ranks(now):
            return state["batches"]
        if changed:
            raise ValueError(
                f"the checkpoint lies in the middle of epoch {epoch}, after batch {state['batches']}, but "
                f"{', '.join(changed)}. Resume with the old values, or from a checkpoint at the end of an epoch."
            )
        return state["batches"]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator on purpose: Lightning calls iter() before it tells the sampler the epoch, and sometimes again
        # after. Nothing below runs until the first batch is asked for, by which time the epoch is known.
        epoch = int(getattr(self.sampler, "epoch", 0))
        skip = self._skip(epoch)
        self._epoch, self._batches = epoch, skip
        for i, batch in enumerate(super().__iter__()):
            if i >= skip:
                self._batches = i + 1
                yield batch


def _all_ranks(layout: dict[str, int]) -> dict[str, int]:
    """A layout with the batch of all ranks together in place of the batch size and the number of ranks."""
    rest = {key: value for key, value in layout.items() if key not in ("batch_size", "ranks")}
    return rest | {"items": layout["batch_size"] * layout["ranks"]}


class LoaderModule(pl.LightningDataModule):
    """A data module with ``num_workers``, whose attributes are there after ``setup``."""

    num_workers: int

    def _ready(self, value: Any, name: str) -> Any:
        if value is None:
            raise RuntimeError(f"{name} is not there yet: call prepare_data() and setup() first")
        return value

    @property
    def _ranks(self) -> dict[str, Any]:
        """``num_replicas`` and ``rank`` of this process."""
        return (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"num_replicas": 1, "rank": 0}

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "collate_fn": as_is,
            "pin_memory": torch.cuda.is_available(),
            # Otherwise each pass draws a seed from the global generator, and a resumed run, which makes one pass more,
            # would see other dropout masks.
            "generator": torch.Generator(),
            "worker_init_fn": outlive_signals,  # and not Lightning's, which seeds: nothing in a worker is drawn
        }

    def _equal_parts(self, dataset: Dataset[Batch], batch_size: int) -> DataLoader[Batch]:
        """The items in order, dealt out to the ranks, the first few twice where needed.

        For ``predict``: Lightning deals them out once each, and a rank that has one batch less waits for the others under
        FSDP2 and ZeRO-3, who wait for its part of the weights.
        """
        sampler: DistributedSampler[int] = DistributedSampler(dataset, **self._ranks, shuffle=False)
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, **self._loader_options())


def subset(examples: list[T], most: int | None, seed: int) -> list[T]:
    """At most so many of the examples, chosen by the seed, in their order; None for all."""
    if most is None or most >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).permutation(len(examples))[:most]
    return [examples[i] for i in np.sort(chosen)]
