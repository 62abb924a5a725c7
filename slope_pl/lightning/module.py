"""SLoPeLightningModule: a LightningModule that is sparse by construction."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from slope_pl.checkpoint.convert import checkpoint_kind
from slope_pl.checkpoint.mark import CHECKPOINT_KEY
from slope_pl.config import SLoPeConfig, as_config
from slope_pl.errors import CheckpointError
from slope_pl.lightning.calibration import convert
from slope_pl.lightning.callback import SLoPeCallback
from slope_pl.lightning.checks import strip_classes
from slope_pl.lightning.deepspeed import build_whole, gather_by_blocks
from slope_pl.lightning.restore import check_content, check_layers, check_tensors, explain, why_unreadable
from slope_pl.lightning.restoring import record_optimizers
from slope_pl.lightning.rng import KeepRandomState, keeps_random_state
from slope_pl.lightning.saving import save_folders_whole
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
        if self._trainer is not None:
            gather_by_blocks(self, self.trainer.strategy)

    def configure_callbacks(self) -> list[pl.Callback]:
        """A :class:`SLoPeCallback` for this module's config, unless the Trainer has one; a dense run resumes as exactly."""
        build_whole(self.trainer.strategy)
        save_folders_whole(self.trainer.strategy)
        given = super().configure_callbacks()
        callbacks = [given] if isinstance(given, pl.Callback) else list(given)
        present = any(isinstance(callback, SLoPeCallback) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        if self.slope_config is not None and not present:
            callbacks.insert(0, SLoPeCallback(self.slope_config))
        if self.slope_config is None and not keeps_random_state(self.trainer.callbacks):  # type: ignore[attr-defined]
            callbacks.append(KeepRandomState())
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
        check_content(checkpoint, whole=self._trainer is None)
        mark = checkpoint.get(CHECKPOINT_KEY)
        if mark is not None and not sparse_layers(self):
            raise CheckpointError(
                f"the checkpoint is of a 2:4 sparse model ({len(mark['layers'])} sparse layers), but this model is dense: "
                "use the sparse configuration (slope=SLoPeConfig(...)), or export the checkpoint to dense weights first"
            )
        check_layers(self, checkpoint)
        check_tensors(self, checkpoint.get("state_dict") or {}, self.strict_loading)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in the base class, which reads a file without a look at its checksums.

        Raises:
            CheckpointError: if the file is damaged, no checkpoint, or one of another model; or a folder, which
                :func:`slope_pl.checkpoint.load_module` reads.
        """
        if isinstance(checkpoint_path, str | Path):
            if Path(checkpoint_path).is_dir():
                kind = checkpoint_kind(checkpoint_path)
                raise CheckpointError(
                    f"{checkpoint_path} is a folder ({kind}), one file is expected: slope_pl.checkpoint.load_module("
                    f"{cls.__name__}, ...) reads it"
                )
            reason = why_unreadable(checkpoint_path)
            if reason is not None:
                raise CheckpointError(reason)
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(checkpoint_path, str | Path):
                explain(checkpoint_path, error)
            raise
