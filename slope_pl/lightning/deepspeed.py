"""DeepSpeed: what ZeRO asks of adapters that sleep, and of a net that is built in ``configure_model``.

ZeRO flattens each group of an optimizer when training begins. A parameter that is frozen then is never trained, a group
cannot be added later, and a member without a gradient takes part with zeros: weight decay would move it, and Adam would
count its steps. So sleeping adapters are trainable from the start, in groups of their own that do not decay, and Adam
begins to count when they wake.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from packaging.version import Version
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.optim import Optimizer

from slope_pl.checkpoint.mark import Groups, name_groups
from slope_pl.errors import ConfigError, ScheduleError
from slope_pl.lightning.optimizers import refuse_flattened
from slope_pl.nn import SparseLinear, sparse_layers

_LOSES_GRADIENTS = Version(torch.__version__) < Version("2.13")
"""Whether torch.compile loses those of an autograd function that works in place."""


class ZeroAdapters:
    """Sees to the adapters of a model under a ``DeepSpeedStrategy``, Lightning's or ours.

    The module's ``configure_optimizers`` puts adapters (parameters with ``adapter_`` in their name) into groups of their own;
    what decay these have takes effect when the adapters wake.

    Args:
        strategy: its setup of the engine is extended, on the instance.

    Attributes:
        groups: names of the parameters in the optimizer's groups, once the engine is made.
    """

    def __init__(self, strategy: DeepSpeedStrategy) -> None:
        self._strategy = strategy
        self._decays: dict[int, float] = {}
        self._awake = False
        self.groups: Groups = []
        original = type(strategy)._setup_model_and_optimizer

        def setup(model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None) -> Any:
            keep_torchs_linear(strategy, model)
            if optimizer is not None:
                refuse_flattened(optimizer)
                self.groups = name_groups(model, optimizer)  # ZeRO puts flat vectors in their place
                self._decays = sleeping_groups(sparse_layers(model), optimizer)
            return original(strategy, model, optimizer, lr_scheduler)

        strategy._setup_model_and_optimizer = setup  # type: ignore[method-assign]

    def follow(self, awake: bool) -> None:
        """Give the adapters' groups the decay of their phase: at the start of training, which a checkpoint may have moved."""
        self._awake = awake
        for index, decay in self._decays.items():
            self._strategy.optimizers[0].param_groups[index]["weight_decay"] = decay if awake else 0.0

    def woke(self) -> None:
        """Let the groups decay, and Adam count their steps from here."""
        self.follow(awake=True)
        for index in self._decays:
            restart_steps(self._strategy.optimizers[0], index)

    def record(self) -> Groups:
        """Names of the optimizer's groups for a checkpoint, with the decay that sleeping adapters are to have later."""
        decays = {} if self._awake else self._decays
        return [
            {**group, "weight_decay": decays[index]} if index in decays else dict(group)
            for index, group in enumerate(self.groups)
        ]


def build_whole(strategy: Any) -> None:
    """Let ``configure_model`` build under ZeRO-3 as under the other strategies: whole, on the device of each rank.

    Lightning builds within ``deepspeed.zero.Init``, which empties each module's parameters as soon as its own ``__init__`` is
    through; what a parent does to them after that is lost without an error. The engine spreads a whole net as well.

    Args:
        strategy: the Trainer's; of a ``DeepSpeedStrategy``, Lightning's or ours, the context is replaced, on the instance.
    """
    if not isinstance(strategy, DeepSpeedStrategy) or not strategy.zero_stage_3:
        return

    @contextmanager
    def context() -> Iterator[None]:
        strategy._init_config_if_needed()  # for a zero.Init of the module's own
        with strategy.root_device:
            yield

    strategy.model_sharded_context = context  # type: ignore[method-assign]


def gather_by_blocks(module: nn.Module, strategy: Any) -> None:
    """Let ZeRO-3 gather blocks whole, instead of each layer inside by itself: fewer messages, and no hook inside to compile.

    Args:
        module: before the engine is made. A block is a part with a true attribute ``gathered_whole``, which promises: it is
            called, with its input as first positional argument, once a step; what is inside is called by itself alone; it
            returns a tensor or a tuple of tensors.
        strategy: the Trainer's; under others than ZeRO-3 nothing happens.
    """
    if not isinstance(strategy, DeepSpeedStrategy) or not strategy.zero_stage_3:
        return
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_module, z3_leaf_module

    for part in module.modules():
        if getattr(part, "gathered_whole", False) and not z3_leaf_module(part):
            set_z3_leaf_module(part, True)
            part.register_forward_pre_hook(_ask_for_gradient)


def _ask_for_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """DeepSpeed collects a block's gradients once that of its input is there.

    Where nobody needs that one (frozen embeddings), it would collect before there are any, and the block would not learn.
    """
    if not torch.is_grad_enabled() or any(isinstance(given, Tensor) and given.requires_grad for given in inputs):
        return None
    return inputs[0].detach().requires_grad_(), *inputs[1:]


