"""Which implementation multiplies: a registry with explicit selection and a reason for every refusal."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from slope_pl.errors import BackendUnavailableError

if TYPE_CHECKING:
    from slope_pl.ops.operands import Change, Pair

BackendName = Literal["auto", "reference", "cusparselt"]
BACKEND_NAMES: tuple[str, ...] = get_args(BackendName)


class Place(NamedTuple):
    """Where a product is to run; None stands for what is not known yet.

    Attributes:
        device_type: ``"cpu"``, ``"cuda"``, ...
        dtype: of the input, after autocast.
        d_out: rows of W.
        d_in: columns of W.
    """

    device_type: str
    dtype: torch.dtype | None = None
    d_out: int | None = None
    d_in: int | None = None


@dataclass(frozen=True)
class Backend:
    """One implementation of the sparse products.

    Shapes: W is ``(d_out, d_in)`` 2:4 along ``d_in``; ``x`` ``(..., d_in)``; ``dy`` ``(..., d_out)``. What an operand looks
    like is the backend's own affair; nobody else reads it.

    Attributes:
        name: as in :data:`BACKEND_NAMES`.
        why_not: the reason it cannot run at a place, or None.
        refresh: ``(pair, values, indices, backward_indices, bias, change)`` brings a :class:`~slope_pl.ops.operands.Pair`
            up to date, in place where it holds buffers of its own.
        forward: ``(x, forward_operand, indices, bias) -> x W^T + b``.
        dgrad: ``(dy, backward_operand, backward_indices) -> dy W_RC``.
        wgrad: ``(dy, x, indices, dtype) -> (dy^T x)[kept]``, ``(d_out, d_in / 2)``.
        choose_columns: ``(values, indices, previous) -> (backward_indices, churn)``: the re-setup; the churn is the share
            of the previous backward mask that was replaced, a float32 scalar.
        fuses_gelu: whether the two products around a GELU can take it along at a place.
        forward_gelu: ``(x, forward_operand, indices, bias, approximate, keep) -> (gelu(pre), pre)`` with
            ``pre = x W^T + b``, which is empty unless it is to be kept.
        dgrad_gelu: ``(dy, backward_operand, backward_indices, pre, approximate) -> (dy W_RC) gelu'(pre)``.
        own_values: ``(values, indices) -> (values, forward_operand) | None``: where a weight of this dtype can live inside
            its own operand, the values in their new place; None where it cannot.
    """

    name: str
    why_not: Callable[[Place], str | None]
    refresh: Callable[["Pair", Tensor, Tensor, Tensor, Tensor | None, "Change"], None]
    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    dgrad: Callable[[Tensor, Tensor, Tensor], Tensor]
    wgrad: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    choose_columns: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    fuses_gelu: Callable[[Place], bool]
    forward_gelu: Callable[[Tensor, Tensor, Tensor, Tensor | None, str, bool], tuple[Tensor, Tensor]]
    dgrad_gelu: Callable[[Tensor, Tensor, Tensor, Tensor, str], Tensor]
    own_values: Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]


_REGISTRY: dict[str, Backend] = {}
_RESOLVED: dict[tuple[str, str, torch.dtype | None, int | None, int | None], str] = {}


def register_backend(backend: Backend) -> None:
    """Make a backend known; the fastest is registered last and ``auto`` tries it first."""
    _REGISTRY[backend.name] = backend
    _RESOLVED.clear()


def get_backend(name: str) -> Backend:
    """The registered backend of that name.

    Raises:
        BackendUnavailableError: if there is none; ``"auto"`` is not one, resolve it first.
    """
    backend = _REGISTRY.get(name)
    if backend is None:
        hint = "; resolve_backend() says which one it is at a place" if name == "auto" else ""
        raise BackendUnavailableError(f"no backend {name!r} is registered; there are {', '.join(_REGISTRY)}{hint}")
    return backend


def why_not(name: str, place: Place) -> str | None:
    """Why a backend cannot run at a place, or None if it can."""
    return get_backend(name).why_not(place)


@torch.compiler.assume_constant_result
def resolve_backend(
    requested: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    d_out: int | None = None,
    d_in: int | None = None,
) -> str:
    """Name of the backend that runs.

    Args:
        requested: one of :data:`BACKEND_NAMES`. ``"auto"`` takes the fastest that can run.
        device_type: ``"cpu"``, ``"cuda"``, ...
        dtype: of the input, after autocast; None if not known yet.
        d_out: rows of the weight, likewise.
        d_in: columns of the weight, likewise.

    Raises:
        BackendUnavailableError: if a backend asked for by name cannot run; it is never replaced in silence.
    """
    key = (requested, device_type, dtype, d_out, d_in)
    name = _RESOLVED.get(key)
    if name is None:
        name = _RESOLVED[key] = _resolve(requested, Place(device_type, dtype, d_out, d_in))
    return name


@torch.compiler.assume_constant_result
def fuses_gelu(backend: str, device_type: str, dtype: torch.dtype, d_out: int, d_in: int) -> bool:
    """Whether a backend takes a GELU along with the products before and after it.

    Args:
        backend: a resolved name.
        device_type: ``"cpu"``, ``"cuda"``, ...
        dtype: of the input, after autocast.
        d_out: rows of the weight before the activation.
        d_in: its columns.
    """
    return get_backend(backend).fuses_gelu(Place(device_type, dtype, d_out, d_in))


def _resolve(requested: str, place: Place) -> str:
    if requested == "auto":
        return next(name for name in reversed(_REGISTRY) if _REGISTRY[name].why_not(place) is None)
    reason = why_not(requested, place)
    if reason is not None:
        raise BackendUnavailableError(
            f"backend={requested!r} cannot run on {place.device_type!r}: {reason}. Use backend='auto' or 'reference'."
        )
    return requested


def reasons_against(place: Place) -> str:
    """Why the backends faster than the reference do not run at a place, for a message; empty where one does."""
    reasons: list[str] = []
    for name in reversed(_REGISTRY):
        reason = _REGISTRY[name].why_not(place)
        if reason is None:
            return "" if name != "reference" else "; ".join(reasons)
        reasons.append(f"{name}: {reason}")
    return "; ".join(reasons)
