"""Runs that share a GPU take turns."""

import multiprocessing
import os
import pickle
import threading

import pytest

from recipes.turns import Turn


def test_the_second_waits_until_the_first_is_through(tmp_path):
    first, second = Turn(str(tmp_path / "lock")), Turn(str(tmp_path / "lock"))
    first.on_fit_start(None, None)
    waiting = threading.Thread(target=second.on_fit_start, args=(None, None), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    first.on_fit_end(None, None)
    waiting.join(30)
    assert not waiting.is_alive()
    second.on_fit_end(None, None)


@pytest.mark.parametrize("leave", ["on_fit_end", "on_exception"])
def test_a_run_that_is_through_holds_nobody_up(tmp_path, leave):
    first, second = Turn(str(tmp_path / "lock")), Turn(str(tmp_path / "lock"))
    first.on_fit_start(None, None)
    getattr(first, leave)(*[None] * (3 if leave == "on_exception" else 2))
    second.on_fit_start(None, None)
    assert pickle.loads(pickle.dumps(second))._descriptor is None


def test_nor_does_one_whose_worker_was_forked_and_lives_on(tmp_path):
    first = Turn(str(tmp_path / "lock"))
    first.on_fit_start(None, None)
    copy = os.dup(first._descriptor)  # as a forked process has it
    first.on_fit_end(None, None)
    second = threading.Thread(target=Turn(str(tmp_path / "lock")).on_fit_start, args=(None, None), daemon=True)
    second.start()
    second.join(30)
    assert not second.is_alive()
    os.close(copy)


def die(file):
    Turn(file).on_fit_start(None, None)
    os._exit(1)


def test_nor_does_one_that_was_killed(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=die, args=(str(tmp_path / "lock"),))
    process.start()
    process.join()
    assert process.exitcode == 1
    Turn(str(tmp_path / "lock")).on_fit_start(None, None)
