"""A checkpoint is looked at before any of it goes into a run: is the file whole, and does it belong to this model?"""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from slope_pl.checkpoint.convert import is_checkpoint, read_rest
from slope_pl.checkpoint.mark import CHECKPOINT_KEY, check_format
from slope_pl.checkpoint.whole import damage
from slope_pl.config import SLoPeConfig
from slope_pl.errors import CheckpointError
from slope_pl.lightning.checkpoint_io import LocalCheckpointIO
from slope_pl.lightning.checks import check_config
from slope_pl.nn import sparse_layers

_SHOWN = 3
_OF_A_RUN = ("optimizer_states", "lr_schedulers", "loops", "callbacks")


class RestoreGuard:
    """Lets the strategy of a trainer refuse, on all ranks, a checkpoint that is damaged or of another model.

    Its ``load_checkpoint`` is what Lightning reads a file with before it restores anything; the instance gets a wrapped one.

    Args:
        trainer: whose strategy it is.
        module: of this run.
        config: likewise.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, config: SLoPeConfig) -> None:
        self._trainer, self._module, self._config = trainer, module, config
        self._optimizers: int | None = None
        self._read = trainer.strategy.load_checkpoint  # that of the class, or of resume_from_any, which begins anew
        trainer.strategy.load_checkpoint = self._load  # type: ignore[method-assign]

    def _load(self, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        strategy, module = self._trainer.strategy, self._module
        # Rank 0 alone reads the file twice.
        reason = strategy.broadcast(self._look(checkpoint_path) if strategy.is_global_zero else None)
        if reason is not None:
            raise CheckpointError(reason)
        checkpoint = self._read(checkpoint_path, *args, **kwargs)
        # FSDP2 and DeepSpeed take tensors and optimizers out themselves, or have them in files of their own.
        whole = Path(checkpoint_path).is_file() and not isinstance(strategy, ModelParallelStrategy | DeepSpeedStrategy)
        check_content(checkpoint, whole)
        if whole and self._trainer.state.fn == TrainerFn.FITTING:
            check_resumable(checkpoint)
            self._optimizers = len(checkpoint["optimizer_states"])
        if CHECKPOINT_KEY in checkpoint:
            check_config(checkpoint[CHECKPOINT_KEY], self._config)
        if not _changes_checkpoints(module):
            check_layers(module, checkpoint)
            check_tensors(module, checkpoint.get("state_dict") or {}, module.strict_loading)
        return checkpoint

    def _look(self, path: str | Path) -> str | None:
        """:meth:`_why_not`, whatever happens: the other ranks wait for the answer."""
        try:
            return self._why_not(path)
        except Exception as error:
            return f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged, or access to it is missing"

    def _why_not(self, path: str | Path) -> str | None:
        """Why a checkpoint is not to be read, or None."""
        strategy, fitting = self._trainer.strategy, self._trainer.state.fn == TrainerFn.FITTING
        reason = why_unreadable(path, strategy)
        if reason is None and fitting and Path(path).is_dir() and is_checkpoint(path):
            try:
                check_resumable(read_rest(path), sharded=True)
            except CheckpointError as error:
                return f"{path}: {error}"
        if reason is not None or not (isinstance(strategy, ModelParallelStrategy) and Path(path).is_file()):
            return reason
        # FSDP2 copies the tensors of one file into the model as it reads them: names and shapes are looked at before.
        try:
            content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
        except pickle.UnpicklingError:  # classes among the hyperparameters: whether to trust them, Lightning is told
            return None
        try:
            check_content(content, whole=True)
            if fitting:
                check_resumable(content)
            if not _changes_checkpoints(self._module):
                check_tensors(self._module, content["state_dict"], self._module.strict_loading)
        except CheckpointError as error:
            return str(error)
        return None

    def check_optimizers(self) -> None:
        """Raise a CheckpointError unless the restored optimizers are of this run's kind: at the start of training."""
        own = self._trainer.optimizers
        if self._optimizers not in (None, len(own)):
            raise CheckpointError(
                f"the checkpoint is of a run with {self._optimizers} optimizers, this one has {len(own)}: it is damaged, or of "
                "another model"
            )
        check_moments(own)


