"""The methods that SLoPe is compared with, as callbacks of the same shape: Extended SR-STE and FST.

Both are **simulations on dense tensor cores**: weights, gradients and optimizer state are dense, a mask is multiplied in.
They show what the methods do to the loss; no speed-up and no saved memory is claimed, and none is to be read off them.
"""

from slope_pl.baselines.config import BACKWARD_PRUNINGS, BackwardPruning, FSTConfig, SRSTEConfig
from slope_pl.baselines.fst import FSTCallback
from slope_pl.baselines.layers import MaskedLinear
from slope_pl.baselines.mvue import mvue_two_of_four
from slope_pl.baselines.srste import SRSTECallback
from slope_pl.baselines.surgery import choose_feed_forward, mask_layers, masked_layers, unmask_layers

__all__ = [
    "BACKWARD_PRUNINGS",
    "BackwardPruning",
    "FSTCallback",
    "FSTConfig",
    "MaskedLinear",
    "SRSTECallback",
    "SRSTEConfig",
    "choose_feed_forward",
    "mask_layers",
    "masked_layers",
    "mvue_two_of_four",
    "unmask_layers",
]
