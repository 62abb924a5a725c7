"""The layer of both baselines: a dense weight that is multiplied with a mask, trained straight through."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slope_pl.baselines.config import BackwardPruning
from slope_pl.baselines.product import MaskedProduct, double_pruned_mask
from slope_pl.errors import CheckpointError, ConversionError
from slope_pl.nn.eligibility import check_linear, why_ineligible
from slope_pl.nn.hooks import carry_hooks
from slope_pl.sparsity import MaskKind, make_mask


class MaskedLinear(nn.Module):
    """``y = x (mask * W)^T + b`` with a dense W: every entry of W gets a gradient, also those that the mask hides.

    A simulation: the products are dense ones. State: ``weight`` and ``bias``, the dense layer's own Parameters under their
    own names (a dense checkpoint loads, the mask is then chosen from its weights); ``adapter_down`` ``(r, d_in)`` and
    ``adapter_up`` ``(d_out, r)``, or None at rank 0; buffers ``mask`` and, for ``backward_pruning="weight"``,
    ``backward_mask``, bool ``(d_out, d_in)``; ``mask_active`` and ``adapter_active``, uint8 scalars.

    Args:
        linear: an ``nn.Linear``, or a Hugging Face ``Conv1D`` (whose weight stays ``(d_in, d_out)``).
        mask: ``magnitude`` or ``transposable``.
        backward_pruning: see :class:`slope_pl.baselines.SRSTEConfig`.
        mvue: unbiased random 2:4 pruning of the output gradient in the weight gradient's product.
        adapter_rank: 0 for no adapters.
        seed: of the adapters.

    Raises:
        ConversionError: if the shape or dtype cannot be 2:4 sparse.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    mask: Tensor
    backward_mask: Tensor | None
    mask_active: Tensor
    adapter_active: Tensor
    noise_seed: Tensor
    adapter_down: nn.Parameter | None
    adapter_up: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Module,
        *,
        mask: MaskKind = "magnitude",
        backward_pruning: BackwardPruning = "none",
        mvue: bool = False,
        adapter_rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_linear(linear)
        self._made_from = type(linear)
        self.weight = linear.get_parameter("weight")
        self.bias = cast("nn.Parameter | None", linear.bias)
        reason = why_ineligible(self._oriented())
        if reason is not None:
            raise ConversionError(
                f"a weight of shape {tuple(self.weight.shape)}, {self.weight.dtype} cannot be 2:4 sparse: {reason}"
            )
        self.out_features, self.in_features = self._oriented().shape
        self.mask_kind, self.backward_pruning, self.mvue = mask, backward_pruning, mvue
        self.config: Any = None
        """The callback's config, set by the surgery."""
        self.noise_stream = 0
        """Tells the ranks' random pruning apart; a plain number, because DDP makes buffers alike on all ranks."""
        device = self.weight.device
        self.register_buffer("mask", torch.zeros(self.out_features, self.in_features, dtype=torch.bool, device=device))
        self.register_buffer("backward_mask", self.mask.clone() if backward_pruning == "weight" else None)
        self.register_buffer("mask_active", torch.ones((), dtype=torch.uint8, device=device))
        self.register_buffer("adapter_active", torch.zeros((), dtype=torch.uint8, device=device))
        self.register_buffer("noise_seed", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self._masked, self._awake = True, False
        self.adapter_rank = adapter_rank
        self._make_adapters(seed)
        self.refresh_mask()
        self.training = linear.training
        carry_hooks(linear, self)

    @property
    def masked_by(self) -> str:
        """The method's config class, by name: what SLoPe's surgery says when it refuses the model."""
        return type(self).__name__ if self.config is None else type(self.config).__name__

    @torch.no_grad()
    def _make_adapters(self, seed: int) -> None:
        """Down standard normal, up zero: the same numbers as a ``SparseLinear``'s of the same seed."""
        self.register_parameter("adapter_down", None)
        self.register_parameter("adapter_up", None)
        if self.adapter_rank:
            generator = torch.Generator("cpu").manual_seed(seed)
            shape = (self.adapter_rank, self.in_features)
            down = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            self.adapter_down = nn.Parameter(down.to(self.weight), requires_grad=False)
            up = self.weight.new_zeros(self.out_features, self.adapter_rank)
            self.adapter_up = nn.Parameter(up, requires_grad=False)

    # ------------------------------------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_in) -> (..., d_out)``, in the dtype of ``x``, or of autocast where that is on."""
        weight, down, up = self._oriented(), self.adapter_down, self.adapter_up
        bias: Tensor | None = self.bias
        kind = x.device.type
        if x.is_floating_point() and x.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
            # By hand, because autocast does not look into the product's own autograd function.
            dtype = torch.get_autocast_dtype(kind)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if not self._masked:
            return F.linear(x, weight, bias)
        rows = x.reshape(-1, self.in_features)
        # A copy: the seed moves on in place, perhaps before this product's backward.
        seed = self.noise_seed.clone() if self.mvue else None
        y = MaskedProduct.apply(
            rows, weight, bias, self.mask, self.backward_mask, self.backward_pruning, seed, self.noise_stream
        )
        if self._awake and down is not None and up is not None:
            low = rows @ down.to(rows.dtype).t()
            y = torch.addmm(y, low, up.to(rows.dtype).t(), alpha=1 / self.adapter_rank)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def transposed(self) -> bool:
        """Whether the layer was made from a ``Conv1D``, whose weight is stored ``(d_in, d_out)``."""
        return not issubclass(self._made_from, nn.Linear)

    def _oriented(self) -> Tensor:
        return self.weight.t() if self.transposed else self.weight

    # ------------------------------------------------------------------------------------------------ schedule

    @torch.no_grad()
    def refresh_mask(self) -> Tensor:
        """Choose the mask, and the double-pruned one, anew from the current weight.

        Returns:
            a float32 scalar: the flip rate, the share of the mask's entries that changed, 0 to 1 (arXiv 2404.01847, 4.1).
        """
        weight = self._oriented().detach()
        chosen = make_mask(self.mask_kind, weight)
        flipped = (chosen != self.mask).mean(dtype=torch.float32)
        self.mask.copy_(chosen)
        if self.backward_mask is not None:
            self.backward_mask.copy_(double_pruned_mask(weight, chosen))
        return flipped

    @torch.no_grad()
    def add_decay(self, decay: float) -> None:
        """Add ``decay (1 - mask) W`` to the weight's gradient; nothing where there is no gradient, or no mask any more."""
        if self._masked and self.weight.grad is not None and decay:
            hidden = ~(self.mask.t() if self.transposed else self.mask)
            self.weight.grad.addcmul_(self.weight, hidden.to(self.weight.dtype), value=decay)

    def wake_adapters(self) -> bool:
        """Let the adapters take part and train from now on; returns whether anything changed."""
        if self._awake or self.adapter_down is None or self.adapter_up is None:
            return False
        self._awake = True
        self.adapter_active.fill_(1)
        self.adapter_down.requires_grad_(self.weight.requires_grad)
        self.adapter_up.requires_grad_(self.weight.requires_grad)
        return True

    def drop_mask(self) -> None:
        """Be a dense layer from now on."""
        self._masked = False
        self.mask_active.fill_(0)

    @property
    def adapters_awake(self) -> bool:
        """Whether the adapters take part in the output."""
        return self._awake

    @property
    def masked(self) -> bool:
        """Whether the mask takes part in the output."""
        return self._masked

    # ------------------------------------------------------------------------------------------------ views and state

    def effective_weight(self) -> Tensor:
        """What the layer multiplies with, ``(d_out, d_in)``, detached; awake adapters are added in."""
        weight = self._oriented().detach()
        weight = weight * self.mask if self._masked else weight.clone()
        if self._awake and self.adapter_down is not None and self.adapter_up is not None:
            weight = weight + (self.adapter_up.detach() @ self.adapter_down.detach()) / self.adapter_rank
        return weight

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A layer of the kind this one was made from that computes the same; the bias is the same Parameter."""
        with torch.device("meta"):  # a constructor would draw a weight from the global generator
            dense: Any = (
                self._made_from(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=False)
            )
        weight = self.effective_weight()
        weight = weight.t().contiguous() if self.transposed else weight
        dense.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        dense.bias = self.bias
        dense.train(self.training)
        carry_hooks(self, dense)
        return dense

    def extra_repr(self) -> str:
        """Shape, mask and phase."""
        adapters = f"{self.adapter_rank} ({'awake' if self._awake else 'asleep'})" if self.adapter_rank else "none"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"mask={f'{self.mask_kind} 2:4' if self._masked else 'dropped'}, backward_pruning={self.backward_pruning}, "
            f"mvue={self.mvue}, adapter_rank={adapters}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "values" in state_dict:
            raise CheckpointError(
                f"the checkpoint holds SLoPe's {prefix + 'values'!r}, but that layer is a baseline's, with a dense weight: "
                "load it into the SLoPe configuration, or export it to dense weights first (slope_pl.dense_state_dict)"
            )
        dense = prefix + "weight" in state_dict and prefix + "mask" not in state_dict
        if dense:  # a dense checkpoint: what it lacks stays as it is, and the mask is chosen from its weights
            own = {**self._parameters, **{k: v for k, v in self._buffers.items() if k != "noise_seed"}}
            for name, tensor in own.items():
                if tensor is not None:
                    state_dict.setdefault(prefix + name, tensor.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)
        if dense:
            self.refresh_mask()
        self._follow_phase()

    def _follow_phase(self) -> None:
        """Bring the layer into the phase that its buffers, just loaded, name."""
        self._masked = bool(self.mask_active)
        if bool(self.adapter_active):
            self.wake_adapters()
        elif self._awake:
            self._awake = False
            for adapter in (self.adapter_down, self.adapter_up):
                if adapter is not None:
                    adapter.requires_grad_(False)
                    adapter.grad = None
