"""Keeping weight averaging away from the masks.

``WeightAveraging`` and ``EMAWeightAveraging`` average buffers by default, integers too, and an averaged index byte is no
index: at a decay of 0.9, 0.9 * 72 + 0.1 * 72 is cut to 71. The averaged model shares the live model's masks, so they
are copied over before anything reads them.
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from slope_pl.errors import ConversionError
from slope_pl.nn import sparse_layers


def refuse_early_copies(trainer: pl.Trainer) -> None:
    """Raise where a callback would copy the model before it is complete and sparse."""
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConversionError(
            "StochasticWeightAveraging copies the model before a module with a setup() of its own has built its layers, so "
            "its average would be dense. Build the layers in __init__ or configure_model, or use WeightAveraging."
        )


def refuse_dense_copies(trainer: pl.Trainer) -> None:
    """Raise if a callback that stands before ours has copied the model while it was dense."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        copied = getattr(callback, "_average_model", None)
        averages = isinstance(callback, StochasticWeightAveraging | WeightAveraging)
        if averages and copied is not None and not sparse_layers(copied):
            raise ConversionError(
                f"{type(callback).__name__} copied the model before SLoPeCallback made it sparse: put SLoPeCallback before "
                "it in the Trainer's callbacks"
            )


@torch.no_grad()
def share_masks_with_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Give every averaged model that a callback of this trainer keeps the index buffers and phase of the live one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, WeightAveraging) or callback._average_model is None:
            continue
        live = sparse_layers(pl_module)
        for name, layer in sparse_layers(callback._average_model.module).items():
            for buffer, current in zip(layer.buffers(), live[name].buffers(), strict=True):
                buffer.copy_(current)
