"""When a Trainer chooses masks by activation norms (``mask_calibration_batches`` of the config).

The layers have to be sparse in ``setup`` and ``configure_model``, where a checkpoint is about to be restored into them,
averages copy the model and optimizers are made; but there the Trainer does not say yet whether a checkpoint will come,
and the model may not be on its device. So the conversion happens in two steps. In ``setup``, masks by magnitude hold
the place, and the dense layers are put aside. In ``on_fit_start``, after the restore, they either are gone, because
weights and masks have come with the checkpoint, or compute once more: they take their places back, run some batches,
and the final masks and values are loaded into the sparse layers, in place. A model that is evaluated before it is
trained has the provisional masks.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from slope_pl.config import SLoPeConfig
from slope_pl.errors import ScheduleError
from slope_pl.nn import SparseLinear, activation_norms, choose_layers, layer_seed, sparse_layers, sparsify
from slope_pl.nn.surgery import replace_module

_ASIDE = "_slope_dense_layers"


class DenseLayers(dict[str, nn.Module]):
    """The dense layers that a model had, by qualified name, until its masks are chosen.

    A copy of the model gets none of them: who averages or pickles a model has no use for them.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "DenseLayers":
        return DenseLayers()

    def __reduce__(self) -> Any:
        return DenseLayers, ()


def convert(module: pl.LightningModule, config: SLoPeConfig) -> dict[str, SparseLinear]:
    """Make a LightningModule sparse: provisionally, until :func:`calibrate_masks`, where masks are to be calibrated.

    Raises:
        ConversionError: see :func:`slope_pl.sparsify`.
    """
    if not config.mask_calibration_batches or sparse_layers(module):
        return sparsify(module, config)
    dense = DenseLayers((c.name, c.module) for c in choose_layers(module, config) if c.reason is None)
    layers = sparsify(module, config, masks_follow=True)
    if module._trainer is not None and not keeps_model_whole(module.trainer.strategy):
        dense = DenseLayers(
            (name, nn.Identity()) for name in dense
        )  # a mark that masks are missing, without the memory
    setattr(module, _ASIDE, dense)
    # A state dict brings masks: the Trainer's restore, load_from_checkpoint, and whoever loads one by hand.
    module.register_load_state_dict_post_hook(_masks_were_loaded)
    return layers


def masks_are_provisional(module: nn.Module) -> bool:
    """Whether the model's masks are to be calibrated and have not been yet."""
    return bool(module.__dict__.get(_ASIDE))


def drop_dense_layers(module: nn.Module) -> None:
    """Weights and masks have come from a checkpoint: nothing is left to be chosen."""
    module.__dict__.pop(_ASIDE, None)


def refuse_provisional_masks(trainer: pl.Trainer, module: nn.Module, config: SLoPeConfig) -> None:
    """Raise if training is about to begin with masks that were to be calibrated: under a strategy that shards the model."""
    if masks_are_provisional(module):
        raise ScheduleError(
            f"mask_calibration_batches={config.mask_calibration_batches} under {type(trainer.strategy).__name__}: the whole "
            "dense model has to run on a device, and this strategy shards it. Calibrate before fit, with sparsify(model, "
            "config, norms=activation_norms(model, config, batches)), or resume from a checkpoint of a run with "
            "strategy='auto' or 'ddp'"
        )


