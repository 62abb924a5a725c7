"""The method inside Lightning: callback, module and strategies."""

from slope_pl.lightning.callback import SLoPeCallback
from slope_pl.lightning.checkpoint_io import LocalCheckpointIO
from slope_pl.lightning.module import SLoPeLightningModule
from slope_pl.lightning.strategies import (
    SLoPeDDPStrategy,
    SLoPeDeepSpeedStrategy,
    SLoPeModelParallelStrategy,
    SLoPeSingleDeviceStrategy,
    SLoPeStrategy,
)

__all__ = [
    "LocalCheckpointIO",
    "SLoPeCallback",
    "SLoPeDDPStrategy",
    "SLoPeDeepSpeedStrategy",
    "SLoPeLightningModule",
    "SLoPeModelParallelStrategy",
    "SLoPeSingleDeviceStrategy",
    "SLoPeStrategy",
]