def why_unreadable(path: str | Path, strategy: Any = None) -> str | None:
    """Why a checkpoint cannot be read, or None; of files on other machines (``s3://...``) nothing is known.

    Args:
        path: of a file, or a sharded checkpoint's folder.
        strategy: that reads it; None reads files alone.
    """
    place = Path(path)
    if not is_checkpoint(place) or place.suffix == ".safetensors":  # which the reader itself says
        return None
    looks_itself = strategy is not None and isinstance(strategy.checkpoint_io, LocalCheckpointIO)
    if looks_itself and place.is_file() and not isinstance(strategy, ModelParallelStrategy | DeepSpeedStrategy):
        return None
    reason = damage(place)
    if reason is None:
        return None
    return (
        f"{path} is damaged or no checkpoint: {reason}. Resume from an earlier one: "
        "slope_pl.lightning.last_good_checkpoint(folder) finds the newest that is whole"
    )


def explain(path: str | Path, error: Exception) -> None:
    """Raise a CheckpointError if the reason why a file could not be loaded is that it holds no checkpoint."""
    if not Path(path).is_file():
        return
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # of which the first error said more
        return
    try:
        check_content(content, whole=True)
    except CheckpointError as reason:
        raise reason from error


def check_content(checkpoint: Any, whole: bool) -> None:
    """Raise a CheckpointError unless a file's content is a checkpoint of Lightning, and our mark in it what we write.

    Args:
        checkpoint: what was read.
        whole: whether its tensors have to be in it.
    """
    if not isinstance(checkpoint, Mapping) or "pytorch-lightning_version" not in checkpoint:
        has = f"with {', '.join(map(str, list(checkpoint)[:_SHOWN]))}" if isinstance(checkpoint, Mapping) else ""
        raise CheckpointError(
            f"the file is no checkpoint of a Trainer: it holds a {type(checkpoint).__name__} {has}".rstrip()
            + ". Weights alone are read by model.load_state_dict, before or after sparsify as they were saved"
        )
    state = checkpoint.get("state_dict", None if whole else {})
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"the checkpoint's state_dict is a {type(state).__name__}, a mapping of tensors is expected"
        )
    mark = checkpoint.get(CHECKPOINT_KEY)
    if mark is not None:
        check_mark(mark)


def check_resumable(checkpoint: Mapping[str, Any], sharded: bool = False) -> None:
    """Raise a CheckpointError unless training can go on from a checkpoint: from weights alone it would begin at step 0.

    Args:
        checkpoint: what Lightning saved.
        sharded: whether its tensors, and so the optimizer's states, are elsewhere.
    """
    wanted = ("lr_schedulers", "loops", "callbacks") if sharded else _OF_A_RUN
    lost = [key for key in wanted if key not in checkpoint]
    if lost:
        raise CheckpointError(
            f"the checkpoint has no {', '.join(lost)}: it holds weights alone (save_weights_only=True), or is damaged. "
            "Training cannot go on from it; load its weights into the module and train anew"
        )
    states = checkpoint["callbacks"]
    if CHECKPOINT_KEY in checkpoint and not any("resetups" in state for state in states.values() if state):
        raise CheckpointError(
            "the checkpoint has no state of SLoPeCallback among its callbacks: where its schedule was is lost, it is damaged"
        )


