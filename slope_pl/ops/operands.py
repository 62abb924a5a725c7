"""Operands: what a backend multiplies, derived from the values and kept between products.

A product asks for the operands of its weight; they are made anew only where the values, the masks, the bias or the dtype
changed since, that is once an optimizer step. Buffers stay where they are, so that a CUDA graph may hold their addresses.
"""

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from slope_pl.ops import freshness
from slope_pl.ops.backends import get_backend

Stamp = tuple[int, int]


class Pair:
    """The operands of one weight in one dtype, for one backend.

    Attributes:
        dtype: of the products.
        forward: what the forward product multiplies, in the backend's layout; None before the first.
        backward: what the input gradient multiplies; None until a training forward needs it.
        bias: a copy of the bias in ``dtype``, at an address that stays; None where the layer's own serves.
        forward_is_values: whether ``forward`` lies in the storage of the values themselves.
        lasting: whether they are kept from one product to the next.
        captured: whether a refresh was recorded in a CUDA graph; from then on nothing is taken as current.
    """

    __slots__ = (
        *("_made", "_state", "_stream", "backend", "backward", "bias", "captured"),
        *("dtype", "forward", "forward_is_values", "lasting"),
    )

    def __init__(self, dtype: torch.dtype, backend: str, lasting: bool = True) -> None:
        self.dtype, self.backend, self.lasting = dtype, backend, lasting
        self.forward: Tensor | None = None
        self.backward: Tensor | None = None
        self.bias: Tensor | None = None
        self.forward_is_values = False
        self.captured = False
        self._state: _State | None = None
        self._stream = 0
        self._made: torch.cuda.Event | None = None

    def made_on(self, device: int) -> None:
        """Remember on which stream of a GPU the operands are being made."""
        self._stream = torch._C._cuda_getCurrentRawStream(device)
        if self._made is None:
            self._made = torch.cuda.Event()
        self._made.record(torch.cuda.current_stream(device))

    def wait(self, device: int) -> None:
        """Make a stream other than that one wait for them: nobody but us knows that they are made at a first use."""
        if self._made is not None and torch._C._cuda_getCurrentRawStream(device) != self._stream:
            self._made.wait(torch.cuda.current_stream(device))


class Change:
    """What a backend has to do in a refresh.

    Attributes:
        pattern: the forward mask is new: rebuild the forward metadata.
        columns: the backward choice is new: rebuild the backward metadata.
        needs_forward: whether the forward operand is wanted.
        needs_backward: whether the backward operand is.
    """

    __slots__ = ("columns", "needs_backward", "needs_forward", "pattern")

    def __init__(self, pattern: bool, columns: bool, needs_backward: bool, needs_forward: bool = True) -> None:
        self.pattern, self.columns = pattern, columns
        self.needs_forward, self.needs_backward = needs_forward, needs_backward


class _State:
    """What the operands of a pair were made from.

    Attributes:
        sources: generations of weights and masks, and the stamps of values and forward mask.
        bias: stamp of the bias, None if there was none.
        columns: stamp of the choice that the backward operand's metadata are of; None while there is none.
        backward: whether the backward operand's values are as current as the rest.
    """

    __slots__ = ("backward", "bias", "columns", "sources")

    def __init__(self, sources: tuple[int, ...], bias: Stamp | None) -> None:
        self.sources, self.bias = sources, bias
        self.columns: Stamp | None = None
        self.backward = False


