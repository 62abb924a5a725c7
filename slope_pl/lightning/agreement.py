"""What one rank has seen and all must act on, in the same step, without waiting for each other."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slope_pl.lightning.ending import end_groups_at_exit


class Agreement:
    """The largest of a small integer over all ranks.

    Ranks talk over a group of their own on the CPU (gloo): nothing waits for a device, and the order of the run's own
    collectives is left alone. :meth:`exchange` does not wait for the network either, for it returns what was given one call
    earlier. Every rank makes the same calls.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._pending: tuple[Any, Tensor] | None = None

    def begin(self) -> None:
        """Once the processes have found each other; every rank."""
        self._pending = None
        end_groups_at_exit()
        if self._group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def exchange(self, own: int) -> int:
        """Give this rank's number; returns the largest of those given at the call before, 0 at the first.

        One process has nobody to wait for: its own number comes back at once.
        """
        if self._group is None:
            return own
        before = self._arrived()
        value = torch.tensor(own)
        self._pending = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True), value
        return before

    def settle(self, own: int) -> int:
        """The largest number of now and of the call before; waits for all ranks."""
        if self._group is None:
            return own
        value = torch.tensor(max(own, self._arrived()))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return int(value)

    def gather(self, own: Any) -> list[Any]:
        """An object of each rank, in their order; waits for all ranks."""
        if self._group is None:
            return [own]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own, group=self._group)
        return everyone

    def end(self) -> None:
        """Let go of the group. Not after an error: the others may be gone, and would be waited for."""
        if self._group is not None and dist.is_initialized():
            self._arrived()
            dist.destroy_process_group(self._group)
        self.drop()

    def drop(self) -> None:
        """Forget the group, without a word to the others."""
        self._group = self._pending = None

    def _arrived(self) -> int:
        if self._pending is None:
            return 0
        work, value = self._pending
        self._pending = None
        work.wait()
        return int(value)
