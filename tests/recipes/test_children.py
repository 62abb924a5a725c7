"""A signal to a runner alone ends what it has started, and begins nothing more."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.launching import ROOT

TWO_RUNS = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from recipes.children import answering_signals, run

CHILD = '''
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("child", flush=True)
time.sleep(60)
'''

def main():
    with ThreadPoolExecutor(1) as pool:
        runs = [pool.submit(run, [sys.executable, "-c", CHILD, f"{sys.argv[1]}/{i}"]) for i in range(2)]
        return max(one.result() for one in runs)

sys.exit(answering_signals(main))
"""
WORKER = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from recipes.bert_large.workers import _begin_worker

def busy(seconds):
    print("worker", os.getpid(), flush=True)
    time.sleep(seconds)

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin_worker, (1,)) as pool:
        pool.submit(busy, 60).result()
"""


def start(*command, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True, **options)


def ends(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def processes_with(text):
    """Ids of those whose command line has it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:  # gone meanwhile
            continue
        if text.encode() in command and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def test_the_run_ends_by_itself_and_the_next_is_not_begun(tmp_path):
    runner = start("-c", TWO_RUNS, str(tmp_path), stdout=subprocess.PIPE)
    assert runner.stdout.readline() == "child\n"
    runner.send_signal(signal.SIGTERM)
    rest, _ = runner.communicate(timeout=30)
    assert runner.returncode == 143
    assert rest == "", "no second child"
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("0", "saved")]


def test_a_worker_ends_with_its_runner_even_if_that_is_killed(tmp_path):
    script = tmp_path / "runner.py"
    script.write_text(WORKER)
    with start(str(script), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as runner:
        word, pid = runner.stdout.readline().split()
        assert word == "worker"
        runner.kill()
    assert ends(lambda: int(pid) not in processes_with("spawn_main"))


@pytest.mark.parametrize("extra", [[], ["--in-process"]])
def test_a_comparison(tmp_path, extra):
    options = ["--csv", str(tmp_path / "my.csv"), "--family", "tiny", "--methods", "dense", "--rates", "1e-3", "2e-3"]
    runner = start(
        "-m", "recipes.gpt2.compare", "run", *options, "--runs", str(tmp_path / "runs"), *extra, stdout=subprocess.PIPE
    )
    try:
        begun = ends(lambda: [p for p in tmp_path.glob("runs/**/log.txt") if "training windows" in p.read_text()])
        assert begun, "a run has begun to train"
        runner.send_signal(signal.SIGTERM)
        runner.communicate(timeout=60)
        assert runner.returncode == 143
        assert ends(lambda: not processes_with(str(tmp_path)), 10)
        assert len([*tmp_path.glob("runs/**/log.txt")]) == 1
        assert not (tmp_path / "my.csv").exists()
    finally:
        for pid in processes_with(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
