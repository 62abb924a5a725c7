"""SLURM, `timeout` and a shell signal every process of a job: compile workers and data workers live on, and the run saves."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from slope_pl.data import outlive_signals
from slope_pl.data.loading import LoaderModule
from slope_pl.lightning.shielding import Shield, end_compile_workers


@pytest.mark.parametrize(("name", "start"), [("SIGTERM", "step"), ("SIGUSR1", "sanity")])
def test_a_step_that_compiles_is_finished_and_saved(tmp_path, name, start):
    number = signal.Signals[name]
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.lightning.group_worker", str(tmp_path), start],
        env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert any(line == "compiling\n" for line in run.stdout)
        os.killpg(run.pid, number)
        said, _ = run.communicate(timeout=60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    assert run.returncode == 128 + number
    assert f"{name}: stopped after step 3." in said
    assert (tmp_path / "stopped-step3.ckpt").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)  # nobody is left


def test_a_shield_leaves_what_was_blocked_before_as_it_was():
    came = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        shield = Shield()
        for _ in range(2):  # two batches of a step
            shield.raise_against([signal.SIGUSR1, signal.SIGUSR2])
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        assert came == []
        shield.lower()
        assert came == [signal.SIGUSR1]
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGUSR2}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        signal.signal(signal.SIGUSR1, before)


def test_another_torch_says_what_it_cannot_do(monkeypatch, caplog):
    import torch._inductor.async_compile as found

    monkeypatch.delattr(found, "shutdown_compile_workers")
    end_compile_workers()
    assert "compile workers that were started before training die of a signal" in caplog.text
    monkeypatch.delitem(sys.modules, found.__name__)
    caplog.clear()
    end_compile_workers()
    assert not caplog.text, "nothing was compiled"


class Pids(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.tensor(os.getpid())


def test_a_data_worker_ends_by_its_parent_alone():
    batches = iter(DataLoader(Pids(), batch_size=1, num_workers=1, worker_init_fn=outlive_signals))
    pid = int(next(batches))
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        subprocess.run(["kill", f"-{name[3:]}", str(pid)], check=True)  # another process than the parent
    assert int(next(batches)) == pid
    os.kill(pid, signal.SIGUSR1)
    assert int(next(batches)) == pid
    worker = batches._workers[0]
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0
    batches._shutdown_workers()


def test_the_data_modules_ask_for_it():
    module = LoaderModule()
    module.num_workers = 1
    assert module._loader_options()["worker_init_fn"] is outlive_signals
