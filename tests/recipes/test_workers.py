"""Runs side by side: one that fails, and workers that die."""

import os
import signal
import time

import pytest

from recipes.bert_large.workers import Workers
from recipes.launching import RunError


def double(number, fails=()):
    if number in fails:
        raise RunError(f"{number} failed")
    return 2 * number


def die_if(number, fatal, marks, once):
    """Kills its own process, as the system does for want of memory; of those ``once`` the first time alone."""
    mark = marks / f"{number}"
    if number in fatal or (number in once and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return 2 * number


def wrong(number):
    raise ValueError(number)


@pytest.mark.parametrize(("jobs", "processes"), [(1, True), (3, False), (2, True)])
def test_a_run_that_fails_leaves_the_others_alone(jobs, processes):
    found = dict(Workers(jobs, processes).outcomes(double, {f"run {n}": (n, (2,)) for n in range(5)}))
    error = found.pop("run 2")
    assert isinstance(error, RunError)
    assert str(error) == "2 failed"
    assert found == {f"run {n}": 2 * n for n in (0, 1, 3, 4)}


def test_what_a_dead_worker_took_along_is_made_again_by_fewer(tmp_path, capsys):
    workers = Workers(4, True)
    found = list(workers.outcomes(die_if, {n: (n, (), tmp_path, (3, 5)) for n in range(8)}))
    assert sorted(found) == [(n, 2 * n) for n in range(8)]
    said = capsys.readouterr().out
    assert "A worker process died (too little memory?)" in said
    assert ", 2 at a time." in said
    assert list(workers.outcomes(double, {1: (1,)})) == [(1, 2)], "a later stage has a pool that is whole"


def test_a_run_that_always_dies_is_named_and_left_out(tmp_path):
    found = dict(Workers(2, True).outcomes(die_if, {n: (n, (1, 4), tmp_path, ()) for n in range(6)}))
    assert {n for n, outcome in found.items() if isinstance(outcome, RunError)} == {1, 4}
    assert "its process died" in str(found[1])
    assert [found[n] for n in (0, 2, 3, 5)] == [0, 4, 6, 10]


@pytest.mark.parametrize("processes", [False, True])
def test_another_error_ends_all_of_it(processes):
    with pytest.raises(ValueError, match="7"):
        list(Workers(2, processes).outcomes(wrong, {7: (7,)}))
