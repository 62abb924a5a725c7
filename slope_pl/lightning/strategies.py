"""SLoPeStrategy: sparse training by the name of a strategy. The behaviour itself lives in callback and module."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)

from slope_pl.config import SLoPeConfig, as_config
from slope_pl.errors import ConfigError
from slope_pl.lightning.callback import SLoPeCallback
from slope_pl.lightning.module import SLoPeLightningModule

# Of each config for DeepSpeed one at least.
_OF_DEEPSPEED = {"zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "optimizer", "fp16", "bf16"}


class SLoPeStrategy:
    """Mixin over Lightning's strategies: puts a :class:`SLoPeCallback` first among the callbacks if there is none.

    A mixin with static subclasses, not a wrapper: Lightning decides by ``isinstance`` what a strategy can do.

    Args:
        *args: of the strategy.
        config: for the callback; a mapping of the config's fields is taken as well. Leave it out where the Trainer has a
            callback, or the module a ``slope_config``, of its own.
        **kwargs: of the strategy.

    Raises:
        ConfigError: when training begins, if the callback that is there has another config, or a
            :class:`SLoPeLightningModule` says that it is dense.
    """

    def __init__(self, *args: Any, config: SLoPeConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slope_config = as_config(config)

    def connect(self, model: pl.LightningModule) -> None:
        """Add the callback; runs before ``Callback.setup``."""
        super().connect(model)  # type: ignore[misc]
        callbacks: list[pl.Callback] = model.trainer.callbacks  # type: ignore[attr-defined]
        present = next((callback for callback in callbacks if isinstance(callback, SLoPeCallback)), None)
        dense = isinstance(model, SLoPeLightningModule) and model.slope_config is None
        if dense and present is None and self.slope_config is None:
            raise ConfigError(
                f"{type(model).__name__} is dense (slope=None), and {type(self).__name__} trains sparse: give the module "
                "slope=SLoPeConfig(...), or use Lightning's own strategy (ddp, deepspeed_stage_2, ModelParallelStrategy)"
            )
        if present is None:
            # First: callbacks that copy the model in their setup must see the converted layers.
            callbacks.insert(0, SLoPeCallback(self.slope_config))
        elif self.slope_config is not None:
            if present.config is None:
                present.config = self.slope_config
            elif present.config != self.slope_config:
                raise ConfigError(
                    f"the strategy's config {self.slope_config} and the callback's {present.config} differ; set one of them"
                )


class SLoPeSingleDeviceStrategy(SLoPeStrategy, SingleDeviceStrategy):
    """Sparse training on one device, registered as ``slope``."""

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        *args: Any,
        config: SLoPeConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self._devices: list[torch.device] | None = None if device is None else [torch.device(device)]
        super().__init__("cpu" if device is None else device, *args, config=config, **kwargs)

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The Trainer's devices. Lightning fills them in here, since a registered name carries no device."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise ConfigError(
                f"strategy='slope' drives one device, but devices={len(devices)}: use strategy='slope_ddp'"
            )
        self._devices = devices

    @property
    def root_device(self) -> torch.device:
        """The Trainer's device; Lightning's own registered ``single_device`` would stay on the CPU."""
        return self._devices[0] if self._devices else self._root_device


class SLoPeDDPStrategy(SLoPeStrategy, DDPStrategy):
    """Sparse training on many devices, registered as ``slope_ddp``; gradients of kept values are half as large."""

    def configure_ddp(self) -> None:
        """Wrap the model; one process alone trains it bare, without a reducer."""
        if self.world_size > 1:
            super().configure_ddp()


class SLoPeModelParallelStrategy(SLoPeStrategy, ModelParallelStrategy):
    """Sparse training with FSDP2, registered as ``slope_fsdp2``: kept values, gradients and optimizer state are sharded.

    Takes a :class:`SLoPeLightningModule`, which shards itself, or a module whose ``configure_model`` calls ``sparsify`` and
    then ``fully_shard``.
    """

    def __init__(
        self, *args: Any, data_parallel_size: int | str = "auto", tensor_parallel_size: int | str = 1, **kwargs: Any
    ) -> None:
        super().__init__(
            *args, data_parallel_size=data_parallel_size, tensor_parallel_size=tensor_parallel_size, **kwargs
        )

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Build on the rank's own device, as every other strategy does: Lightning's is the CPU, where masks take minutes.

        A model too large for that is built under ``torch.device("cpu")`` in ``configure_model``, which wins over this.
        """
        with nullcontext() if empty_init else self.root_device, super().tensor_init_context(empty_init):
            yield

    def setup_environment(self) -> None:
        """All processes are one data-parallel group; Lightning's own "auto" would be the number of nodes."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class SLoPeDeepSpeedStrategy(SLoPeStrategy, DeepSpeedStrategy):
    """Sparse training with ZeRO, registered as ``slope_deepspeed_stage_1``, ``_2``, ``_3``.

    The module's ``configure_optimizers`` puts adapters (parameters with ``adapter_`` in their name) into groups of their own;
    what decay these have takes effect when the adapters wake.

    Args:
        *args: of the strategy.
        config: of the sparse method, as under the other strategies.
        deepspeed_config: DeepSpeed's own, a mapping or the path of a JSON file, in place of the settings that Lightning makes
            one of (``stage``, ``offload_optimizer`` and so on). Lightning's strategy calls it ``config``.
        **kwargs: of the strategy.

    Raises:
        ConfigError: if DeepSpeed's config is given as ``config``.
    """

    def __init__(
        self,
        *args: Any,
        config: SLoPeConfig | None = None,
        deepspeed_config: dict[str, Any] | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(config, str | Path) or (isinstance(config, Mapping) and _OF_DEEPSPEED & config.keys()):
            raise ConfigError(
                f"config={config!r} is DeepSpeed's: give it as deepspeed_config. config is that of the sparse method "
                "(SLoPeConfig), as under the other strategies"
            )
        super().__init__(*args, config=config, **kwargs)
        if deepspeed_config is not None:
            self.config = self._load_config(deepspeed_config)


def register(name: str, strategy: type[Any], **settings: Any) -> None:
    """Make a strategy known to ``Trainer(strategy=name)``."""
    StrategyRegistry.register(name, strategy, description=strategy.__doc__ or "", override=True, **settings)


register("slope", SLoPeSingleDeviceStrategy)
register("slope_ddp", SLoPeDDPStrategy)
register("slope_fsdp2", SLoPeModelParallelStrategy)
for _stage in (1, 2, 3):
    register(f"slope_deepspeed_stage_{_stage}", SLoPeDeepSpeedStrategy, stage=_stage)
