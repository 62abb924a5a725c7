"""Which implementation multiplies: a registry with explicit selection and a reason for every refusal."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from slope_pl.errors import BackendUnavailableError

BackendName = Literal["auto", "reference", "cusparselt"]
BACKEND_NAMES: tuple[str, ...] = get_args(BackendName)


@dataclass(frozen=True)
class Backend:
    """One implementation of the sparse products.

    Shapes: W is ``(d_out, d_in)`` 2:4 along ``d_in``; ``x`` ``(..., d_in)``; ``dy`` ``(..., d_out)``. What an operand looks
    like is the backend's own affair; nobody else reads it.

    Attributes:
        name: as in :data:`BACKEND_NAMES`.
        why_not: given a device type, the reason it cannot run there, or None.
        forward: ``(x, forward_operand, indices, bias) -> x W^T + b``.
        dgrad: ``(dy, backward_operand, backward_indices) -> dy W_RC``.
        wgrad: ``(dy, x, indices, dtype) -> (dy^T x)[kept]``, ``(d_out, d_in / 2)``.
        make_forward_operand: ``(values, indices, dtype) -> operand``, never aliasing its input.
        make_backward_operand: ``(values, indices, backward_indices, dtype) -> operand``.
        forward_operand_is_values: the forward operand is the kept values themselves whenever the dtypes agree, so that
            no copy of them is needed.
    """

    name: str
    why_not: Callable[[str], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    dgrad: Callable[[Tensor, Tensor, Tensor], Tensor]
    wgrad: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    make_forward_operand: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    make_backward_operand: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    forward_operand_is_values: bool


_REGISTRY: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Make a backend known; the fastest is registered last and ``auto`` tries it first."""
    _REGISTRY[backend.name] = backend


def get_backend(name: str) -> Backend:
    """The registered backend of that name.

    Raises:
        BackendUnavailableError: if there is none; ``"auto"`` is not one, resolve it first.
    """
    backend = _REGISTRY.get(name)
    if backend is None:
        raise BackendUnavailableError(f"no backend {name!r} is registered; there are {', '.join(_REGISTRY)}")
    return backend


def why_not(name: str, device_type: str) -> str | None:
    """Why a backend cannot run on a device type (``"cpu"``, ``"cuda"``), or None if it can."""
    if name not in _REGISTRY:
        return f"the compiled extension of backend {name!r} is not part of this installation"
    return _REGISTRY[name].why_not(device_type)


def resolve_backend(requested: str, device_type: str) -> str:
    """Name of the backend that runs.

    Args:
        requested: one of :data:`BACKEND_NAMES`. ``"auto"`` takes the fastest that can run.
        device_type: ``"cpu"``, ``"cuda"``, ...

    Raises:
        BackendUnavailableError: if a backend asked for by name cannot run; it is never replaced in silence.
    """
    if requested == "auto":
        for name in reversed(_REGISTRY):
            if _REGISTRY[name].why_not(device_type) is None:
                return name
    reason = why_not(requested, device_type)
    if reason is not None:
        raise BackendUnavailableError(
            f"backend={requested!r} cannot run on {device_type!r}: {reason}. Use backend='auto' or 'reference'."
        )
    return requested


def slow_backend_note(requested: str, device_type: str) -> str | None:
    """One line for a user who expects speed from ``"auto"`` on a GPU and does not get it; None where there is none to get."""
    if device_type != "cuda" or requested != "auto" or resolve_backend(requested, device_type) != "reference":
        return None
    reasons = "; ".join(
        f"{name}: {why_not(name, device_type)}" for name in BACKEND_NAMES if name not in ("auto", "reference")
    )
    return f"products run on the reference backend, which is exact but slower than dense ({reasons})"
