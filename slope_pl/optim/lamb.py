"""LAMB (You et al. 2019, "Large Batch Optimization for Deep Learning", arXiv 1904.00962, algorithm 2).

Why our own: torch has none. pytorch-optimizer 4.1 has no bias correction, cuts weight norms at 10, by default decays outside
the trust ratio, and keeps the moments of bfloat16 parameters in bfloat16; timm's works tensor by tensor and brings torchvision
along; apex's and DeepSpeed's are compiled extensions.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Lamb(Optimizer):
    """Adam whose step in each parameter tensor is as long as a fixed share of that tensor.

    With ``t`` the number of gradients that a tensor ``w`` has had::

        m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g²
        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w
        w = w - lr (|w| / |u|) u         the trust ratio |w| / |u| is 1 where either norm is 0

    Norms are Euclidean, one for each parameter tensor. Of a 2:4 sparse layer that tensor is ``values``: its trust ratio is
    that of the kept values, which equals the one of the dense weight with zeros in place, whose pruned entries have neither
    size nor update. ``t`` counts for each tensor by itself: adapters that wake late get their own bias correction.

    Clipping is not part of it: the published BERT runs scale all gradients to a global norm of at most 1 first, which is
    ``gradient_clip_val=1.0`` of a Trainer.

    Args:
        params: parameters, or groups of them; groups may set every option below.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: factor on the weights inside the update, before the trust ratio.
        bias_correction: divide the moments by ``1 - beta^t``; the paper's algorithm and the published runs do.
        always_adapt: use the trust ratio in groups without weight decay, too, as the paper has it. The published BERT runs
            do not (False): biases and norms then take plain Adam steps.
        state_dtype: of the moments; None is that of each parameter. The update is computed in this dtype.

    Raises:
        ValueError: a value is out of range.
        TypeError: at a step, if a gradient is sparse (torch's layout) or a parameter is sharded (DTensor): the norm of a
            shard is not the norm of the tensor.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        always_adapt: bool = True,
        state_dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "always_adapt": always_adapt,
                "state_dtype": state_dtype,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in the base class, after a look at its values."""
        values = {**self.defaults, **param_group}
        betas, dtype = values["betas"], values["state_dtype"]
        for name, good, expected in (
            ("lr", _is_number(values["lr"]) and values["lr"] >= 0, "0 or more"),
            (
                "betas",
                isinstance(betas, tuple | list)
                and len(betas) == 2
                and all(_is_number(b) and 0 <= b < 1 for b in betas),
                "two numbers in [0, 1)",
            ),
            ("eps", _is_number(values["eps"]) and values["eps"] > 0, "a number above 0"),
            (
                "weight_decay",
                _is_number(values["weight_decay"]) and values["weight_decay"] >= 0,
                "0 or more",
            ),
            (
                "state_dtype",
                dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point),
                "a floating-point dtype, or None",
            ),
        ):
            if not good:
                raise ValueError(f"Lamb: {name}={values[name]!r}, expected {expected}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the gradients that there are; parameters without one stay as they are.

        Args:
            closure: computes the loss and the gradients anew; optional.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    _check(p)
                    alike[p.device, p.dtype].append(p)
            for parameters in alike.values():
                self._update(group, parameters)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Move parameters of one device and dtype; each operation is one call for all of them."""
        states = [self._state_of(p, group["state_dtype"]) for p in parameters]
        ms, vs = ([state[name] for state in states] for name in _MOMENTS)
        dtype = ms[0].dtype
        beta1, beta2 = group["betas"]
        grads = [p.grad.to(dtype) for p in parameters]  # type: ignore[union-attr]
        weights = [p.to(dtype) for p in parameters]  # themselves where the dtype is the same
        torch._foreach_lerp_(ms, grads, 1 - beta1)
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, grads, grads, value=1 - beta2)
        del grads

        for state in states:
            state["step"] += 1
        updates = torch._foreach_sqrt(vs)
        if group["bias_correction"]:
            steps = [state["step"].item() for state in states]
            torch._foreach_div_(updates, [(1 - beta2**t) ** 0.5 for t in steps])
            torch._foreach_add_(updates, group["eps"])
            torch._foreach_mul_(updates, [1 - beta1**t for t in steps])
        else:
            torch._foreach_add_(updates, group["eps"])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, ms)
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        if group["weight_decay"] or group["always_adapt"]:
            w, u = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, updates))
            trust = torch.where((w > 0) & (u > 0), w / u, 1.0)
            torch._foreach_mul_(updates, list(trust.unbind()))
        if dtype == parameters[0].dtype:
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        else:
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            torch._foreach_copy_(parameters, weights)

    def _state_of(self, parameter: Tensor, dtype: torch.dtype | None) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: it is read at every step
            for name in _MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; the moments keep the dtype they were saved in, which the base class would not respect."""
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for i, parameter in zip(saved_ids, own, strict=True):
            for name in _MOMENTS:
                saved = state_dict["state"].get(i, {}).get(name)
                if saved is not None and saved.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = saved.to(parameter.device, copy=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(parameter: Tensor) -> None:
    if isinstance(parameter, DTensor):
        raise TypeError(
            "Lamb: a parameter is sharded (DTensor), and the norm of a shard is not that of the tensor: use DDP "
            "(strategy slope_ddp), or AdamW"
        )
    if parameter.grad is not None and parameter.grad.layout is not torch.strided:
        raise TypeError(f"Lamb: a gradient has layout {parameter.grad.layout}, expected torch.strided")
