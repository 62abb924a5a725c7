"""A signal ends a run after the step in which it comes, with a checkpoint; the resumed run is the one that never stopped."""

import contextlib
import os
import signal
import subprocess
import time

import lightning.pytorch as pl
import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from slope_pl import ConfigError, SLoPeCallback
from slope_pl.lightning import StopOnSignal
from tests.lightning.toy import CONFIG, QUIET, Toy, assert_same, make_trainer, snapshot

pytestmark = QUIET


class Send(Toy):
    """Sends itself a signal in the middle of a micro-batch."""

    def __init__(self, number=signal.SIGTERM, at=None):
        super().__init__()
        self.number, self.at = number, at

    def training_step(self, batch, batch_idx):
        if len(self.losses) == self.at:
            os.kill(os.getpid(), self.number)
        return super().training_step(batch, batch_idx)


def stopped(trainer, module, status, **settings):
    with pytest.raises(SystemExit) as stop:
        trainer.fit(module, **settings)
    assert stop.value.code == status


@pytest.mark.parametrize(
    ("name", "status", "at"), [("SIGTERM", 143, 0), ("SIGTERM", 143, 8), ("SIGUSR1", 138, 9), ("SIGTERM", 143, 15)]
)
def test_the_resumed_run_is_the_whole_one(tmp_path, capsys, name, status, at):
    """In the first step, across an end of epoch (8 batches), at the wake of the adapters."""
    whole = Toy()
    make_trainer(tmp_path, SLoPeCallback(CONFIG), EMAWeightAveraging(decay=0.9)).fit(whole)
    callbacks = [SLoPeCallback(CONFIG), StopOnSignal(dirpath=str(tmp_path)), EMAWeightAveraging(decay=0.9)]
    before = signal.getsignal(signal.Signals[name])
    first = Send(signal.Signals[name], at)
    stopped(make_trainer(tmp_path, *callbacks), first, status)
    file = tmp_path / f"stopped-step{at + 1}.ckpt"
    assert f"{name}: stopped after step {at + 1}. The run goes on from {file}" in capsys.readouterr().out
    assert signal.getsignal(signal.Signals[name]) == before
    second = Toy()
    make_trainer(tmp_path, SLoPeCallback(CONFIG), EMAWeightAveraging(decay=0.9)).fit(second, ckpt_path=file)
    assert first.losses + second.losses == whole.losses
    assert_same(second.state_dict(), whole.state_dict())


class Starts(Toy):
    """Starts a process in each step and validation, as a compiler does, and sends it the signal that a cluster sends to all."""

    def __init__(self):
        super().__init__()
        self.survived = []

    def start(self):
        with subprocess.Popen(["sleep", "60"]) as process:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.3)
            self.survived.append(process.poll() is None)
            process.kill()

    def training_step(self, batch, batch_idx):
        self.start()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.start()
        return super().validation_step(batch, batch_idx)


def test_what_a_step_starts_outlives_the_signal(tmp_path):
    """Workers of torch.compile: torch 2.13 waits for ever for one that is gone, so nothing would be saved."""
    module, settings = (
        Starts(),
        {"max_steps": 2, "limit_val_batches": 1, "num_sanity_val_steps": 1, "val_check_interval": 2},
    )
    make_trainer(tmp_path, StopOnSignal(dirpath=str(tmp_path)), **settings).fit(module)
    assert module.survived == [False, True, True, False], "sanity check, steps, validation"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    module.survived.clear()
    make_trainer(tmp_path, **settings).fit(module)
    assert module.survived == [False] * 4


