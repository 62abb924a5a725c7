"""The errors that a user of this package can meet. Each message names the value, what was expected, and the way out."""


class SLoPeError(Exception):
    """Base of every error of this package."""


class ConfigError(SLoPeError, ValueError):
    """A setting is out of range or contradicts another one."""


class ConversionError(SLoPeError, ValueError):
    """A model cannot be made sparse (or dense again) as asked."""


class InputError(SLoPeError, ValueError, RuntimeError):
    """A tensor that is given to a layer or an operation has the wrong shape, dtype or device, or is none."""


class CheckpointError(SLoPeError, RuntimeError):
    """A checkpoint does not belong to the model that reads it, or is damaged."""


class BackendUnavailableError(SLoPeError, RuntimeError):
    """A backend that was asked for by name cannot run here."""


class ScheduleError(SLoPeError, RuntimeError):
    """The training run does not allow the schedule: unknown length, or weights outside the optimizer."""


class NonFiniteError(SLoPeError, ArithmeticError):
    """A loss or a gradient is nan or infinite: training cannot go on from it."""
