"""The method inside Lightning: callback, module and strategies."""

from slope_pl.lightning.callback import SLoPeCallback
from slope_pl.lightning.checkpoint_io import LocalCheckpointIO
from slope_pl.lightning.distillation import Distillation, frozen_copy, load_teacher
from slope_pl.lightning.fade import CheckFadedMasks, FadeCallback, check_faded_masks, faded_masks, sparsify_faded
from slope_pl.lightning.module import SLoPeLightningModule
from slope_pl.lightning.nonfinite import NonFiniteLoss
from slope_pl.lightning.resume import last_good_checkpoint
from slope_pl.lightning.step_checkpoint import StepCheckpoint
from slope_pl.lightning.stopping import StopOnSignal
from slope_pl.lightning.strategies import (
    SLoPeDDPStrategy,
    SLoPeDeepSpeedStrategy,
    SLoPeModelParallelStrategy,
    SLoPeSingleDeviceStrategy,
    SLoPeStrategy,
)

__all__ = [
    "CheckFadedMasks",
    "Distillation",
    "FadeCallback",
    "LocalCheckpointIO",
    "NonFiniteLoss",
    "SLoPeCallback",
    "SLoPeDDPStrategy",
    "SLoPeDeepSpeedStrategy",
    "SLoPeLightningModule",
    "SLoPeModelParallelStrategy",
    "SLoPeSingleDeviceStrategy",
    "SLoPeStrategy",
    "StepCheckpoint",
    "StopOnSignal",
    "check_faded_masks",
    "faded_masks",
    "frozen_copy",
    "last_good_checkpoint",
    "load_teacher",
    "sparsify_faded",
]
