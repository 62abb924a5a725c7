"""Forward and backward hooks of modules: who has some, and carrying them over to a replacement."""

from torch import nn

_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a replacement the forward and backward hooks of the layer it replaces; their handles stay valid."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))


def is_hooked(*modules: nn.Module) -> bool:
    """Whether somebody is to be called before or after one of these modules."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )
