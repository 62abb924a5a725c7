"""FST, the baseline of SLoPe's speed tables (Hu et al., arXiv 2404.01847)."""

import zlib
from typing import Any, ClassVar

import lightning.pytorch as pl

from slope_pl.baselines.callback import BaselineCallback
from slope_pl.baselines.config import FSTConfig
from slope_pl.baselines.schedule import start_of_the_last, total_steps


class FSTCallback(BaselineCallback[FSTConfig]):
    """Trains a model by FST; plugs into any Trainer as :class:`slope_pl.SLoPeCallback` does.

    Feed-forward layers multiply with ``mask * W``, the mask being 2:4 along rows and columns of every 4x4 tile and chosen
    anew every 40 optimizer steps, so that the input gradient is exact; the weight gradient's product prunes the output
    gradient at random, unbiased (MVUE), and passes straight through to all of the dense W, plus ``decay (1 - mask) W``. For
    the last sixth of the steps the mask is dropped and training is dense. A simulation: everything is dense, no speed-up is
    claimed. The mask search is exact where FST's convolution is; the two agree but for ties.

    The decay is added **after** clipping, as in the published training code; with manual optimization right before the
    optimizer steps. Under ``bf16-true`` the sum is rounded to bfloat16, which swallows a decay much smaller than the
    gradient: train with ``bf16-mixed``.

    It logs ``fst/flip_rate`` and ``fst/dense``.

    Args:
        config: what to do; a mapping of the config's fields is taken as well.

    Raises:
        ConfigError: for an unknown or wrong setting.
        ConversionError: in ``setup``, see :func:`slope_pl.baselines.mask_layers`.
        ScheduleError: at the start of training, if the number of steps is unknown and ``dense_finish_step`` is not set, or
            weights are missing from the optimizers.
        CheckpointError: if a run resumes from another method's checkpoint, or with other layers.
    """

    title: ClassVar[str] = "FST"
    prefix: ClassVar[str] = "fst"
    config_class = FSTConfig
    decay_after_clipping: ClassVar[bool] = True

    def __init__(self, config: FSTConfig | None = None) -> None:
        super().__init__(config)

    def plan(self, trainer: pl.Trainer) -> int | None:
        """The first dense step; None if the mask stays to the end."""
        config = self.config
        if config.dense_finish_step is None and not config.dense_finish_fraction:
            return None
        total = total_steps(trainer, "dense_finish_fraction" if config.dense_finish_step is None else None)
        return start_of_the_last(
            total,
            ("dense_finish_fraction", config.dense_finish_fraction),
            ("dense_finish_step", config.dense_finish_step),
            "the dense finish",
        )

    def plan_line(self) -> str:
        """When the mask is dropped."""
        if self.switched_at_step is not None:
            return "the masks are dropped"
        return "no dense finish" if self.switch_step is None else f"the dense finish from step {self.switch_step}"

    def switched(self) -> bool:
        """Whether the masks are dropped."""
        return not all(layer.masked for layer in self._layers.values())

    def switch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the masks."""
        for layer in self._layers.values():
            layer.drop_mask()
        self.log_metrics(trainer, dense=1.0)
        pl_module.print(f"{self.title}: step {trainer.global_step}: masks dropped, dense from here on.")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """As the base class; gives every layer this micro-batch's seed of the random pruning."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.config.mvue and self.switched_at_step is None:
            for name, layer in self._layers.items():
                layer.noise_seed.fill_(zlib.crc32(f"{self.config.seed}:{name}:{self.micro_batches}".encode()))
