"""A callback that follows the adapters from their wake to the end of training and says how they converged."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from recipes import convergence
from recipes.convergence import Adapter, Point, means_by_kind
from recipes.convergence_plot import convergence_curves
from slope_pl import SLoPeCallback, sparse_layers
from slope_pl.baselines import MaskedLinear, masked_layers
from slope_pl.baselines.callback import BaselineCallback
from slope_pl.errors import ConfigError
from slope_pl.nn import SparseLinear, gathered

FILE = "adapters.csv"
PICTURE = "adapters.svg"
_FEWEST_FULL_STEPS = 2


@dataclass(frozen=True)
class Snapshot:
    """All adapters at one step, on the CPU."""

    step: int
    age: int
    """Optimizer steps since the wake."""
    adapters: tuple[Adapter, ...]
    weight_norms: tuple[float, ...]

    @property
    def nbytes(self) -> int:
        """Of the adapters."""
        return sum(tensor.nbytes for adapter in self.adapters for tensor in adapter)


class AdapterTrace(pl.Callback):
    """Keeps the adapters of every layer while they train, and compares each of these values with the final one.

    At the end of ``fit`` it writes into the run's log folder ``adapters.csv``, one row for each layer and step that was kept
    (columns: :class:`recipes.convergence.Point`), and ``adapters.svg``. The final value is that of the last step, or, after
    an averaging callback that stands before this one, the average. For models made sparse by :class:`slope_pl.SLoPeCallback`
    and those of :class:`slope_pl.baselines.SRSTECallback`; a model without adapters has nothing to trace and is told so.

    The values that are kept lie closer together soon after the wake: every step of the first ``full_steps``, then every
    second up to twice as many, every fourth up to four times as many. 4,000 steps make 144 values. They are not part of
    checkpoints: after a resume the curve begins there.

    Args:
        full_steps: a power of two; more than the run has steps after the wake keeps them all.
        max_bytes: of all values that are kept, in the memory of rank zero; ``full_steps`` is halved, with a warning,
            whenever there are more.

    Raises:
        ConfigError: if ``full_steps`` is no power of two from 2 on, or ``max_bytes`` is not positive.
    """

    def __init__(self, full_steps: int = 32, max_bytes: int = 2 << 30) -> None:
        if full_steps < _FEWEST_FULL_STEPS or full_steps & (full_steps - 1):
            raise ConfigError(f"full_steps={full_steps}: a power of two is expected, 2 or more (32 is the default)")
        if max_bytes <= 0:
            raise ConfigError(
                f"max_bytes={max_bytes}: a positive number of bytes is expected ({2 << 30} is the default)"
            )
        self.full_steps, self.max_bytes = full_steps, max_bytes
        self.points: list[Point] = []
        """After ``fit``, on rank zero: what the CSV file holds."""
        self._full_steps = full_steps
        self._layers: dict[str, SparseLinear | MaskedLinear] = {}
        self._kept: list[Snapshot] = []
        self._seen_step, self._age = -1, 0
        self._began_awake = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the adapters."""
        layers: dict[str, SparseLinear | MaskedLinear] = {**sparse_layers(pl_module), **masked_layers(pl_module)}
        self._layers = {name: layer for name, layer in layers.items() if layer.adapter_down is not None}
        self._kept, self.points, self._seen_step, self._age = [], [], -1, 0
        self._full_steps = self.full_steps
        self._began_awake = self._awake()
        if not self._layers:
            _say(trainer, "AdapterTrace has no effect: the model has no adapters (rank 0, or dense).")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the values that this step begins with; here the wake is over, in whatever order the callbacks stand."""
        step = trainer.global_step
        if step == self._seen_step or not self._awake():
            return  # another micro-batch of the same step
        if self._seen_step < 0:
            self._age = step - _wake_step(trainer, step)
        else:
            self._age += 1  # and not by global_step, which several optimizers move by more than one
        self._seen_step = step
        if self._is_kept(self._age) or not self._kept:
            self._keep(trainer, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare with the final values, write and draw."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank: they agree on it by talking
        if not self._layers:
            return
        if self._seen_step < 0:
            _say(trainer, "AdapterTrace: no step was made with awake adapters; there is nothing to compare.")
            return
        self._age += 1
        self._keep(trainer, trainer.global_step)
        if not trainer.is_global_zero:
            return
        self.points = self._compare()
        folder.mkdir(parents=True, exist_ok=True)
        convergence.write(folder / FILE, self.points)
        drawn = convergence_curves(folder / PICTURE, {"": means_by_kind(self.points)}, "Adapters on their way")
        ending = f" and {PICTURE}" if drawn else "; not drawn: matplotlib is not installed (extra bench)"
        began = f"; the curve begins {self._kept[0].age} steps after the wake, where this run did" * self._began_awake
        steps = f"{len(self._kept)} values of {len(self._layers)} layers' adapters{began}"
        _say(trainer, f"AdapterTrace: {steps}: {folder / FILE}{ending}")
        self._kept = []

    # ------------------------------------------------------------------------------------------------ helpers

    def _awake(self) -> bool:
        return any(layer.adapters_awake for layer in self._layers.values())

    def _is_kept(self, age: int) -> bool:
        return age % (1 << (age // self._full_steps).bit_length()) == 0

    @torch.no_grad()
    def _keep(self, trainer: pl.Trainer, step: int) -> None:
        adapters, norms = [], []
        for layer in self._layers.values():
            weight = layer.values if isinstance(layer, SparseLinear) else layer.weight
            assert layer.adapter_down is not None
            assert layer.adapter_up is not None
            with gathered((layer.adapter_down, layer.adapter_up, weight)) as (down, up, whole):
                if trainer.is_global_zero:
                    adapters.append(Adapter(*(tensor.to("cpu", copy=True) for tensor in (down, up))))
                    if isinstance(layer, MaskedLinear) and layer.masked:
                        whole = whole * (layer.mask.t() if layer.transposed else layer.mask)
                    norms.append(whole.float().norm())
        if not trainer.is_global_zero:
            return
        self._kept.append(Snapshot(step, self._age, tuple(adapters), tuple(torch.stack(norms).tolist())))
        size = self._kept[-1].nbytes
        while len(self._kept) * size > self.max_bytes and self._full_steps > _FEWEST_FULL_STEPS:
            self._thin(size)

    def _thin(self, size: int) -> None:
        self._full_steps //= 2
        first, newest = self._kept[0], self._kept[-1]
        between = [snapshot for snapshot in self._kept[1:-1] if self._is_kept(snapshot.age)]
        rank_zero_warn(
            f"AdapterTrace: {len(self._kept)} values of {size / 2**20:.0f} MiB are more than max_bytes={self.max_bytes}: every "
            f"step is kept of the first {self._full_steps} alone, and {len(between) + 2} values remain. Raise max_bytes, or "
            "lower full_steps"
        )
        self._kept = [first, *between, newest]

    def _compare(self) -> list[Point]:
        first, final = self._kept[0], self._kept[-1]
        points = []
        for snapshot in self._kept:
            for i, name in enumerate(self._layers):
                now = snapshot.adapters[i]
                found = convergence.cosines(now, final.adapters[i], first.adapters[i])
                norm = snapshot.weight_norms[i]
                share = convergence.product_norm(now) / norm if norm > 0 else float("nan")
                points.append(
                    Point(
                        *(snapshot.step, snapshot.age, convergence.layer_kind(name), name),
                        *(found.down, found.up, found.product, found.down_change, share),
                    )
                )
        return points


def _wake_step(trainer: pl.Trainer, step: int) -> int:
    """Where the schedule's callback has it; ``step`` for adapters that something else woke."""
    found: list[Any] = [
        callback.woke_at_step if isinstance(callback, SLoPeCallback) else callback.switched_at_step
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, SLoPeCallback | BaselineCallback)
    ]
    return next((at for at in found if at is not None), step)


def _say(trainer: pl.Trainer, text: str) -> None:
    # Not pl_module.print: a progress bar that is closed drops the text.
    if trainer.is_global_zero:
        print(text, flush=True)