def check_layers(module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Raise a CheckpointError unless the layers that were sparse are sparse here, and no others; and it is so marked at all."""
    mark, own = checkpoint.get(CHECKPOINT_KEY), set(sparse_layers(module))
    if mark is None or not own:
        return
    saved = set(mark["layers"])
    if saved != own:
        raise CheckpointError(
            f"layers that are sparse in the checkpoint and not here: {_some(sorted(saved - own))}; here and not in the "
            f"checkpoint: {_some(sorted(own - saved))}. Resume with the model and the choice of layers it was made with"
        )


def check_mark(mark: Any) -> None:
    """Raise a CheckpointError unless what SLoPeCallback wrote into a checkpoint is whole, and of a format that is known."""
    wanted = {"format": int, "version": str, "config": Mapping, "layers": list}
    for key, kind in wanted.items():
        if not isinstance(mark, Mapping) or not isinstance(mark.get(key), kind):
            found = f"a {type(mark).__name__}" if not isinstance(mark, Mapping) else f"{key}={mark.get(key)!r}"
            raise CheckpointError(
                f"the checkpoint's {CHECKPOINT_KEY!r} has {found}, expected {', '.join(wanted)} as SLoPeCallback writes them: "
                "it is damaged"
            )
    check_format(dict(mark))


def check_tensors(module: pl.LightningModule, saved: Mapping[str, Any], strict: bool) -> None:
    """Raise unless a checkpoint's tensors are a module's, before any is copied.

    Args:
        module: converted already.
        saved: the checkpoint's; empty for a sharded one, which has its tensors in files of their own.
        strict: whether names have to agree.

    Raises:
        CheckpointError: naming tensors that are missing, superfluous or of another shape.
    """
    if not saved:
        return
    own = module.state_dict(keep_vars=True)
    if saved.keys().isdisjoint(own.keys()):
        raise CheckpointError(
            f"the checkpoint is of another model: none of its {len(saved)} tensors ({next(iter(saved))}, ...) "
            f"is one of this {type(module).__name__}'s {len(own)} ({next(iter(own), 'none')}, ...)"
        )
    missing, extra = (sorted(a.keys() - b.keys()) for a, b in ((own, saved), (saved, own)))
    dense = [name for name in missing if name.endswith(".values") and name.removesuffix("values") + "weight" in saved]
    if dense or not strict:  # the layer says more of the first, and nobody asks in the second case
        missing = extra = []
    if missing or extra:
        raise CheckpointError(
            f"the checkpoint lacks {_some(missing)} of this {type(module).__name__}'s tensors and has {_some(extra)} that it "
            "does not know: it is damaged, or of another model or configuration"
        )
    for name, tensor in saved.items():
        if not isinstance(tensor, Tensor) or not isinstance(own.get(name), Tensor) or hasattr(own[name], "ds_id"):
            continue  # of ZeRO-3's, a part alone is here
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)} in the checkpoint and {tuple(own[name].shape)} in this "
                f"{type(module).__name__}: it is damaged, or of another model or configuration"
            )


def check_counters(state: Any, counters: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Raise a CheckpointError unless a callback's saved state has integers of at least 0; None where that is optional."""
    for name in (*counters, *optional):
        value = state.get(name, "missing") if isinstance(state, Mapping) else state
        if value is None and name in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(
                f"the checkpoint's schedule has {name}={value!r}, an integer of at least 0 is expected: it is damaged"
            )


def check_phase(module: pl.LightningModule, woke_at_step: int | None) -> None:
    """Raise unless all adapters of a model are in the phase that the schedule is in.

    Raises:
        CheckpointError: if some are awake and others asleep, or the schedule counts them as awake while they sleep.
    """
    phases = {name: layer.adapters_awake for name, layer in sparse_layers(module).items() if layer.adapter_rank}
    asleep = [name for name, awake in phases.items() if not awake]
    if asleep and (woke_at_step is not None or len(asleep) < len(phases)):
        when = (
            "others are awake" if woke_at_step is None else f"the schedule says that they woke at step {woke_at_step}"
        )
        raise CheckpointError(
            f"the adapters of {_some(asleep)} layers are asleep, but {when}: the checkpoint is damaged. Resume from another "
            "one, or wake them all with slope_pl.wake_adapters(model)"
        )


def check_moments(optimizers: Iterable[Any]) -> None:
    """Raise a CheckpointError unless the optimizers' restored moments have the shapes of their parameters."""
    for optimizer in optimizers:
        for parameter, state in getattr(optimizer, "state", {}).items():
            for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                moment = state.get(name) if isinstance(parameter, Tensor) else None
                if isinstance(moment, torch.Tensor) and moment.shape != parameter.shape:
                    raise CheckpointError(
                        f"the optimizer's {name} of a parameter {tuple(parameter.shape)} has shape {tuple(moment.shape)}: the "
                        "checkpoint's optimizer state is damaged, or of another model"
                    )


def _changes_checkpoints(module: pl.LightningModule) -> bool:
    """Whether a module has a hook of its own, which may still change what is in a checkpoint."""
    return not type(module).on_load_checkpoint.__module__.startswith(("lightning.", "slope_pl."))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} ({shown})" if names else "none"
