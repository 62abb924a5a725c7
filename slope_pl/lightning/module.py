"""SLoPeLightningModule: a LightningModule that is sparse by construction."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from slope_pl.checkpoint.mark import CHECKPOINT_KEY, check_format
from slope_pl.config import SLoPeConfig, as_config
from slope_pl.errors import CheckpointError
from slope_pl.lightning.calibration import convert
from slope_pl.lightning.callback import SLoPeCallback
from slope_pl.lightning.checks import strip_classes
from slope_pl.lightning.restoring import record_optimizers
from slope_pl.lightning.sharding import shard
from slope_pl.nn import sparse_layers, was_densified


class SLoPeLightningModule(pl.LightningModule):
    """Base class, or mixin before another LightningModule, that converts itself in ``configure_model``.

    Converting there makes ``load_from_checkpoint``, ``validate`` and ``predict`` work on sparse checkpoints. A
    :class:`SLoPeCallback` is added to the Trainer unless there is one. With ``slope=None`` the module stays dense: the
    dense sibling of a sparse recipe is the same class.

    A subclass that builds its net in ``configure_model`` builds it first and then calls ``super().configure_model()``. Under a
    ``ModelParallelStrategy`` (``slope_fsdp2``) the net is sharded there too, dense or sparse, block by block, unless the
    subclass has done so.

    Args:
        *args: passed on, for use as a mixin.
        slope: a :class:`SLoPeConfig`, a mapping of its fields (as in a checkpoint), or None for a dense model.
        **kwargs: passed on, for use as a mixin.
    """

    def __init__(self, *args: Any, slope: SLoPeConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slope_config = as_config(slope)

    def configure_model(self) -> None:
        """Make the model sparse; Lightning calls this before every stage, only the first call finds work."""
        super().configure_model()
        if self.slope_config is not None and not was_densified(self):
            convert(self, self.slope_config)
        if self.device_mesh is not None:  # ModelParallelStrategy: FSDP2 shards here, after the conversion
            shard(self, self.device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[pl.Callback]:
        """A :class:`SLoPeCallback` for this module's config, unless the Trainer has one."""
        given = super().configure_callbacks()
        callbacks = [given] if isinstance(given, pl.Callback) else list(given)
        present = any(isinstance(callback, SLoPeCallback) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        if self.slope_config is not None and not present:
            callbacks.insert(0, SLoPeCallback(self.slope_config))
        return callbacks

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the hyperparameters free of classes, so that the file loads with ``weights_only=True``; name parameters."""
        super().on_save_checkpoint(checkpoint)
        if self._trainer is not None:
            record_optimizers(self.trainer, self, checkpoint)
        strip_classes(checkpoint, self.CHECKPOINT_HYPER_PARAMS_KEY)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, or of the other kind, dense or sparse, before any of it is read."""
        super().on_load_checkpoint(checkpoint)
        saved, own = checkpoint.get("state_dict", {}), self.state_dict()
        if saved and saved.keys().isdisjoint(own.keys()):  # a sharded checkpoint has its tensors in files of their own
            raise CheckpointError(
                f"the checkpoint is of another model: none of its {len(saved)} tensors ({next(iter(saved))}, ...) "
                f"is one of this {type(self).__name__}'s {len(own)} ({next(iter(own), 'none')}, ...)"
            )
        mark = checkpoint.get(CHECKPOINT_KEY)
        if mark is None:
            return
        check_format(mark)
        if not sparse_layers(self):
            raise CheckpointError(
                f"the checkpoint is of a 2:4 sparse model ({len(mark['layers'])} sparse layers), but this model is dense: "
                "use the sparse configuration (slope=SLoPeConfig(...)), or export the checkpoint to dense weights first"
            )
