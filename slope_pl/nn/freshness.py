"""When derived operands are out of date.

Operands follow ``values``. Torch counts in-place writes (``Tensor._version``), but a write through ``.data``, as averaging
callbacks and some optimizers make, is not counted. So a process-wide generation is kept as well: every optimizer step moves
it, whichever optimizer it is, and :func:`invalidate_operands` is there for whoever writes weights by other means.
"""

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_generation = 0


def generation() -> int:
    """Number of the current generation of weights in this process."""
    return _generation


def invalidate_operands() -> None:
    """Make every sparse layer of this process rebuild its operands at its next forward."""
    global _generation
    _generation += 1


def _after_step(*_: Any) -> None:
    invalidate_operands()


register_optimizer_step_post_hook(_after_step)
