"""A gradual start from pretrained weights: entries that are to be pruned fade out, instead of vanishing at once.

In two stages, because a sparse layer has other parameters than a dense one, and an optimizer whose parameters change in
the midst of training is right for few optimizers and no checkpoint:

1. train the *dense* model with a :class:`FadeCallback`: masks are chosen once, and after every optimizer step the
   entries that they prune are multiplied down a straight line, to exactly zero. What remains is a dense model with a
   2:4 pattern.
2. train that model sparse, as any other: the two largest of four are now the two that are not zero, so the masks by
   magnitude are the faded ones, and the conversion loses nothing. :func:`sparsify_faded` and :class:`CheckFadedMasks`
   make sure of it.

A mask that decays to zero instead of being switched on: Kao, Yazdanbakhsh, Subramanian, Agrawal, Evci, Krishna,
"Training Recipe for N:M Structured Sparsity with Decaying Pruning Mask", arXiv 2209.07617; there the factor is part of
the forward pass, here it goes into the weights, so that any model and optimizer will do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from slope_pl.checkpoint import read_checkpoint
from slope_pl.config import SLoPeConfig, as_config, check_fraction, check_integer
from slope_pl.errors import CheckpointError, ConfigError, ConversionError, ScheduleError
from slope_pl.lightning.calibration import keeps_model_whole, training_norms
from slope_pl.lightning.callback import SLoPeCallback
from slope_pl.nn import SparseLinear, choose_layers, layer_seed, sparse_layers, sparsify
from slope_pl.sparsity import make_mask, pack_indices, unpack_mask


class FadeCallback(pl.Callback):
    """Stage 1: lets the entries of a dense model that are to be pruned fade to zero.

    Masks are chosen before step ``start_step``. Without its gradient, a pruned entry is its first value times
    ``1 - t / steps`` after ``t`` further steps; from ``t = steps`` on it is exactly 0 after every step. The fade's
    masks and place are part of checkpoints. Adam's moments of pruned entries go on; stage 2 begins with a fresh
    optimizer. Averaged weights lag behind and are not zero: start stage 2 from the live ones. Memory: one byte an entry
    of the chosen layers.

    To the loggers it writes ``slope/fade_factor``.

    Args:
        steps: optimizer steps from full to zero.
        config: which layers, and how their masks are chosen (``mask``, ``layer_masks``, ``mask_calibration_batches``,
            ``seed``, ``include``, ...). Nothing else of it is looked at.
        start_step: optimizer steps of plain dense training before the masks are chosen.
        fraction: share of all steps, instead of ``steps``, which it becomes at the start of training.

    Raises:
        ConfigError: for numbers out of range, or random masks.
        ScheduleError: at the start of training, if it ends before the fade does, the model is sparse, or the strategy
            shards it.
    """

    def __init__(
        self,
        steps: int | None = None,
        config: SLoPeConfig | None = None,
        start_step: int = 0,
        fraction: float | None = None,
    ) -> None:
        if (steps is None) == (fraction is None):
            raise ConfigError(f"steps={steps!r} and fraction={fraction!r}: give one of them")
        if steps is not None:
            check_integer("steps", steps, 1)
        if fraction is not None:
            check_fraction("fraction", fraction, "0.5 fades in the first half of the steps")
        check_integer("start_step", start_step, 0)
        self.steps, self.start_step, self.fraction = steps or 0, start_step, fraction
        self.config = as_config(config) or SLoPeConfig()
        if "random" in self.config.mask_kinds:
            raise ConfigError(
                "mask='random': a fade prepares masks by magnitude; choose mask='magnitude' or 'transposable'"
            )
        self.factor = 1.0
        self.began_at: int | None = None
        self._packed: dict[str, Tensor] = {}
        self._pruned: list[tuple[nn.Parameter, Tensor]] = []

    # ------------------------------------------------------------------------------------------------ the schedule

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the fade can be done; take up a restored one."""
        if sparse_layers(pl_module) or any(isinstance(c, SLoPeCallback) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise ScheduleError(
                "FadeCallback is for the dense stage before sparse training, but the model is sparse here: train it without "
                "SLoPeCallback (slope: null in a recipe), and sparse afterwards, from this stage's weights"
            )
        if not keeps_model_whole(trainer.strategy):
            raise ScheduleError(f"FadeCallback under {type(trainer.strategy).__name__}: use a single device or DDP")
        begin = self.start_step if self.began_at is None else self.began_at
        total = trainer.estimated_stepping_batches
        if self.fraction is not None:
            if not 0 < total < float("inf"):
                raise ScheduleError(
                    f"fraction={self.fraction} of an unknown number of steps: give steps, or a Trainer with max_steps"
                )
            self.steps = max(1, int(self.fraction * total))
        if 0 < total < begin + self.steps:
            raise ScheduleError(
                f"the fade begins at step {begin} and takes {self.steps} steps, but training ends after {int(total)}: pruned "
                "entries would not reach zero. Choose fewer steps, or train longer"
            )
        if self._packed:
            self._hold(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose the masks, once."""
        if not self._packed and trainer.global_step >= self.start_step:
            self._choose(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, before anybody validates or saves."""
        if self.began_at is None:
            return
        new = min(self.factor, max(0.0, 1 - (trainer.global_step - self.began_at) / self.steps))
        if new != self.factor:  # else a micro-batch without a step, or zero already
            for logger in trainer.loggers:
                logger.log_metrics({"slope/fade_factor": new}, step=trainer.global_step)
        if new != self.factor or not new:
            self._shrink(new / self.factor if new else 0.0)
        self.factor = new

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if training was stopped too early."""
        if self.factor:
            pl_module.print(
                f"SLoPe: training ended at step {trainer.global_step} with pruned entries at {self.factor:.0%} of their size; "
                "sparse training does not begin from here. Resume, until they are zero."
            )

    @torch.no_grad()
    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = {c.name: c.module for c in choose_layers(pl_module, self.config) if c.reason is None}
        if not layers:
            raise ConversionError(f"{type(pl_module).__name__} has no linear layer to make sparse")
        norms: dict[str, Tensor] = {}
        if self.config.mask_calibration_batches:
            norms, _ = training_norms(trainer, pl_module, self.config)
        for name, layer in layers.items():
            seed = layer_seed(self.config.seed, name)
            self._packed[name] = pack_indices(
                make_mask(self.config.for_layer(name).mask, _oriented(layer), seed, norms.get(name))
            )
        self.began_at = trainer.global_step
        self._hold(pl_module)
        rank_zero_info(
            f"SLoPe: step {self.began_at}: half of the weights of {len(layers)} layers fade out, to zero at step "
            f"{self.began_at + self.steps}."
        )

    def _hold(self, pl_module: pl.LightningModule) -> None:
        """Masks in the form that a step needs, on the weights' device."""
        modules = dict(pl_module.named_modules())
        self._pruned = []
        for name, packed in self._packed.items():
            layer = modules.get(name)
            weight = None if layer is None else _oriented(layer)
            if layer is None or weight is None or weight.shape != (packed.shape[0], packed.shape[1] * 8):
                own = "has no such layer" if weight is None else f"has it as {weight.shape[0]}x{weight.shape[1]}"
                raise CheckpointError(
                    f"the fade's checkpoint has a mask for layer {name!r}, {packed.shape[0]}x{packed.shape[1] * 8}; this "
                    f"model {own}"
                )
            pruned = ~unpack_mask(packed.to(weight.device))
            pruned = pruned if isinstance(layer, nn.Linear) else pruned.t().contiguous()
            self._pruned.append((layer.get_parameter("weight"), pruned))

    @torch.no_grad()
    def _shrink(self, ratio: float) -> None:
        for weight, pruned in self._pruned:
            if ratio:
                weight.copy_(torch.where(pruned, weight * ratio, weight))
            else:
                weight.masked_fill_(pruned, 0.0)  # not a product: 0 times a diverged entry is NaN

    # ------------------------------------------------------------------------------------------------ state

    def masks(self) -> dict[str, Tensor]:
        """Bool ``(d_out, d_in)`` by qualified name, True for kept weights; empty before they are chosen."""
        return {name: unpack_mask(packed) for name, packed in self._packed.items()}

    def state_dict(self) -> dict[str, Any]:
        """The masks, packed as those of sparse layers are, and where the fade is."""
        return {"masks": dict(self._packed), "began_at": self.began_at, "factor": self.factor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a saved fade."""
        self._packed = dict(state_dict["masks"])
        self.began_at, self.factor = state_dict["began_at"], state_dict["factor"]


class CheckFadedMasks(pl.Callback):
    """Stage 2, for modules that load their weights themselves: raises unless the model's masks are those of stage 1.

    Args:
        checkpoint: stage 1's, see :func:`faded_masks`. Qualified names in it must be those of this stage's module.

    Raises:
        ConversionError: at the start of training, see :func:`check_faded_masks`.
        CheckpointError: see :func:`faded_masks`.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After restore and conversion."""
        check_faded_masks(pl_module, faded_masks(self.checkpoint))


def faded_masks(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks that stage 1 has faded to, from its Lightning checkpoint (a file or its content).

    Returns:
        qualified name -> bool ``(d_out, d_in)``, True for kept weights.

    Raises:
        CheckpointError: if it is no checkpoint of a run with :class:`FadeCallback`, or its entries have not reached
            zero.
    """
    state = _content(checkpoint).get("callbacks", {}).get("FadeCallback")
    if state is None or not state["masks"]:
        raise CheckpointError(
            "the checkpoint has no masks of a FadeCallback: it is not of the first stage, or of its beginning"
        )
    if state["factor"]:
        raise CheckpointError(
            f"pruned entries are at {state['factor']:.0%} of their size in this checkpoint: go on with the first stage "
            "until they are zero"
        )
    return {name: unpack_mask(packed) for name, packed in state["masks"].items()}


def sparsify_faded(
    model: nn.Module, config: SLoPeConfig, checkpoint: str | Path | Mapping[str, Any]
) -> dict[str, SparseLinear]:
    """Stage 2: load stage 1's weights into a dense model and convert it; its masks are the faded ones.

    Args:
        model: dense, with stage 1's qualified names: the LightningModule, before ``fit``.
        config: of stage 2, with ``mask_calibration_batches=0``: the choice has been made.
        checkpoint: stage 1's Lightning checkpoint, a file or its content.

    Returns:
        qualified name -> layer, as :func:`slope_pl.sparsify`.

    Raises:
        ConfigError: if ``config`` would choose masks in another way than by magnitude.
        CheckpointError: see :func:`faded_masks`.
        ConversionError: see :func:`check_faded_masks` and :func:`slope_pl.sparsify`.
    """
    if "random" in config.mask_kinds or config.mask_calibration_batches:
        raise ConfigError(
            f"mask={config.mask!r}, layer_masks={config.layer_masks}, mask_calibration_batches="
            f"{config.mask_calibration_batches}: after a fade, masks are chosen by magnitude. Set mask='magnitude' (or "
            "'transposable', as in the first stage) and mask_calibration_batches=0"
        )
    content = _content(checkpoint)
    masks = faded_masks(content)
    model.load_state_dict(content["state_dict"])
    layers = sparsify(model, config)
    check_faded_masks(model, masks)
    return layers


def check_faded_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raise unless a sparse model has exactly these masks.

    Raises:
        ConversionError: naming the first layer that is missing, superfluous, or has another mask.
    """
    layers = sparse_layers(model)
    for what, names in (("not sparse here", set(masks) - set(layers)), ("not faded", set(layers) - set(masks))):
        if names:
            raise ConversionError(
                f"{len(names)} layers ({min(names)}, ...) are {what}: both stages need the same model and layer choice"
            )
    for name, layer in layers.items():
        mask, own = masks[name], layer.forward_mask().cpu()
        if mask.shape != own.shape or not torch.equal(mask.cpu(), own):
            differing = int((mask.cpu() != own).sum()) if mask.shape == own.shape else "all"
            raise ConversionError(
                f"layer {name!r} has another mask than it was faded to ({differing} entries differ): the weights are not those "
                "of the first stage's end, the mask kind is another, or kept weights are exactly 0"
            )


def _oriented(layer: nn.Module) -> Tensor:
    """The weight as ``(d_out, d_in)``; a Hugging Face ``Conv1D`` stores its transpose."""
    weight = layer.get_parameter("weight").detach()
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _content(checkpoint: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(checkpoint, Mapping):
        return checkpoint
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path} is not there: the checkpoint of the first stage is expected")
    return read_checkpoint(path, optimizer=False)