def test_an_error_in_a_step_gives_the_signals_back(tmp_path):
    module = Toy()
    module.loss = None
    with pytest.raises(TypeError):
        make_trainer(tmp_path, StopOnSignal(dirpath=str(tmp_path))).fit(module)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_micro_batches_of_a_step_are_not_torn_apart(tmp_path):
    whole = Toy()
    make_trainer(tmp_path, SLoPeCallback(CONFIG), accumulate_grad_batches=4).fit(whole)
    first = Send(at=21)
    trainer = make_trainer(
        tmp_path, SLoPeCallback(CONFIG), StopOnSignal(dirpath=str(tmp_path)), accumulate_grad_batches=4
    )
    stopped(trainer, first, 143)
    assert len(first.losses) == 24
    second = Toy()
    again = make_trainer(tmp_path, SLoPeCallback(CONFIG), accumulate_grad_batches=4)
    again.fit(second, ckpt_path=tmp_path / "stopped-step6.ckpt")
    assert first.losses + second.losses == whole.losses
    assert_same(second.state_dict(), whole.state_dict())


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_the_newest_file_takes_the_place_of_the_older_beside_the_runs_own(tmp_path):
    own = tmp_path / "own"
    saver = ModelCheckpoint(dirpath=own, filename="{step}", every_n_train_steps=4)
    trainer = make_trainer(tmp_path, SLoPeCallback(CONFIG), StopOnSignal(), saver, enable_checkpointing=True)
    stopped(trainer, Send(at=5), 143)
    assert sorted(path.name for path in own.iterdir()) == ["step=4.ckpt", "stopped-step6.ckpt"]
    trainer = make_trainer(tmp_path, SLoPeCallback(CONFIG), StopOnSignal(), saver, enable_checkpointing=True)
    stopped(trainer, Send(at=2), 143, ckpt_path=own / "stopped-step6.ckpt")
    assert {path.name for path in own.glob("stopped*")} == {"stopped-step9.ckpt"}


