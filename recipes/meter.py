"""What a run measures of itself: the loss of every step, tokens, tokens per second, memory."""

import resource
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

CURVE = "curve.csv"
HEADER = "step,tokens,train_loss,val_loss\n"


class Meter(pl.Callback):
    """Writes the loss curve into curve.csv and the speed into the logger.

    Losses stay on the device and are fetched every ``log_every_n_steps`` steps, together, so that the steps in between do
    not wait for each other. Between two fetches the clock is read: tokens per second are those of training alone, without
    validation; the number that counts is the median of the intervals, which compilation at the beginning and at the wake
    of adapters does not move.

    Rows of ``curve.csv``: one a step with the training loss (mean over its micro-batches and ranks), one a validation
    with the validation loss; the other loss is empty.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        """In fit, validation included."""
        self.peak_bytes = 0
        """Largest memory of the device that tensors took; on a CPU, of the process."""
        self.last_val_step: int | None = None
        self.curve: list[tuple[int, int, float | None, float | None]] = []
        self._rates: list[float] = []
        self._losses: list[tuple[int, int, Tensor]] = []
        self._micro: list[Tensor] = []
        self._began = self._mark = 0.0
        self._tokens_at_mark = self._step = 0
        self._file: Path | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the intervals; None before the first one."""
        return statistics.median(self._rates) if self._rates else None

    def tokens_of(self, batch: dict[str, Tensor]) -> int:
        """How many tokens a batch counts for: those that are predicted."""
        return batch["targets"].numel()

    def rows(self, trainer: pl.Trainer) -> dict[str, Any]:
        """For the table, as :func:`recipes.results.collect` takes them."""
        return {
            "steps": ("optimizer steps, tokens", f"{trainer.global_step:,}, {self.tokens:,}"),
            "speed": {"tokens per second": f"{self.tokens_per_second or 0:,.0f}"},
            "memory": {"peak memory": f"{self.peak_bytes / 2**30:.2f} GiB"},
        }

    @staticmethod
    def measured(meter: "Meter | None") -> dict[str, Any]:
        """For the result file; None where nothing was trained."""
        return {
            "tokens": meter and meter.tokens,
            "tokens_per_second": meter and meter.tokens_per_second,
            "seconds": meter and meter.seconds,
            "peak_bytes": meter and meter.peak_bytes,
            "val_step": meter and meter.last_val_step,
        }

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._began = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the sanity check and the restore of a checkpoint: the file goes on from its step, or is a new one."""
        self._step = trainer.global_step
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank: they agree on it by talking
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = folder / CURVE
            self.curve = []
            kept = _read(self._file, self._step)
            self._file.write_text(HEADER, encoding="utf-8")
            self._write(kept)
        self._restart()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Keep the loss; fetch what is kept when it is time to log."""
        self.tokens += self.tokens_of(batch) * trainer.world_size
        self._micro.append(outputs["loss"].detach())
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        # Lightning has divided each by the number of micro-batches.
        self._losses.append((self._step, self.tokens, torch.stack(self._micro).sum()))
        self._micro = []
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self._step % every == 0:
            self._fetch(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock of the interval."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._fetch(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the validation loss and go on with the clock."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.last_val_step = trainer.global_step
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None:
            self._write([(trainer.global_step, self.tokens, None, loss.item())])
        self._restart()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A run that goes on from this checkpoint has the curve up to it; all ranks come here."""
        self._fetch(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fetch the rest."""
        self._fetch(trainer)
        self.seconds = time.perf_counter() - self._began
        if pl_module.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(pl_module.device)
        else:
            self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _fetch(self, trainer: pl.Trainer) -> None:
        if not self._losses:
            return
        steps, tokens, losses = zip(*self._losses, strict=True)
        self._losses = []
        mean: Any = trainer.strategy.reduce(torch.stack(losses).float(), reduce_op="mean")
        values = mean.tolist()  # waits for the device
        rate = (self.tokens - self._tokens_at_mark) / (time.perf_counter() - self._mark)
        self._rates.append(rate)
        self._write(list(zip(steps, tokens, values, [None] * len(steps), strict=True)))
        for logger in trainer.loggers:
            logger.log_metrics({"train/tokens_per_second": rate, "train/tokens": self.tokens}, step=trainer.global_step)
        self._restart()

    def _restart(self) -> None:
        self._mark, self._tokens_at_mark = time.perf_counter(), self.tokens

    def _write(self, rows: list[tuple[int, int, float | None, float | None]]) -> None:
        self.curve += rows
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as stream:
                for step, tokens, *losses in rows:
                    stream.write(f"{step},{tokens},{','.join('' if x is None else f'{x:.6f}' for x in losses)}\n")

    def state_dict(self) -> dict[str, Any]:
        """The number of tokens goes on after a resume."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""
        self.tokens = state_dict["tokens"]


def _read(file: Path, last_step: int) -> list[tuple[int, int, float | None, float | None]]:
    """The rows of a curve up to a step; what a run did after the checkpoint that it goes on from, it does again."""
    if last_step == 0 or not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines()[1:]:
        values = line.split(",")
        if len(values) == HEADER.count(",") + 1 and int(values[0]) <= last_step:  # the last line may be cut short
            train, val = (float(value) if value else None for value in values[2:])
            rows.append((int(values[0]), int(values[1]), train, val))
    return rows