def keep_torchs_linear(strategy: DeepSpeedStrategy, model: nn.Module) -> None:
    """Let ZeRO-3 leave ``F.linear`` as it is where torch would compile its replacement to a function without gradients.

    DeepSpeed's adds the bias in place inside an autograd function; torch before 2.13 makes zeros of the gradients of input,
    weight and bias, without a word (seen with 2.11.0). The price: dense layers hold their gathered weight until the backward.

    Args:
        strategy: before its engine is made.
        model: nothing happens where no part of it was given to ``torch.compile``. What is compiled later is not seen here.

    Raises:
        ConfigError: if DeepSpeed's config asks for the replacement.
    """
    if not strategy.zero_stage_3 or not _LOSES_GRADIENTS or not _is_compiled(model):
        return
    assert isinstance(strategy.config, dict), "Lightning has read it"
    zero = strategy.config["zero_optimization"]
    if zero.get("memory_efficient_linear"):
        raise ConfigError(
            f"memory_efficient_linear=True in DeepSpeed's config, and torch.compile: torch {torch.__version__} makes zeros of "
            "the gradients of dense layers with a bias. Leave the setting out, or use torch 2.13 or newer"
        )
    zero["memory_efficient_linear"] = False
    own = torchs_own_linear()
    if own is not None:
        F.linear = own  # an engine before this one has put its own in its place
    rank_zero_info(
        f"SLoPe: the model is compiled, so ZeRO-3 leaves F.linear as it is (memory_efficient_linear: false): torch "
        f"{torch.__version__} would make zeros of its gradients."
    )


def torchs_own_linear() -> Any:
    """What ``F.linear`` was before DeepSpeed replaced it in the whole process; None if it never did."""
    zero: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    return None if zero is None else getattr(zero.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)


def _is_compiled(model: nn.Module) -> bool:
    return getattr(model, "_compiler_ctx", None) is not None or any(
        isinstance(part, OptimizedModule) or part._compiled_call_impl is not None for part in model.modules()
    )


def sleeping_groups(layers: dict[str, SparseLinear], optimizer: Optimizer) -> dict[int, float]:
    """Make sleeping adapters members that ZeRO leaves alone.

    Args:
        layers: qualified name -> layer.
        optimizer: as ``configure_optimizers`` made it.

    Returns:
        index of each such group -> its decay once they wake.

    Raises:
        ScheduleError: if adapters share a group with other parameters, or weights are missing from the optimizer.
    """
    adapters = {
        id(parameter): f"{name}.{label}"
        for name, layer in layers.items()
        for label, parameter in layer.named_parameters(recurse=False)
        if label.startswith("adapter_")
    }
    asleep = {
        id(parameter)
        for layer in layers.values()
        if not layer.adapters_awake and layer.values.requires_grad
        for parameter in (layer.adapter_down, layer.adapter_up)
        if parameter is not None
    }
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        for label, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in held and (parameter.requires_grad or id(parameter) in asleep):
                raise ScheduleError(
                    f"{name}.{label} is in no optimizer and would never be trained. Give the optimizer all parameters of the "
                    "converted model, sleeping adapters included, in configure_optimizers."
                )
    groups = {}
    for index, group in enumerate(optimizer.param_groups):
        inside = [adapters[id(p)] for p in group["params"] if id(p) in adapters]
        if not inside:
            continue
        if len(inside) < len(group["params"]):
            raise ScheduleError(
                f"{inside[0]} shares group {index} of the optimizer with parameters that are no adapters. Under DeepSpeed "
                "adapters need a group of their own: put parameters with 'adapter_' in their name into one, in "
                "configure_optimizers."
            )
        if any(id(parameter) in asleep for parameter in group["params"]):
            groups[index] = float(group.get("weight_decay", 0.0))
        for parameter in group["params"]:
            if id(parameter) in asleep:
                parameter.requires_grad_(True)  # unused until they wake, and not frozen: ZeRO would forget them
    return groups


def restart_steps(optimizer: Any, group: int) -> int:
    """Let Adam's bias correction of a group begin anew.

    Args:
        optimizer: a ZeRO optimizer over a ``torch.optim`` one.
        group: index among its groups.

    Returns:
        how many states were reset; 0 where the group has had no step yet, or the optimizer counts none.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = inner.param_groups[group]["params"]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        flat = optimizer.fp32_partitioned_groups_flat
        parameters = [p for i, p in enumerate(flat) if optimizer.sub_group_to_group_id[i] == group]
    states = [inner.state[p] for p in parameters if "step" in inner.state.get(p, {})]
    for state in states:
        step = state["step"]
        state["step"] = torch.zeros_like(step) if isinstance(step, torch.Tensor) else 0
    return len(states)
