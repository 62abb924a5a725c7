"""Stopping when a cluster asks for it: a signal, a checkpoint, a status that says so."""

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from slope_pl.errors import ConfigError
from slope_pl.lightning.agreement import Agreement
from slope_pl.lightning.shielding import Shield, end_compile_workers

log = logging.getLogger(__name__)


class StopOnSignal(pl.Callback):
    """Saves at the end of the optimizer step in which a signal came, and ends the run with status 128 + its number.

    SIGTERM gives 143, SIGUSR1 138: what a batch script or ``torchrun`` needs to know that the run is to be started again. It
    replaces Lightning's handlers for these signals while training: Lightning ends without a checkpoint and with status 0, and
    with several ranks its handlers talk to the other ranks, and save, wherever in a step the signal comes. Here a handler
    only takes note. Ranks agree once an optimizer step, over the CPU and without waiting (the answer is read one step later),
    so that a signal to one rank stops all of them after the same step. Within a validation nothing is saved: the run stops
    after the first step that follows it.

    A cluster signals every process of a job. What a step starts does not get these signals: torch.compile's workers would die
    of them, and the step that waits for a kernel would never end. Workers from before training are started again. A data
    loader's own need ``worker_init_fn=slope_pl.data.outlive_signals``, or torch ends the run when one dies.

    Before training starts there is nothing to save: the process that gets the signal says so and ends at once, with the same
    status. That holds from ``setup`` on; data modules are set up before callbacks, so call :meth:`watch` before ``fit`` to
    have it while they prepare data too (the recipes' command line does).

    Under SLURM with ``SLURMEnvironment(auto_requeue=True)``, Lightning's default, the requeue signal (SIGUSR1 by default:
    ``#SBATCH --signal=SIGUSR1@90``) also puts the job back into the queue, as Lightning would; SIGTERM does not.

    The file is ``stopped-step{step}.ckpt`` in the folder of the first ``ModelCheckpoint``, or ``dirpath``; an earlier one there
    is removed once the new one is whole. The callback moves to the end of the Trainer's, so that the state of the others is
    that of the finished step. A handler that was there before ``fit`` is called as well.

    Args:
        signals: names of signals.
        dirpath: where the checkpoint goes.
        saves: whether there is a checkpoint at all. Without, the run ends at the same moment with the same status, and a line
            that says that nothing is saved; it is not put back into the queue, where it would begin anew each time.

    Raises:
        ConfigError: if a name is not that of a signal that can be handled.
        SIGTERMException: from ``fit``, once the checkpoint is written, or before training starts. It is a ``SystemExit``.
    """

    def __init__(
        self, signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1"), dirpath: str | None = None, saves: bool = True
    ) -> None:
        for name in signals:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP", "SIGINT"):
                raise ConfigError(
                    f"signals={tuple(signals)!r}: {name!r} is none that can be handled here; expected names such as "
                    "'SIGTERM', 'SIGUSR1', 'SIGUSR2' (Lightning has its own way with Ctrl+C)"
                )
        self.signals = tuple(signals)
        self.dirpath, self.saves = dirpath, saves
        self._received = self._step = self._process = 0
        self._training = False
        self._trainer: pl.Trainer | None = None
        self._before: dict[int, Any] = {}
        self._agreement, self._shield = Agreement(), Shield()

    def watch(self, trainer: pl.Trainer) -> None:
        """Handle the signals from now on, before ``fit`` does anything; ``setup`` does the same."""
        if self._trainer is None:
            self._received, self._training, self._trainer = 0, False, trainer
        if threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        found = {number: signal.getsignal(number) for number in self._numbers(trainer)}
        self._before |= {number: handler for number, handler in found.items() if handler != self._handle}
        self._install()

    def _install(self) -> None:
        for number in self._before:
            signal.signal(number, self._handle)

    def _release(self, trainer: pl.Trainer) -> None:
        """Give the signals back, and let Lightning, which sets back what it found, find those handlers."""
        for number, handler in self._before.items():
            handler = signal.SIG_DFL if handler is None else handler
            if number in trainer._signal_connector._original_handlers:
                trainer._signal_connector._original_handlers[number] = handler
            signal.signal(number, handler)
        self._before, self._trainer = {}, None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Move to the end (a new list: the old one is being walked through), and take the signals."""
        if stage == "fit":
            others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
            trainer.callbacks = [*others, self]  # type: ignore[attr-defined]
            self.watch(trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has just set its handlers."""
        self._install()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Likewise, where there was no sanity check; it sets everything back at the end of the fit."""
        if threading.current_thread() is not threading.main_thread():
            log.warning("StopOnSignal has no effect: only the main thread of a process can handle signals")
        else:
            end_compile_workers()
        self._install()
        if self._received:
            self._leave(self._received)  # once more: somebody has caught it
        self._training, self._step = True, trainer.global_step
        self._agreement.begin()

    def _numbers(self, trainer: pl.Trainer) -> list[int]:
        named = [int(signal.Signals[name]) for name in self.signals]
        requeue = _requeue_signal(trainer)
        return named if requeue is None or requeue in named else [*named, requeue]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if os.getpid() != self._process:  # a forked process, for which nobody set up anything
            signal.signal(number, before or signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        first, self._received = not self._received, max(self._received, number)
        if callable(before):
            before(number, frame)
        if first and not self._training:
            self._leave(number)

    def _leave(self, number: int) -> None:
        assert self._trainer is not None, "handlers are set in watch()"
        trainer, again = self._trainer, ""
        rank: int = rank_zero_only.rank  # type: ignore[attr-defined]  # known before processes have found each other
        if rank == 0 and number == _requeue_signal(trainer):
            again = f" {_requeue()}."
        place = f", rank {rank}" if trainer.world_size > 1 else ""
        kept = f" {trainer.ckpt_path} stays what the run goes on from." if trainer.ckpt_path else ""
        print(
            f"{signal.Signals(number).name}{place}: it came before training began. Nothing was trained, so nothing is saved."
            f"{kept}{again}",
            flush=True,
        )
        raise SIGTERMException(128 + number)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Within a step a signal would only be taken note of: it may as well wait, and what is started is spared."""
        self._shield.raise_against(self._before)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, and not between the micro-batches of one."""
        self._shield.lower()
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        number = self._agreement.exchange(self._received)
        if number:
            self._stop(trainer, number)

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        at = f"{signal.Signals(number).name}: stopped after step {trainer.global_step:,}"
        if not self.saves:
            if trainer.is_global_zero:
                anew = " The job is not requeued: it would begin anew." if number == _requeue_signal(trainer) else ""
                print(f"{at}. Checkpoints are switched off, so nothing is saved.{anew}", flush=True)
            raise SIGTERMException(128 + number)
        folder = self._folder(trainer)
        file = folder / f"stopped-step{trainer.global_step}.ckpt"
        trainer.save_checkpoint(file)
        again = ""
        if trainer.is_global_zero:
            for older in sorted(folder.glob("stopped-step*.ckpt")):
                if older != file:
                    trainer.strategy.remove_checkpoint(older)
            if number == _requeue_signal(trainer):
                again = f" {_requeue()}."
            print(f"{at}. The run goes on from {file} (fit --resume auto, or ckpt_path).{again}", flush=True)
        raise SIGTERMException(128 + number)

    def _folder(self, trainer: pl.Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        savers = [cb.dirpath for cb in trainer.checkpoint_callbacks if isinstance(cb, ModelCheckpoint) and cb.dirpath]
        log_dir = trainer.log_dir  # on every rank: they agree on it by talking
        return Path(savers[0]) if savers else Path(log_dir or trainer.default_root_dir) / "checkpoints"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A batch that a hook leaves out has a start and no end."""
        self._shield.lower()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A signal that comes after the last step ends nothing: the run is done."""
        self._agreement.end()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """After Lightning has set its own handlers back."""
        if stage == "fit":
            self._release(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Without waiting for the others, which may be gone."""
        self._shield.lower()
        self._agreement.drop()
        self._release(trainer)


def _requeue_signal(trainer: pl.Trainer) -> int | None:
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return None if environment.requeue_signal is None else int(environment.requeue_signal)


def _requeue() -> str:
    """Put this SLURM job back into the queue; says what came of it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        return f"scontrol requeue {job} could not be run ({error}): requeue the job by hand"
    if done.returncode:
        return f"scontrol requeue {job} failed ({done.stderr.strip()}): requeue the job by hand"
    return f"Job {job} is requeued"