def calibrate_masks(trainer: pl.Trainer, module: pl.LightningModule, config: SLoPeConfig) -> None:
    """Choose the final masks of a model that :func:`convert` made sparse provisionally; else nothing happens.

    To be called between the restore of a checkpoint and the first step. Values, masks and backward columns change in
    place, in the model and in the copies that averaging callbacks have made; all ranks end with those of rank 0. Under
    a strategy that shards the model nothing happens either: see :func:`refuse_provisional_masks`.

    Raises:
        ScheduleError: see :func:`training_norms`.
        ConversionError: see :func:`slope_pl.nn.activation_norms`.
    """
    dense: DenseLayers | None = module.__dict__.get(_ASIDE)
    if not dense or not keeps_model_whole(trainer.strategy):
        return
    live = sparse_layers(module)
    with _in_place(module, dense, live):
        norms, seen = training_norms(trainer, module, config)
    models = [live, *(sparse_layers(average) for average in _averages(trainer))]
    changed = 0.0
    for name, old in dense.items():
        provisional = live[name].forward_mask()
        seed = layer_seed(config.seed, name)
        final = SparseLinear.from_linear(old, config.for_layer(name), seed, norms[name]).state_dict()
        if dist.is_available() and dist.is_initialized():
            # Ranks may have begun with different weights: DDP has aligned the sparse layers, not those put aside.
            for tensor in final.values():
                dist.broadcast(tensor, 0)
        for layers in models:
            layers[name].load_state_dict(final)
        # Each entry that is in only one of the two masks has a partner that is only in the other.
        changed += float((live[name].forward_mask() != provisional).float().mean()) / len(dense)
    drop_dense_layers(module)
    rank_zero_info(
        f"SLoPe: masks were chosen by magnitude times activation norm over {seen} batches: {changed:.1%} of the kept "
        "weights are others than by magnitude alone."
    )


def training_norms(
    trainer: pl.Trainer, module: pl.LightningModule, config: SLoPeConfig
) -> tuple[dict[str, Tensor], int]:
    """Activation norms of a dense model over the first ``mask_calibration_batches`` batches of its training data.

    Each rank runs as many, of a data loader made for this purpose, so that the Trainer's own begins at its beginning;
    the global random state is left alone. Of a loader that was given to ``fit`` as an object, its own generator moves
    on. A batch is run by the module's ``calibration_step(batch)`` if it has one, else by its ``forward(batch)``;
    padding is taken from the batch's ``attention_mask`` if it has one.

    Returns:
        what :func:`slope_pl.nn.activation_norms` returns, and the number of batches that this rank has seen.

    Raises:
        ScheduleError: if ``forward`` does not take a batch.
        ConversionError: see :func:`slope_pl.nn.activation_norms`.
    """
    precision, seen = trainer.precision_plugin, 0

    def batches() -> Iterator[Any]:
        nonlocal seen
        loader = CombinedLoader(trainer.fit_loop._data_source.dataloader(), "max_size_cycle")
        for batch, _, _ in itertools.islice(iter(loader), config.mask_calibration_batches):
            seen += 1
            batch = module._on_before_batch_transfer(precision.convert_input(batch), dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch)

    def forward(batch: Any) -> object:
        step = getattr(module, "calibration_step", module)
        try:
            with precision.forward_context():
                return step(batch)
        except TypeError as error:
            raise ScheduleError(
                f"mask calibration runs {type(module).__name__}'s forward(batch), which failed: {error}. Give the module a "
                "method calibration_step(batch) that runs its net on a training batch"
            ) from error

    with isolate_rng():
        norms = activation_norms(module, config, batches(), forward)
    return norms, seen


def keeps_model_whole(strategy: Any) -> bool:
    """Whether every rank has the whole model, as on a single device and under DDP."""
    # DeepSpeedStrategy is a DDPStrategy by inheritance, but shards.
    return isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)


def _masks_were_loaded(module: nn.Module, keys: Any) -> None:
    drop_dense_layers(module)


@contextmanager
def _in_place(module: nn.Module, dense: DenseLayers, live: dict[str, SparseLinear]) -> Iterator[None]:
    """The dense layers in the places of the sparse ones, on their device and in their dtype."""
    own = {id(layer): dense[name] for name, layer in live.items()}
    places = [(name, found) for name, found in module.named_modules(remove_duplicate=False) if id(found) in own]
    for name, layer in live.items():
        dense[name].to(device=layer.values.device, dtype=layer.values.dtype)
    try:
        for name, layer in places:
            replace_module(module, name, own[id(layer)])
        yield
    finally:
        for name, layer in places:
            replace_module(module, name, layer)


def _averages(trainer: pl.Trainer) -> list[nn.Module]:
    found = [c._average_model for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    return [average.module for average in found if average is not None]
