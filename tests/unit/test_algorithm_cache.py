"""The cache file and the ranking of algorithms, without a GPU: the product is a stand-in, the file is real."""

import json
import logging
import multiprocessing

import pytest
import torch

from slope_pl.ops import algorithm_cache as cache
from slope_pl.ops.algorithm_cache import Algorithm
from slope_pl.ops.algorithms import DEFAULT, fastest_first


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SLOPE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "_loaded", None)
    return tmp_path


def forget(monkeypatch):
    monkeypatch.setattr(cache, "_loaded", None)


def test_what_is_stored_is_loaded_by_the_next_process(folder, monkeypatch):
    cache.store("a", Algorithm(17))
    cache.store("b", Algorithm(3, 2, 1))
    forget(monkeypatch)
    assert cache.load() == {"a": Algorithm(17), "b": Algorithm(3, 2, 1)}
    assert {path.name for path in folder.iterdir()} == {"algorithms.json", "algorithms.lock"}


def test_no_file_is_an_empty_cache(caplog):
    assert cache.load() == {}
    assert caplog.text == ""


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "\0\0\0", '{"format": 1, "entries": {}}', '{"format": 2}'),
        '{"format": 2, "entries": {"a": [1, 2]}}',
        '{"format": 2, "entries": {"a": ["1", 2, 3]}}',
        '{"format": 2, "entries": {"a": [true, 1, 0]}}',
    ],
)
def test_a_damaged_or_foreign_file_is_left_out_with_one_line_and_replaced(folder, monkeypatch, caplog, text):
    (folder / "algorithms.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert cache.load() == {}
    assert len(caplog.records) == 1
    assert "algorithms.json is not a file of algorithms" in caplog.text
    cache.store("a", Algorithm(5))
    forget(monkeypatch)
    assert cache.load() == {"a": Algorithm(5)}


def test_a_folder_that_cannot_be_written_costs_a_line_and_no_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLOPE_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        cache.store("a", Algorithm(5))
    assert "set SLOPE_CACHE_DIR" in caplog.text
    assert cache.load()["a"] == Algorithm(5)


def _write(folder, worker):
    import os

    os.environ["SLOPE_CACHE_DIR"] = folder
    for i in range(20):
        cache.store(f"{worker} {i}", Algorithm(i))


def test_processes_that_write_at_once_lose_nothing(folder, monkeypatch):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(str(folder), w)) for w in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if (folder / "algorithms.json").exists():
            json.loads((folder / "algorithms.json").read_text())  # never torn
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    forget(monkeypatch)
    assert len(cache.load()) == 80


def test_the_user_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("SLOPE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.path() == tmp_path / "xdg" / "slope_pl" / "algorithms.json"


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (8, 8), (9, 8), (10, 10), (13, 12), (15, 14), (16, 16), (19, 16)])
def test_buckets(n, expected):
    assert cache.bucket(n) == expected


def test_buckets_hold_rows_that_differ_by_less_than_a_quarter():
    for n in range(8, 5000):
        assert cache.bucket(n) <= n < 1.25 * cache.bucket(n)


def test_ranking_leaves_out_what_cannot_run_and_times_the_promising_ones_again():
    times = {Algorithm(i): float(abs(i - 6) + 1) for i in range(12)}
    calls: list[int] = []

    def run(algorithm):
        if algorithm.id == 6:
            raise RuntimeError("not supported")
        run.last = algorithm
        return torch.zeros(1)

    def milliseconds(product, repeats):
        product()
        calls.append(repeats)
        # On a longer look, 7 is slower than 5.
        return times[run.last] + (0.5 if repeats == 6 and run.last.id == 7 else 0.0)

    ranked = fastest_first(times, run, milliseconds)
    assert [a.id for _, a in ranked[:2]] == [5, 7]
    assert Algorithm(6) not in [a for _, a in ranked]
    assert len(ranked) == 11
    assert calls.count(6) == 4 * 5


def test_the_default_is_the_librarys_own_choice():
    assert DEFAULT == (-1, 1, 0)
