"""The layer: a linear map whose weight is its kept values."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from slope_pl import ops
from slope_pl.config import SLoPeConfig, as_config
from slope_pl.errors import ConversionError, InputError
from slope_pl.nn.eligibility import check_linear, check_new_layer, check_rank, why_ineligible
from slope_pl.nn.hooks import carry_hooks
from slope_pl.nn.initial import begin_anew, first_adapters, prune
from slope_pl.nn.sharding import gathered, is_sharded, shard_like
from slope_pl.nn.state import check_state
from slope_pl.sparsity import backward_mask, decompress, unpack_mask


class SparseLinear(nn.Module):
    """``y = x W^T + b`` with a 2:4 sparse W, trained by double-pruned backward products (paper, section 3).

    State: ``values`` ``(d_out, d_in / 2)``, the only trainable copy of the weight; ``bias`` ``(d_out,)`` or None;
    ``adapter_down`` ``(r, d_in)`` and ``adapter_up`` ``(d_out, r)``, or None at rank 0; buffers ``indices`` uint8
    ``(d_out, d_in / 8)``, ``backward_indices`` uint8 ``(d_in, d_out / 8)`` and ``adapter_active``, a uint8 scalar.
    The operands that a backend multiplies are derived, kept between forwards, never saved.

    Made of a dense layer on the meta device it has no values and no masks until :meth:`reset_parameters` or a state dict gives
    them (``is_drawn``). The adapters sleep (no gradient, no share in the output) until :meth:`wake_adapters`.

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
        check_new_layer(in_features, out_features, dtype, seed)
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(dense.weight, dense.bias, as_config(config) or SLoPeConfig(), seed)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, config: SLoPeConfig | None = None, seed: int = 0, scale: Tensor | None = None
    ) -> "SparseLinear":
        """A sparse layer with the kept weights of a dense one.

        Args:
            linear: an ``nn.Linear``, or a Hugging Face ``Conv1D`` (weight ``(d_in, d_out)``). Its bias becomes the new
                layer's, the same Parameter; its weight is left as it is.
            config: mask, adapters, backend.
            seed: for a random mask and the adapters.
            scale: ``(d_in,)``, norms of the input features that magnitudes are weighed with.

        Raises:
            ConversionError: if shape, dtype or device cannot be 2:4 sparse.
        """
        check_linear(linear)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        weight, bias = linear.get_parameter("weight"), cast("nn.Parameter | None", linear.bias)
        oriented = weight if isinstance(linear, nn.Linear) else weight.t()
        layer._adopt(oriented, bias, as_config(config) or SLoPeConfig(), seed, scale)
        layer._made_from = type(linear)
        layer.training = linear.training
        carry_hooks(linear, layer)
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
        carry_hooks(self, dense)
        return dense

    @property
    def transposed(self) -> bool:
        """Whether the layer was made from a ``Conv1D``, whose weight is stored ``(d_in, d_out)``."""
        return not issubclass(self._made_from, nn.Linear)

    @torch.no_grad()
    def _adopt(
        self, weight: Tensor, bias: nn.Parameter | None, config: SLoPeConfig, seed: int, scale: Tensor | None = None
    ) -> None:
        reason = why_ineligible(weight)
        if reason is not None:
            raise ConversionError(
                f"a weight of shape {tuple(weight.shape)}, {weight.dtype} cannot be 2:4 sparse: {reason}"
            )
        self.out_features, self.in_features = weight.shape
        self.config, self.seed, self.is_drawn = config, seed, not weight.is_meta
        self._made_from: type[nn.Module] = nn.Linear
        values, indices, columns = prune(weight, config, seed, scale)
        self.values = nn.Parameter(values, requires_grad=weight.requires_grad)
        self.register_buffer("indices", indices)
        self.register_buffer("backward_indices", columns)
        self.bias = bias
        self.adapter_rank = config.rank_for(self.out_features, self.in_features)
        check_rank(self.adapter_rank, self.out_features, self.in_features)
        self._make_adapters(seed)
        self.register_buffer("adapter_active", torch.zeros((), dtype=torch.uint8, device=values.device))
        self._awake = False
        self._check_backend()
        self._operands = ops.Operands()
        self._settle()

    def _make_adapters(self, seed: int) -> None:
        self.register_parameter("adapter_down", None)
        self.register_parameter("adapter_up", None)
        if self.adapter_rank:
            down, up = first_adapters(self.values, self.adapter_rank, seed)
            self.adapter_down = nn.Parameter(down, requires_grad=False)
            self.adapter_up = nn.Parameter(up, requires_grad=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the layer anew, as its dense constructor would, and choose its masks.

        Lightning calls this under FSDP2 for a model that was built on the meta device, once it is sharded: one layer at a
        time is whole. The numbers come from the layer's own seed, alike on all ranks. The adapters sleep.

        Raises:
            ConversionError: if the layer is spread by ZeRO-3.
        """
        begin_anew(self)
        self._follow_phase()
        self._operands.distrust()

    # ------------------------------------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_in) -> (..., d_out)``, in the dtype of ``x``, or of autocast where that is on."""
        x, weight, backend = self._ready(x)
        if not self._awake or self.adapter_down is None or self.adapter_up is None:
            return ops.sparse_linear(x, *weight, backend, self._operands)
        rows = x.reshape(-1, self.in_features)
        down, up = self.adapter_down.to(x.dtype), self.adapter_up.to(x.dtype)
        # Added in place, by the epilogue of the second low-rank product: the sum costs no pass of its own over y.
        y = ops.sparse_linear(rows, *weight, backend, self._operands)
        y = y.addmm_(rows @ down.t(), up.t(), alpha=1 / self.adapter_rank)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _ready(self, x: Tensor) -> tuple[Tensor, ops.Weight, str]:
        """The input in the dtype of the product, what it is multiplied by, and the backend that does it."""
        if not isinstance(x, Tensor):
            raise InputError(
                f"SparseLinear: input is a {type(x).__name__}, a tensor (..., {self.in_features}) is expected"
            )
        weight = self._weight()
        device, dtype = x.device, x.dtype
        device_type = device.type
        if device != weight.values.device:
            raise InputError(
                f"SparseLinear: input is on {str(device)!r}, weights are on {str(weight.values.device)!r}; move one of them"
            )
        if device_type == "meta" and not ops.is_watched():  # by a FLOP counter, say
            raise InputError(
                "SparseLinear: input and weights are on 'meta', which has no values to multiply; use 'cpu'"
            )
        castable = device_type != "meta" and x.is_floating_point() and dtype is not torch.float64
        if castable and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            x = x.to(dtype)
        elif dtype is not weight.values.dtype:
            raise InputError(
                f"SparseLinear: input is {dtype}, weights are {weight.values.dtype}; cast one of them or use autocast"
            )
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise InputError(
                f"SparseLinear: input of shape {tuple(x.shape)} does not end in in_features = {self.in_features}"
            )
        backend = ops.resolve_backend(self.config.backend, device_type, dtype, self.out_features, self.in_features)
        return x, weight, backend

    def _weight(self) -> ops.Weight:
        if not torch.compiler.is_compiling() and not self._operands.adopted:
            self._settle()
        # From the dictionaries: nn.Module's __getattr__ costs a microsecond each time, this whole forward costs twenty.
        # What is not in them has been parametrized.
        parameters, buffers = self._parameters, self._buffers
        values = parameters["values"] if "values" in parameters else self.values  # noqa: SIM401 (looked up only then)
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        indices, columns = buffers["indices"], buffers["backward_indices"]
        assert values is not None
        assert indices is not None
        assert columns is not None
        return ops.Weight(values, indices, columns, bias)

    # ------------------------------------------------------------------------------------------------ operands

    def _check_backend(self) -> None:
        """Raise now, rather than at the first forward, where a backend asked for by name can never run."""
        if self.config.backend not in ("auto", "reference"):
            ops.resolve_backend(self.config.backend, "cuda", None, self.out_features, self.in_features)

    @torch.no_grad()
    def _settle(self) -> None:
        """After the values came to lie somewhere new: let them live inside their forward operand where that is possible."""
        if self.values.device.type != "meta" and self._operands.belong_to(self.values, self.indices):
            return  # it has not moved: a CUDA graph may hold the addresses of values and operands
        self._operands.adopt(self.values, self.indices)
        if self.values.device.type == "meta" or self.note_sharding():
            return
        dtype = self.values.dtype
        name = ops.resolve_backend(
            "reference" if self.config.backend == "reference" else "auto",
            self.values.device.type,
            dtype,
            self.out_features,
            self.in_features,
        )
        moved = ops.get_backend(name).own_values(self.values.detach(), self.indices)
        if moved is not None:
            self.values.data, operand = moved
            self._operands.adopt(self.values, self.indices)
            self._operands.give_forward(dtype, name, operand)

    def shard_like(self, weight: Tensor) -> None:
        """Spread the new parameters over ranks if the dense weight was: where ``deepspeed.zero.Init`` built the model."""
        adapters = (self.adapter_down, self.adapter_up)
        shard_like(weight, [self.values, *(adapter for adapter in adapters if adapter is not None)])
        self.note_sharding()

    def note_sharding(self) -> bool:
        """Whether the values are spread over ranks; then operands are made for each forward, from what it gathered.

        To be asked once the model is sharded and outside a forward, where the values are whole.
        """
        return self._operands.become_transient(is_sharded(self.values))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        """As in ``nn.Module`` (``.to()``, ``.cuda()``, ``.half()``); operands follow the values."""
        result = super()._apply(fn, recurse)
        self._settle()
        return result

    @torch.no_grad()
    def refresh_operands(self, dtype: torch.dtype | None = None, backward: bool = True) -> None:
        """Make the operands of products in ``dtype`` now: for measuring, and before a CUDA graph is recorded. No need else.

        Args:
            dtype: of the input after autocast; the values' own by default.
            backward: also the one of the input gradient.
        """
        dtype = dtype or self.values.dtype
        backend = ops.resolve_backend(
            self.config.backend, self.values.device.type, dtype, self.out_features, self.in_features
        )
        self._operands.refresh(self.values, self.indices, self.backward_indices, self.bias, dtype, backend, backward)

    def operand_bytes(self) -> int:
        """Bytes of derived operands that are kept at present, beside the values: 0 before the first forward."""
        return self._operands.nbytes()

    def train(self, mode: bool = True) -> "SparseLinear":
        """As in ``nn.Module``; the operands are made anew, since weights are often swapped around evaluation."""
        self._operands.distrust()
        return super().train(mode)

    # ------------------------------------------------------------------------------------------------ schedule

    @torch.no_grad()
    def refresh_backward_mask(self) -> Tensor:
        """Choose the columns of the double-pruned weight anew, by current magnitude (the 100-step re-setup).

        Returns:
            a float32 scalar: the share of the backward mask's entries that were replaced (the churn), 0 to 1.
        """
        known = (torch.float32, torch.bfloat16, torch.float16)  # to the kernel, whatever is multiplied
        backend = ops.resolve_backend(
            "reference" if self.config.backend == "reference" or self.values.dtype not in known else "auto",
            self.values.device.type,
            None,
            self.out_features,
            self.in_features,
        )
        with gathered((self.values,)) as (values,):
            chosen, churn = ops.choose_columns(values, self.indices, self.backward_indices, backend)
        self.backward_indices.copy_(chosen)
        self._operands.refresh_all(self.values, self.indices, self.backward_indices, self.bias)
        return churn

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
        """W as a dense ``(d_out, d_in)`` matrix with zeros in place, detached; adapters are not part of it.

        Of a sharded layer it is gathered: all ranks have to ask for it.
        """
        with gathered((self.values,)) as (values,):
            return decompress(values, self.indices)

    def adapter_product(self) -> Tensor | None:
        """What awake adapters add to W, ``up down / r`` ``(d_out, d_in)``, detached; None while they sleep."""
        if not self._awake or self.adapter_down is None or self.adapter_up is None:
            return None
        with gathered((self.adapter_up, self.adapter_down)) as (up, down):
            return (up @ down) / self.adapter_rank

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
        check_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.is_drawn = self.is_drawn or prefix + "values" in state_dict
        self._settle()
        self._operands.distrust()  # inference tensors have no version counter that would tell
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
