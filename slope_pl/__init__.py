"""Train transformers with 2:4 sparse weights from the first step to the last: SLoPe for PyTorch Lightning.

The method: Mozaffari, Yazdanbakhsh, Zhang, Mehri Dehnavi, "SLoPe: Double-Pruned Sparse Plus Lazy Low-Rank Adapter
Pretraining of LLMs", ICLR 2025, arXiv 2405.16325. Importing registers the strategies ``slope``, ``slope_ddp``,
``slope_fsdp2`` and ``slope_deepspeed_stage_1`` to ``_3``.
"""

__version__ = "0.1.0"

from slope_pl.config import SLoPeConfig
from slope_pl.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    ConversionError,
    InputError,
    NonFiniteError,
    ScheduleError,
    SLoPeError,
)
from slope_pl.lightning import (
    CheckFadedMasks,
    Distillation,
    FadeCallback,
    SLoPeCallback,
    SLoPeDDPStrategy,
    SLoPeDeepSpeedStrategy,
    SLoPeLightningModule,
    SLoPeModelParallelStrategy,
    SLoPeSingleDeviceStrategy,
    SLoPeStrategy,
    sparsify_faded,
)
from slope_pl.nn import (
    SparseLinear,
    SparsityReport,
    activation_norms,
    dense_state_dict,
    densify,
    sparse_layers,
    sparsify,
    sparsity_report,
    wake_adapters,
)

__all__ = [
    "BackendUnavailableError",
    "CheckFadedMasks",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "Distillation",
    "FadeCallback",
    "InputError",
    "NonFiniteError",
    "SLoPeCallback",
    "SLoPeConfig",
    "SLoPeDDPStrategy",
    "SLoPeDeepSpeedStrategy",
    "SLoPeError",
    "SLoPeLightningModule",
    "SLoPeModelParallelStrategy",
    "SLoPeSingleDeviceStrategy",
    "SLoPeStrategy",
    "ScheduleError",
    "SparseLinear",
    "SparsityReport",
    "activation_norms",
    "dense_state_dict",
    "densify",
    "sparse_layers",
    "sparsify",
    "sparsify_faded",
    "sparsity_report",
    "wake_adapters",
]
