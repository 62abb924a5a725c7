"""When derived operands are out of date.

Operands follow ``values``. Torch counts in-place writes (``Tensor._version``), but a write through ``.data``, as averaging
callbacks and some optimizers make, is not counted. So two process-wide numbers are kept as well: every optimizer step moves
the one of the weights, whichever optimizer it is, and :func:`invalidate_operands` moves both, for whoever writes weights or
masks by other means.
"""

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_weights = 0
_everything = 0


def weights_generation() -> int:
    """Number of the current generation of weights in this process."""
    return _weights


def masks_generation() -> int:
    """Likewise of masks: what an operand's metadata depends on."""
    return _everything


def invalidate_operands() -> None:
    """Make every sparse layer of this process rebuild its operands, metadata included, at its next forward."""
    global _weights, _everything
    _weights += 1
    _everything += 1


def _after_step(*_: Any) -> None:
    global _weights
    _weights += 1


register_optimizer_step_post_hook(_after_step)
