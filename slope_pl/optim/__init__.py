"""Optimizers that torch lacks."""

from slope_pl.optim.lamb import Lamb

__all__ = ["Lamb"]
