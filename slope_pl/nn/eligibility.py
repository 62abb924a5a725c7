"""Which dense weights can be 2:4 sparse at all."""

import torch
from torch import Tensor

STORABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def why_ineligible(weight: Tensor) -> str | None:
    """Why a dense weight ``(d_out, d_in)`` cannot be 2:4 sparse, or None if it can."""
    if weight.dim() != 2:
        return f"it has {weight.dim()} dimensions, 2 are expected"
    if weight.numel() == 0:
        return "it is empty (partitioned by ZeRO-3?): convert before it is sharded"
    if weight.device.type == "meta":
        return "it is on the meta device and has no values to choose a mask from: materialise it first"
    if weight.dtype not in STORABLE_DTYPES:
        return f"its dtype is none of {', '.join(str(dtype).removeprefix('torch.') for dtype in STORABLE_DTYPES)}"
    d_out, d_in = weight.shape
    if d_out % 8 or d_in % 8:
        return f"{d_out}x{d_in}: both sides must be multiples of 8"
    return None
