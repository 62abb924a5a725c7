"""Adapters in a comparison: the runner's option, the file of the traces, the table of ranks against gain."""

import math
import re
import sys

import pytest

from recipes import convergence
from recipes.convergence import Point
from recipes.gpt2 import compare
from recipes.gpt2.adapters import (
    MOST_STEPS,
    _jump,
    adapters_file,
    append_trace,
    draw_traces,
    rank_table,
    read_traces,
    split_rank,
)
from recipes.gpt2.ledger import Curve, append_curve, read, read_curves
from tests.recipes.test_gpt2_compare import SMALL, row

RANKS = [
    *("--add", "r=0: tiny.yaml --model.slope.adapter_rank 0 --model.slope.adapter_start 0.99"),
    *("--add", "r=4: tiny.yaml --model.slope.adapter_rank 4 --model.slope.adapter_start 0.5"),
]


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.delenv("SLOPE_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = ["run", "--csv", str(tmp_path / "my.csv"), "--runs", str(tmp_path / "runs"), "--family", "tiny"]
    return [*place, "--in-process", "--rates", "1e-3", "--curve-every", "1", *RANKS, *SMALL]


def points(run: int, steps: range, layers: int = 2) -> list[Point]:
    return [Point(s, s - steps[0], "c_fc", f"h.{i}", *[run + s / 1000] * 5) for s in steps for i in range(layers)]


def test_the_runner_traces_adapters(arguments, tmp_path, capfd):
    file = tmp_path / "my.csv"
    assert compare.main([*arguments, "--trace-adapters"]) == 0
    said = capfd.readouterr().out
    zero, four = read(file)
    assert (zero.method, four.method, four.switched_at_step) == ("r=0", "r=4", 2)
    traces = read_traces(file)
    assert traces.keys() == {four.run}
    kinds = ["c_proj (attn)", "c_fc", "c_proj (mlp)", "c_attn"]
    assert [(p.step, p.since_wake, p.kind) for p in traces[four.run]] == [
        (s, s - 2, k) for s in (2, 3, 4) for k in kinds
    ]
    assert {p.layer for p in traces[four.run] if p.kind != "c_attn"} == {"2 layers"}
    assert traces[four.run][-1].cosine_product == pytest.approx(1)
    assert "| r=4 | 4 | 0.001 |" in said
    assert f"Adapters: {tmp_path / 'my-adapters.svg'}" in said
    assert "<svg" in (tmp_path / "my-adapters.svg").read_text()
    assert "had no effect" not in said

    (tmp_path / "my-adapters.svg").unlink()
    assert compare.main(["report", "--csv", str(file)]) == 0
    assert (tmp_path / "my-adapters.svg").exists()


def test_without_the_option_there_is_no_trace(arguments, tmp_path, capfd):
    assert compare.main([*arguments, "--methods", "r=4"]) == 0
    assert not adapters_file(tmp_path / "my.csv").exists()
    assert "Adapters:" not in capfd.readouterr().out
    # The run is done, and is not made again for a trace: that is said.
    assert compare.main([*arguments, "--methods", "r=4", "--trace-adapters"]) == 0
    assert "Done without --trace-adapters, and not made again: r=4, rate 0.001, seed 0" in capfd.readouterr().out
    assert compare.main([*arguments, "--methods", "r=0", "--trace-adapters"]) == 0
    assert "--trace-adapters had no effect" in capfd.readouterr().out


def test_a_trace_is_kept_as_means_of_few_steps(tmp_path):
    file = tmp_path / "my.csv"
    convergence.write(tmp_path / "adapters.csv", points(0, range(100, 301)))
    assert append_trace(file, "a", tmp_path / "adapters.csv")
    convergence.write(tmp_path / "adapters.csv", points(0, range(5, 8)))
    assert append_trace(file, "b", tmp_path / "adapters.csv")
    assert not append_trace(file, "c", tmp_path / "none.csv")
    traces = read_traces(file)
    assert traces.keys() == {"a", "b"}
    steps = [point.step for point in traces["a"]]
    assert (len(steps), steps[0], steps[-1]) == (MOST_STEPS, 100, 300)
    assert [(p.step, p.layer, p.cosine_up) for p in traces["b"]] == [(s, "2 layers", s / 1000) for s in (5, 6, 7)]
    # A run that was cut between its trace and its row is made again.
    convergence.write(tmp_path / "adapters.csv", points(1, range(5, 8)))
    append_trace(file, "b", tmp_path / "adapters.csv")
    assert [point.cosine_up for point in read_traces(file)["b"]] == [1.005, 1.006, 1.007]


def test_drawn_are_the_best_rates(tmp_path, monkeypatch):
    file = tmp_path / "my.csv"
    assert draw_traces(file, []) is None
    tried = ((1e-3, 4, 0), (2e-3, 3, 0), (2e-3, 3, 1))
    results = [row(rate=rate, val_loss=loss, seed=seed) for rate, loss, seed in tried]
    results.append(row(method="slope r=4", settings="x.yaml", rate=4e-3))
    for result in results:
        convergence.write(tmp_path / "adapters.csv", points(result.seed, range(5, 8)))
        append_trace(file, result.run, tmp_path / "adapters.csv")
    assert draw_traces(file, results) == f"Adapters: {tmp_path / 'my-adapters.svg'}"
    picture = (tmp_path / "my-adapters.svg").read_text()
    titles = re.findall(r">(dense|slope r=4), rate ([0-9.]+)<", picture)
    assert list(dict.fromkeys(titles)) == [("dense", "0.002"), ("slope r=4", "0.004")]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in str(draw_traces(file, results))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            "novels_slope.yaml --model.slope.adapter_rank 16 --model.size medium",
            ("novels_slope.yaml --model.size medium", 16),
        ),
        ("novels_srste.yaml --model.srste.adapter_rank=4", ("novels_srste.yaml", 4)),
        ("x.yaml --model.slope.adapter_rank 4 --model.slope.adapter_rank 0", ("x.yaml", 0)),
        (
            "x.yaml --model.slope.adapter_start 0.9 --model.slope.adapter_rank 4 --model.adapter_weight_decay 0",
            ("x.yaml", 4),
        ),
        ("tiny.yaml", None),
    ],
)
def test_split_rank(settings, expected):
    assert split_rank(settings) == expected


