"""When derived operands are out of date.

Operands follow ``values``. Torch counts in-place writes (``Tensor._version``), but a write through ``.data``, as averaging
callbacks and some optimizers make, is not counted. So two process-wide numbers are kept as well: every optimizer step moves
the one of the weights, whichever optimizer it is, and :func:`invalidate_operands` moves both, for whoever writes weights or
masks by other means.
"""

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

weights = 0
"""Generation of the weights of this process; read as an attribute of this module at every forward, so no function."""
masks = 0
"""Likewise of the masks: what an operand's metadata depends on."""


def invalidate_operands() -> None:
    """Make every sparse layer of this process rebuild its operands, metadata included, at its next forward."""
    global weights, masks
    weights += 1
    masks += 1


def _after_step(*_: Any) -> None:
    global weights
    weights += 1


register_optimizer_step_post_hook(_after_step)
