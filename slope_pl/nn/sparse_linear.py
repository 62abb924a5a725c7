"""The layer: a linear map whose weight is its kept values."""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slope_pl import ops
from slope_pl.config import SLoPeConfig
from slope_pl.errors import CheckpointError, ConversionError
from slope_pl.nn.freshness import generation
from slope_pl.sparsity import backward_mask, check_indices, compress, decompress, make_mask, pack_indices, unpack_mask

STORABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Kept(NamedTuple):
    """Derived operands, and what they were made from.

    Attributes:
        key: versions and addresses of the sources, the dtype, the generation of weights.
        sources: the sources themselves; while they are held, no other tensor can come to lie at their address.
        forward_operand: see :mod:`slope_pl.ops.backends`.
        backward_operand: None until a forward needs it.
    """

    key: tuple[Any, ...]
    sources: tuple[Tensor, ...]
    forward_operand: Tensor
    backward_operand: Tensor | None


class SparseLinear(nn.Module):
    """``y = x W^T + b`` with a 2:4 sparse W, trained by double-pruned backward products (paper, section 3).

    State: ``values`` ``(d_out, d_in / 2)``, the only trainable copy of the weight; ``bias`` ``(d_out,)`` or None;
    ``adapter_down`` ``(r, d_in)`` and ``adapter_up`` ``(d_out, r)``, or None at rank 0; buffers ``indices`` uint8
    ``(d_out, d_in / 8)``, ``backward_indices`` uint8 ``(d_in, d_out / 8)`` and ``adapter_active``, a uint8 scalar.
    The operands that a backend multiplies are derived, kept between forwards, never saved.

    The adapters sleep (no gradient, no share in the output) until :meth:`wake_adapters`.

    Args:
        in_features: d_in, a multiple of 8.
        out_features: d_out, a multiple of 8.
        bias: whether there is one.
        config: mask, adapters, backend.
        seed: for a random mask and the adapters.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConversionError: if the shape or dtype cannot be 2:4 sparse.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    indices: Tensor
    backward_indices: Tensor
    adapter_active: Tensor
    adapter_down: nn.Parameter | None
    adapter_up: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: SLoPeConfig | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(dense.weight, dense.bias, config or SLoPeConfig(), seed)

    @classmethod
    def from_linear(cls, linear: nn.Module, config: SLoPeConfig | None = None, seed: int = 0) -> "SparseLinear":
        """A sparse layer with the kept weights of a dense one.

        Args:
            linear: an ``nn.Linear``, or a Hugging Face ``Conv1D`` (weight ``(d_in, d_out)``). Its bias becomes the new
                layer's, the same Parameter; its weight is left as it is.
            config: mask, adapters, backend.
            seed: for a random mask and the adapters.

        Raises:
            ConversionError: if shape, dtype or device cannot be 2:4 sparse.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        weight, bias = linear.get_parameter("weight"), cast("nn.Parameter | None", linear.bias)
        layer._adopt(weight if isinstance(linear, nn.Linear) else weight.t(), bias, config or SLoPeConfig(), seed)
        layer._made_from = type(linear)
        layer.training = linear.training
        _carry_hooks(linear, layer)
        return layer

    def to_dense(self) -> nn.Module:
        """A dense layer that computes the same: an ``nn.Linear``, or the ``Conv1D`` that this layer was made from.

        The weight is :attr:`weight` (zeros in place, awake adapters added); the bias is the same Parameter.
        """
        weight = self.weight
        if self.transposed:
            with torch.device("meta"):  # its constructor would draw a weight from the global generator
                dense: Any = self._made_from(self.out_features, self.in_features)
            dense.weight = nn.Parameter(weight.t().contiguous(), requires_grad=self.values.requires_grad)
        else:
            dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        dense.bias = self.bias
        dense.train(self.training)
        _carry_hooks(self, dense)
        return dense

    @property
    def transposed(self) -> bool:
        """Whether the layer was made from a ``Conv1D``, whose weight is stored ``(d_in, d_out)``."""
        return not issubclass(self._made_from, nn.Linear)

    @torch.no_grad()
    def _adopt(self, weight: Tensor, bias: nn.Parameter | None, config: SLoPeConfig, seed: int) -> None:
        reason = why_ineligible(weight)
        if reason is not None:
            raise ConversionError(
                f"a weight of shape {tuple(weight.shape)}, {weight.dtype} cannot be 2:4 sparse: {reason}"
            )
        self.out_features, self.in_features = weight.shape
        self.config = config
        self._made_from: type[nn.Module] = nn.Linear
        mask = make_mask(config.mask, weight, seed)
        indices = pack_indices(mask)
        values = compress(weight.detach(), indices)
        self.values = nn.Parameter(values, requires_grad=weight.requires_grad)
        self.register_buffer("indices", indices)
        self.register_buffer("backward_indices", ops.choose_backward_indices(values, indices))
        self.bias = bias
        self.adapter_rank = config.rank_for(self.out_features, self.in_features)
        self._make_adapters(seed)
        self.register_buffer("adapter_active", torch.zeros((), dtype=torch.uint8, device=values.device))
        self._awake = False
        ops.resolve_backend(config.backend, values.device.type)  # raises now rather than at the first forward
        self._kept: _Kept | None = None

    def _make_adapters(self, seed: int) -> None:
        """Down standard normal, up zero, as in the published code: the output does not move at the wake."""
        self.register_parameter("adapter_down", None)
        self.register_parameter("adapter_up", None)
        if self.adapter_rank:
            # Drawn on the CPU from a generator of its own: the same on every rank and device.
            generator = torch.Generator("cpu").manual_seed(seed)
            down = torch.randn(
                self.adapter_rank, self.in_features, generator=generator, dtype=torch.float32, device="cpu"
            )
            up = self.values.new_zeros(self.out_features, self.adapter_rank)
            self.adapter_down = nn.Parameter(down.to(self.values), requires_grad=False)
            self.adapter_up = nn.Parameter(up, requires_grad=False)

    # ------------------------------------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_in) -> (..., d_out)``, in the dtype of ``x``, or of autocast where that is on."""
        device_type = x.device.type
        castable = x.is_floating_point() and x.dtype is not torch.float64
        if castable and torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        elif x.dtype is not self.values.dtype:
            raise RuntimeError(
                f"SparseLinear: input is {x.dtype}, weights are {self.values.dtype}; cast one of them or use autocast"
            )
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"SparseLinear: input of shape {tuple(x.shape)} does not end in in_features = {self.in_features}"
            )
        needs_backward = torch.is_grad_enabled() and x.requires_grad
        forward_operand, backward_operand = self._operands(x.dtype, needs_backward)
        y = ops.sparse_linear(
            x,
            self.values,
            self.indices,
            self.bias,
            forward_operand,
            backward_operand,
            self.backward_indices,
            ops.resolve_backend(self.config.backend, device_type),
        )
        if self._awake and self.adapter_down is not None and self.adapter_up is not None:
            y = y + F.linear(F.linear(x, self.adapter_down) / self.adapter_rank, self.adapter_up)
        return y

    def _operands(self, dtype: torch.dtype, needs_backward: bool) -> tuple[Tensor, Tensor | None]:
        """Current operands, made anew only where the weights, the columns, the dtype or the device changed."""
        if torch.compiler.is_compiling():
            # A graph cannot branch on a version counter, so a compiled forward makes its operands inside the graph.
            return self._make_operands(dtype, needs_backward)
        values = self.values
        key = (
            generation(),
            dtype,
            values.data_ptr(),
            self.indices.data_ptr(),
            *(0 if t.is_inference() else t._version for t in (values, self.indices, self.backward_indices)),
        )
        forward_operand = None
        if self._kept is not None and self._kept.key == key:
            forward_operand = self._kept.forward_operand
            if self._kept.backward_operand is not None or not needs_backward:
                return forward_operand, self._kept.backward_operand
        self._kept = None  # the old operands' memory is free before the new ones are made
        # What is made under inference_mode could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            made = self._make_operands(dtype, needs_backward, forward_operand)
        self._kept = _Kept(key, (values.detach(), self.indices), *made)
        return made

    def _make_operands(
        self, dtype: torch.dtype, needs_backward: bool, forward_operand: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        values = self.values.detach()
        backend = ops.resolve_backend(self.config.backend, values.device.type)
        if forward_operand is None:
            if ops.get_backend(backend).forward_operand_is_values and values.dtype == dtype:
                forward_operand = values
            else:
                forward_operand = ops.forward_operand(values, self.indices, dtype, backend)
        if not needs_backward:
            return forward_operand, None
        return forward_operand, ops.backward_operand(values, self.indices, self.backward_indices, dtype, backend)

    def train(self, mode: bool = True) -> "SparseLinear":
        """As in ``nn.Module``; also drops the derived operands, since weights are often swapped around evaluation."""
        self._kept = None
        return super().train(mode)

    # ------------------------------------------------------------------------------------------------ schedule

    @torch.no_grad()
    def refresh_backward_mask(self) -> Tensor:
        """Choose the columns of the double-pruned weight anew, by current magnitude (the 100-step re-setup).

        Returns:
            a float32 scalar: the share of the backward mask's entries that were replaced (the churn), 0 to 1.
        """
        before = self.backward_mask()
        self.backward_indices.copy_(ops.choose_backward_indices(self.values, self.indices))
        return (self.backward_mask() & ~before).sum(dtype=torch.float32) / before.sum()

    def wake_adapters(self) -> bool:
        """Let the adapters take part and train from now on; only loading an earlier state puts them back to sleep.

        Returns:
            whether anything changed: False at rank 0, and where they are awake already.
        """
        if self._awake or self.adapter_down is None or self.adapter_up is None:
            return False
        self._awake = True
        self.adapter_active.fill_(1)
        # Frozen values mean that this layer is not trained: then neither are its adapters.
        self.adapter_down.requires_grad_(self.values.requires_grad)
        self.adapter_up.requires_grad_(self.values.requires_grad)
        return True

    @property
    def adapters_awake(self) -> bool:
        """Whether the adapters take part in the output."""
        return self._awake

    # ------------------------------------------------------------------------------------------------ views

    def dense_weight(self) -> Tensor:
        """W as a dense ``(d_out, d_in)`` matrix with zeros in place, detached; adapters are not part of it."""
        return decompress(self.values.detach(), self.indices)

    def adapter_product(self) -> Tensor | None:
        """What awake adapters add to W, ``up down / r`` ``(d_out, d_in)``, detached; None while they sleep."""
        if not self._awake or self.adapter_down is None or self.adapter_up is None:
            return None
        return (self.adapter_up.detach() @ self.adapter_down.detach()) / self.adapter_rank

    @property
    def weight(self) -> Tensor:
        """The effective dense weight, adapters included: computed at each access and read-only.

        For code that looks at ``linear.weight`` of a layer it did not make. Writing into it changes nothing here.
        """
        product = self.adapter_product()
        return self.dense_weight() if product is None else self.dense_weight() + product

    def forward_mask(self) -> Tensor:
        """Bool ``(d_out, d_in)``: the kept weights."""
        return unpack_mask(self.indices)

    def backward_mask(self) -> Tensor:
        """Bool ``(d_out, d_in)``: the kept weights that the input gradient is multiplied with at present."""
        return backward_mask(self.indices, self.backward_indices)

    def extra_repr(self) -> str:
        """Shape, mask, adapters and their phase, backend."""
        adapters = f"{self.adapter_rank} ({'awake' if self._awake else 'asleep'})" if self.adapter_rank else "none"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"mask={self.config.mask} 2:4, adapter_rank={adapters}, backend={self.config.backend}"
        )

    # ------------------------------------------------------------------------------------------------ state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict and prefix + "values" not in state_dict:
            raise CheckpointError(
                f"the checkpoint holds a dense {prefix + 'weight'!r}, but that layer is 2:4 sparse here: load dense "
                "weights before the model is made sparse, or train the dense configuration"
            )
        for name in ("indices", "backward_indices"):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape == own.shape and saved.device.type != "meta":
                try:
                    check_indices(saved, prefix + name)
                except ValueError as error:
                    raise CheckpointError(str(error)) from error
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._kept = None  # inference tensors have no version counter that would tell
        self._follow_phase()

    def _follow_phase(self) -> None:
        """Bring the layer into the phase that its buffer, just loaded, names."""
        if bool(self.adapter_active):
            self.wake_adapters()
        elif self._awake:
            self._awake = False
            for adapter in (self.adapter_down, self.adapter_up):
                if adapter is not None:
                    adapter.requires_grad_(False)
                    adapter.grad = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the derived operands: a copy or a pickle makes its own."""
        return {**self.__dict__, "_kept": None}


def why_ineligible(weight: Tensor) -> str | None:
    """Why a dense weight ``(d_out, d_in)`` cannot be 2:4 sparse, or None if it can."""
    if weight.dim() != 2:
        return f"it has {weight.dim()} dimensions, 2 are expected"
    if weight.numel() == 0:
        return "it is empty (partitioned by ZeRO-3?): convert before it is sharded"
    if weight.device.type == "meta":
        return "it is on the meta device and has no values to choose a mask from: materialise it first"
    if weight.dtype not in STORABLE_DTYPES:
        return f"its dtype is none of {', '.join(str(dtype).removeprefix('torch.') for dtype in STORABLE_DTYPES)}"
    d_out, d_in = weight.shape
    if d_out % 8 or d_in % 8:
        return f"{d_out}x{d_in}: both sides must be multiples of 8"
    return None


_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)


def _carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a replacement the forward and backward hooks of the layer it replaces; their handles stay valid."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
