"""Checkpoints: every kind is read as one and without running code, and turned into the others."""

from slope_pl.checkpoint.convert import (
    as_full_file,
    checkpoint_kind,
    convert,
    is_checkpoint,
    load_module,
    read_checkpoint,
    saved_settings,
)
from slope_pl.checkpoint.mark import CHECKPOINT_KEY, FORMAT_VERSION, OPTIMIZERS_KEY, check_format
from slope_pl.checkpoint.weights import load_weights, save_weights, weights_config

__all__ = [
    "CHECKPOINT_KEY",
    "FORMAT_VERSION",
    "OPTIMIZERS_KEY",
    "as_full_file",
    "check_format",
    "checkpoint_kind",
    "convert",
    "is_checkpoint",
    "load_module",
    "load_weights",
    "read_checkpoint",
    "save_weights",
    "saved_settings",
    "weights_config",
]