def test_rank_table(tmp_path):
    """Losses at the best rate of each, at that of r = 0, and the jumps of runs with the same seed and rate."""

    def result(rank, rate, loss, seed=0, mask=""):
        settings = f"novels_slope.yaml{mask} --model.slope.adapter_rank {rank}"
        found = row(method=f"slope r={rank}", settings=settings, rate=rate, val_loss=loss, seed=seed)
        return found if not rank else type(found)(**{**vars(found), "switched_at_step": 6})

    results = [result(0, 1e-3, 4.2), result(0, 2e-3, 4.0), result(4, 1e-3, 4.1), result(4, 2e-3, 3.95)]
    results += [result(16, 1e-3, 3.8), result(16, 2e-3, 3.9), result(16, 1e-3, 3.9, seed=1)]
    results.append(result(4, 1e-3, 4.0, mask=" --model.slope.mask random"))  # without its r = 0
    results.append(row())
    file = tmp_path / "my.csv"
    falls = {results[1].run: 0.1, results[3].run: 0.15, results[0].run: 0.2, results[4].run: 0.5}
    for run, fall in falls.items():  # 10 steps in points of 2
        losses = [9.0, 5.0, 5.0, 5.0 - fall, 5.0 - fall]
        training = [(2 * i + 2, 0, loss, math.nan) for i, loss in enumerate(losses)]
        append_curve(file, Curve(run, [*training, (10, 0, math.nan, 4.0)]))
    lines = rank_table(results, read_curves(file)).splitlines()
    assert lines[2] == "| slope r=0 | 0 | 0.002 | 4.0000 |  |  |  |  |"
    name = "slope r=4 (`--model.slope.adapter_rank 4`)"  # there is another slope r=4
    assert lines[3] == f"| {name} | 4 | 0.002 | 3.9500 | +0.0500 | +0.0500 | -0.1500 | -0.1000 |"
    assert lines[4] == "| slope r=16 | 16 | 0.001 | 3.8500 | +0.1500 | +0.1000 | -0.5000 | -0.2000 |"
    assert lines[5] == ""
    assert rank_table([row()], {}) is None
    assert rank_table(results[2:4], {}) is None
    lines = rank_table(results[:4], {}).splitlines()  # no curves
    assert lines[3].endswith("| - | - |")


def test_a_point_on_both_sides_of_the_wake_counts_for_none(tmp_path):
    points_of_five = [(5, 0, 9.0, math.nan), (10, 0, 4.0, math.nan), (15, 0, 99.0, math.nan), (20, 0, 3.0, math.nan)]
    assert _jump(Curve("a", points_of_five), 12) == pytest.approx(-1.0)
    assert math.isnan(_jump(Curve("a", points_of_five), 18))
    assert math.isnan(_jump(Curve("a", points_of_five), -1))
    assert math.isnan(_jump(None, 12))