def _stamp(tensor: Tensor) -> Stamp:
    """Address and version; inference tensors have no version."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _sources_now(values: Tensor, indices: Tensor) -> tuple[int, ...]:
    try:
        return (
            freshness.weights,
            freshness.masks,
            values.data_ptr(),
            values._version,
            indices.data_ptr(),
            indices._version,
        )
    except RuntimeError:  # inference tensors; asking each time costs more than this does for them
        return freshness.weights, freshness.masks, *_stamp(values), *_stamp(indices)


class Operands:
    """The kept operands of one weight, one :class:`Pair` a dtype and backend. Owned by its layer.

    Attributes:
        adopted: whether they belong to a weight yet; those of a copied or unpickled layer do not.
        transient: make them for each product and keep none: of a weight that is gathered for its products alone, kept
            ones would be the whole weight again. Only the copy of the bias stays, ``d_out`` numbers.
    """

    def __init__(self) -> None:
        self.adopted = False
        self.transient = False
        self._pairs: dict[tuple[torch.dtype, str], Pair] = {}
        self._biases: dict[tuple[torch.dtype, str], Tensor] = {}
        self._sources: tuple[Tensor, ...] = ()

    def adopt(self, values: Tensor, indices: Tensor) -> None:
        """Make these operands the ones that products of this weight find; earlier ones are dropped.

        While the sources are held, no other tensor can come to lie at their address.
        """
        self._pairs.clear()
        self._sources = (values.detach(), indices)
        self.adopted = True
        if indices.device.type != "meta":
            _LIVE[indices.data_ptr()] = self

    def belong_to(self, values: Tensor, indices: Tensor) -> bool:
        """Whether these are the operands of this very weight, where it lies now."""
        if not self._sources or self._sources[0].dtype is not values.dtype:
            return False
        return [source.data_ptr() for source in self._sources] == [values.data_ptr(), indices.data_ptr()]

    def become_transient(self, transient: bool) -> bool:
        """Keep none from now on, and drop those that are there, with the hold on the weight as it lay whole; or keep again."""
        self.transient = transient
        if transient:
            self._pairs.clear()
            self._sources = ()
        else:
            self._biases.clear()
        return transient

    def distrust(self) -> None:
        """Rebuild everything at the next product, in the buffers that are there."""
        for pair in self._pairs.values():
            pair._state = None

    def give_forward(self, dtype: torch.dtype, backend: str, operand: Tensor) -> None:
        """Use ``operand`` for the forward product: its values part is the storage of the values themselves."""
        pair = self._pairs.setdefault((dtype, backend), Pair(dtype, backend))
        pair.forward, pair.forward_is_values, pair._state = operand, True, None

    def current(
        self,
        values: Tensor,
        indices: Tensor,
        backward_indices: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        backend: str,
        needs_backward: bool,
    ) -> Pair:
        """Operands as of now.

        Args:
            values: ``(d_out, d_in / 2)``.
            indices: uint8 ``(d_out, d_in / 8)``.
            backward_indices: uint8 ``(d_in, d_out / 8)``.
            bias: ``(d_out,)`` or None.
            dtype: of the product.
            backend: a resolved name.
            needs_backward: whether an input gradient will be asked for; transient operands for it are made then.
        """
        pair = self._pairs.get((dtype, backend))
        if (
            pair is not None
            and not pair.captured
            and (state := pair._state) is not None
            and state.sources == _sources_now(values, indices)
            and (bias is None or (pair.bias is None and bias.dtype is dtype) or state.bias == _stamp(bias))
            and (not needs_backward or (state.backward and state.columns == _stamp(backward_indices)))
            and not (values.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            if values.is_cuda:
                pair.wait(values.get_device())
            return pair
        if self.transient:
            return self._transient(values, indices, backward_indices, bias, dtype, backend, True, False)
        return self.refresh(values, indices, backward_indices, bias, dtype, backend, needs_backward)

    def backward_of_now(
        self, values: Tensor, indices: Tensor, backward_indices: Tensor, dtype: torch.dtype, backend: str
    ) -> Pair:
        """Operands for an input gradient: those that the forward left, if nothing has changed since.

        Unlike :meth:`current`, this trusts them while a CUDA graph is recorded: the forward was recorded before, with
        its refresh.
        """
        pair = self._pairs.get((dtype, backend))
        if (
            pair is not None
            and (state := pair._state) is not None
            and state.sources == _sources_now(values, indices)
            and state.backward
            and state.columns == _stamp(backward_indices)
        ):
            return pair
        if self.transient:
            return self._transient(values, indices, backward_indices, None, dtype, backend, False, True)
        return self.refresh(values, indices, backward_indices, None, dtype, backend, True)

    def _transient(
        self,
        values: Tensor,
        indices: Tensor,
        backward_indices: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        backend: str,
        forward: bool,
        backward: bool,
    ) -> Pair:
        """Operands for one product, which nothing holds but that product."""
        pair, key = Pair(dtype, backend, lasting=False), (dtype, backend)
        if forward and bias is not None:
            pair.bias = self._biases.get(key)
        everything = Change(pattern=True, columns=True, needs_backward=backward, needs_forward=forward)
        with torch.inference_mode(False), torch.no_grad():
            get_backend(backend).refresh(pair, values.detach(), indices, backward_indices, bias, everything)
        if pair.bias is not None:
            self._biases[key] = pair.bias
        return pair

    def refresh_all(self, values: Tensor, indices: Tensor, backward_indices: Tensor, bias: Tensor | None) -> None:
        """Bring every pair that exists up to date, in place: after a re-setup, for CUDA graphs that hold the buffers."""
        if self.transient:
            return
        for dtype, backend in list(self._pairs):
            needs_backward = self._pairs[dtype, backend].backward is not None
            self.refresh(values, indices, backward_indices, bias, dtype, backend, needs_backward)

    def refresh(
        self,
        values: Tensor,
        indices: Tensor,
        backward_indices: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        backend: str,
        needs_backward: bool,
    ) -> Pair:
        """Make the operands, current or not; arguments as in :meth:`current`."""
        if self.transient:
            return self._transient(values, indices, backward_indices, bias, dtype, backend, True, needs_backward)
        if not self.belong_to(values, indices):
            kept = {key: pair for key, pair in self._pairs.items() if not pair.forward_is_values}
            self.adopt(values, indices)
            self._pairs.update(kept)
        pair = self._pairs.get((dtype, backend))
        if pair is None:
            pair = self._pairs[dtype, backend] = Pair(dtype, backend)
        capturing = values.is_cuda and torch.cuda.is_current_stream_capturing()
        outside_graphs = values.is_cuda and not capturing  # recording begins with all work done, and orders its own
        if outside_graphs:
            pair.wait(values.get_device())
        sources, old = _sources_now(values, indices), pair._state
        columns = _stamp(backward_indices)
        same_masks = old is not None and old.sources[1] == sources[1]
        change = Change(
            pattern=not (same_masks and old is not None and old.sources[4:] == sources[4:]),
            columns=not (same_masks and old is not None and old.columns == columns),
            needs_backward=needs_backward,
        )
        bias_stamp = None if bias is None else _stamp(bias)
        if bias is None and old is not None:
            bias_stamp = old.bias  # an input gradient asks without the bias
        state = _State(sources, bias_stamp)
        # What is made under inference_mode could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            get_backend(backend).refresh(pair, values.detach(), indices, backward_indices, bias, change)
        if outside_graphs:
            pair.made_on(values.get_device())
        if needs_backward:
            state.columns, state.backward = columns, True
        elif pair.backward is not None and old is not None:
            state.columns = old.columns if same_masks else None  # its metadata still is of that choice
        pair._state = state
        # A recorded refresh runs again at each replay, which moves weights without a trace here.
        pair.captured = pair.captured or capturing
        return pair

    def nbytes(self) -> int:
        """Bytes that the operands take beside the values."""
        total = sum(bias.nbytes for bias in self._biases.values())
        for pair in self._pairs.values():
            total += sum(tensor.nbytes for tensor in (pair.forward, pair.backward, pair.bias) if tensor is not None)
            if pair.forward is not None and pair.forward_is_values:
                total -= self._sources[0].nbytes
        return total

    def __deepcopy__(self, memo: dict[int, Any]) -> "Operands":
        """A copied layer makes its own."""
        return Operands()

    def __reduce__(self) -> tuple[type["Operands"], tuple[()]]:
        """Likewise a pickled one."""
        return Operands, ()


# Operands by the address of their indices: compiled graphs hand over tensors, not layers.
_LIVE: WeakValueDictionary[int, Operands] = WeakValueDictionary()


def operands_of(indices: Tensor) -> Operands:
    """The operands kept for a weight, or fresh ones, dropped after use, for tensors that belong to no layer."""
    return _LIVE.get(indices.data_ptr()) or Operands()