def test_a_signal_after_the_last_step_ends_nothing(tmp_path):
    class Late(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            os.kill(os.getpid(), signal.SIGTERM)

    module = Toy()
    make_trainer(tmp_path, SLoPeCallback(CONFIG), StopOnSignal(), Late()).fit(module)
    assert len(module.losses) == 20


def test_handlers_of_the_user_are_called_too(tmp_path):
    calls = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        stopped(make_trainer(tmp_path, StopOnSignal(dirpath=str(tmp_path))), Send(at=1), 143)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [signal.SIGTERM]


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A job of one task, and a scontrol that keeps its arguments."""
    for key, value in {
        "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "417", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexit ${{FAIL:-0}}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "calls"


def slurm_run(tmp_path, number, **settings):
    trainer = make_trainer(tmp_path, StopOnSignal(dirpath=str(tmp_path)), plugins=[SLURMEnvironment(**settings)])
    stopped(trainer, Send(number, at=3), 128 + number)


def test_slurm_requeues_on_its_signal_alone(slurm, tmp_path, capsys):
    slurm_run(tmp_path, signal.SIGTERM)
    assert not slurm.exists()
    slurm_run(tmp_path, signal.SIGUSR1)
    assert slurm.read_text() == "requeue 417\n"
    assert "Job 417 is requeued." in capsys.readouterr().out
    assert not list(tmp_path.glob("hpc_ckpt*")), "Lightning's own would lie in the working folder, for any run to find"
    slurm_run(tmp_path, signal.SIGUSR1, auto_requeue=False)
    assert slurm.read_text() == "requeue 417\n"


def test_a_run_that_does_not_save_is_not_requeued(slurm, tmp_path, capsys):
    for number, anew in ((signal.SIGTERM, ""), (signal.SIGUSR1, " The job is not requeued: it would begin anew.")):
        callback = StopOnSignal(dirpath=str(tmp_path), saves=False)
        stopped(make_trainer(tmp_path, callback, plugins=[SLURMEnvironment()]), Send(number, at=3), 128 + number)
        said = "stopped after step 4. Checkpoints are switched off, so nothing is saved."
        assert capsys.readouterr().out.splitlines() == [f"{signal.Signals(number).name}: {said}{anew}"]
    assert not slurm.exists()
    assert not list(tmp_path.glob("*.ckpt"))


def test_slurm_arrays_other_signals_and_failures(slurm, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    slurm_run(tmp_path, signal.SIGUSR2, requeue_signal=signal.SIGUSR2)
    assert slurm.read_text() == "requeue 40_2\n"
    monkeypatch.setenv("FAIL", "3")
    slurm_run(tmp_path, signal.SIGUSR1)
    assert "scontrol requeue 40_2 failed" in capsys.readouterr().out
    monkeypatch.setenv("PATH", "")
    slurm_run(tmp_path, signal.SIGUSR1)
    assert "requeue the job by hand" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- before training


class Early(Toy):
    """Gets a signal before it trains: at a hook, or in the sanity check."""

    def __init__(self, number, hook):
        super().__init__()
        self.number, self.hook = number, hook

    def strike(self, hook):
        if hook == self.hook:
            os.kill(os.getpid(), self.number)

    def prepare_data(self):
        self.strike("prepare_data")

    def setup(self, stage):
        self.strike("setup")

    def on_fit_start(self):
        self.strike("on_fit_start")

    def validation_step(self, batch, batch_idx):
        self.strike("sanity check")

    def train_dataloader(self):
        self.strike("train_dataloader")  # Lightning has set its handlers, and nobody was asked since
        return super().train_dataloader()


NOTHING = "it came before training began. Nothing was trained, so nothing is saved."


@pytest.mark.parametrize("hook", ["prepare_data", "setup", "on_fit_start", "sanity check", "train_dataloader"])
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_before_training_it_ends_at_once_and_says_that_nothing_is_saved(tmp_path, capsys, name, status, hook):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    callback, module = StopOnSignal(dirpath=str(tmp_path)), Early(number, hook)
    trainer = make_trainer(tmp_path, SLoPeCallback(CONFIG), callback, limit_val_batches=1)
    if hook == "prepare_data":
        callback.watch(trainer)
    stopped(trainer, module, status)
    assert capsys.readouterr().out.splitlines() == [f"{name}: {NOTHING}"]
    assert hook != "sanity check" or not trainer.received_sigterm, "Lightning's handler would talk to the other ranks"
    assert module.losses == []
    assert not list(tmp_path.glob("*.ckpt"))
    assert signal.getsignal(number) == before
    make_trainer(tmp_path, SLoPeCallback(CONFIG), callback).fit(Toy())  # the same callback, and nothing left of it
    assert signal.getsignal(number) == before


def test_before_training_goes_on_its_checkpoint_stays(tmp_path, capsys):
    stopped(make_trainer(tmp_path, StopOnSignal(dirpath=str(tmp_path))), Send(at=3), 143)
    file = tmp_path / "stopped-step4.ckpt"
    content, trainer = file.read_bytes(), make_trainer(tmp_path, StopOnSignal(dirpath=str(tmp_path)))
    capsys.readouterr()
    stopped(trainer, Early(signal.SIGTERM, "on_fit_start"), 143, ckpt_path=file)
    assert f"{NOTHING} {file} stays what the run goes on from." in capsys.readouterr().out
    assert file.read_bytes() == content


def test_slurm_requeues_before_training_too(slurm, tmp_path, capsys):
    for number, calls in ((signal.SIGTERM, []), (signal.SIGUSR1, ["requeue 417"])):
        trainer = make_trainer(
            tmp_path, StopOnSignal(dirpath=str(tmp_path)), plugins=[SLURMEnvironment()], limit_val_batches=1
        )
        stopped(trainer, Early(number, "sanity check"), 128 + number)
        assert (slurm.read_text().splitlines() if slurm.exists() else []) == calls
    assert f"SIGUSR1: {NOTHING} Job 417 is requeued." in capsys.readouterr().out
    assert not list(tmp_path.glob("*.ckpt"))


def test_an_exit_that_somebody_catches_comes_again_at_the_start(tmp_path, capsys):
    class Catching(Early):
        def setup(self, stage):
            with contextlib.suppress(SystemExit):
                self.strike("setup")

    module = Catching(signal.SIGTERM, "setup")
    stopped(make_trainer(tmp_path, StopOnSignal(dirpath=str(tmp_path))), module, 143)
    assert module.losses == []
    assert capsys.readouterr().out.count(NOTHING) == 2


def test_forked_processes_keep_the_handlers_that_were_there(tmp_path):
    """A pool that prepares data ends its processes by SIGTERM: that is none of the run's."""
    ends = []

    class Forking(Toy):
        def setup(self, stage):
            ready, child_is = os.pipe()
            child = os.fork()
            if not child:
                os.write(child_is, b".")  # past the start, where Python drops signals
                time.sleep(60)
                os._exit(0)
            os.read(ready, 1)
            os.kill(child, signal.SIGTERM)
            ends.append(os.waitpid(child, 0)[1])

    make_trainer(tmp_path, StopOnSignal(dirpath=str(tmp_path))).fit(Forking())
    assert [os.WTERMSIG(status) for status in ends] == [signal.SIGTERM]


@pytest.mark.parametrize("name", ["TERM", "SIGKILL", "SIGINT"])
def test_signals_that_cannot_be_handled(name):
    with pytest.raises(ConfigError, match=f"'{name}' is none that can be handled"):
        StopOnSignal((name,))


def test_a_run_to_the_end_is_left_alone(tmp_path):
    plain, watched = Toy(), Toy()
    make_trainer(tmp_path, SLoPeCallback(CONFIG)).fit(plain)
    make_trainer(tmp_path, SLoPeCallback(CONFIG), StopOnSignal()).fit(watched)
    assert_same(snapshot(watched), plain.state_dict())
