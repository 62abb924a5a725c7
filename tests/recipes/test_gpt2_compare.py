"""The comparison runner: what it runs, that it resumes, what it says of failures, and its report."""

import argparse
import csv
import dataclasses
import math
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from recipes import launching
from recipes.gpt2 import compare, report
from recipes.gpt2 import plans as module
from recipes.gpt2.ledger import Curve, Result, append_curve, curves_file, read, read_curves
from recipes.gpt2.module import GPT2Pretraining
from recipes.gpt2.plans import DEFAULT, FAMILIES, Plan, Queue, labels, plans
from recipes.gpt2.pretrain import main as pretrain
from recipes.launching import RunError
from recipes.ledger import append_row
from recipes.loss_plot import _less
from tests.recipes.tiny_gpt2 import NET

ROOT = Path(__file__).parents[2]
SMALL = [
    *NET,
    *("--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.accelerator", "cpu", "--model.sample_tokens", "0", "--model.warmup", "1"),
]


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.delenv("SLOPE_DATA_DIR", raising=False)
    monkeypatch.setenv("SLOPE_COMMIT", "abc1234")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = ["run", "--csv", str(tmp_path / "my.csv"), "--runs", str(tmp_path / "runs"), "--family", "tiny"]
    return [*place, "--in-process", "--methods", "dense", "slope r=4", "--rates", "1e-3", "2e-3", *SMALL]


def row(**changes) -> Result:
    base = Result(
        **{"run": "", "family": "novels", "method": "dense", "settings": "novels_dense.yaml", "rate": 1e-3, "seed": 0},
        **{"val_loss": 4.0, "steps": 10, "tokens": 1000, "tokens_per_second": 100.0, "seconds": 10.0},
        **{"peak_bytes": 2**30, "resetups": 0, "switched_at_step": -1, "gpu": "G", "driver": "d", "torch": "2"},
        **{"cuda": "13", "cusparselt": "none", "slope_pl": "0", "commit": "c"},
    )
    found = dataclasses.replace(base, **changes)
    return dataclasses.replace(found, run=f"{found.settings} {found.rate} {found.seed}")


def test_runs_side_by_side(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    both, made = threading.Barrier(2, timeout=30), []

    def one(plan, location, options, environment):
        if len(made) < 2:
            made.append((plan.rate, environment["CUDA_VISIBLE_DEVICES"]))
            both.wait()  # fails if they are not at the same time
        else:
            made.append((plan.rate, environment["CUDA_VISIBLE_DEVICES"]))
        if plan.rate == 2e-3:
            raise compare.RunError("cut")
        result = row(settings=plan.settings, rate=plan.rate, method=plan.method)
        return result, Curve(result.run, [(1, 1, 5.0, math.nan)]), tmp_path / "no trace"

    monkeypatch.setattr(compare, "train", one)
    arguments.remove("--in-process")
    assert compare.main([*arguments, "--gpus", "0", "1"]) == 1
    assert {gpu for _, gpu in made} == {"4", "7"}
    assert sorted(rate for rate, _ in made) == [1e-3, 1e-3, 2e-3, 2e-3]
    assert len(read(tmp_path / "my.csv")) == 2
    assert "2 runs failed: " in capfd.readouterr().out
    with pytest.raises(SystemExit, match="there are 2 GPUs here, counted from 0"):
        compare.main([*arguments, "--gpus", "2"])


def test_runs_side_by_side_are_processes_of_their_own(arguments, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(SystemExit, match="--in-process with --gpus"):
        compare.main([*arguments, "--gpus", "0", "1"])


def test_a_run_is_begun_if_one_of_its_kind_would_end_in_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    long, short, new = (Plan("tiny", name, f"{name}.yaml", 1e-3, 0) for name in ("fst", "dense", "slope"))
    queue = Queue([long, long, short, new], 5, began=100.0, seconds={"fst.yaml": 200.0, "dense.yaml": 50.0})
    assert queue.take() is long, "the first is always begun"
    queue.took(long, 210.0)
    now[0] = 310.0  # 90 seconds are left
    assert queue.take() is short
    queue.took(short, 80.0)
    assert queue.take() is None, "nothing is known of the third kind: as long as the longest"
    assert queue.plans == [long, new]
    now[0] = 100.0
    assert queue.take() is long
    assert queue.take() is new


def test_a_lane_sets_the_environment_of_its_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    seen = {}

    def start(command, **options):
        seen.update(options["env"])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(launching.subprocess, "run", start)
    with pytest.raises(RunError, match="status 1"):
        launching.train_and_read("m", print, [], tmp_path, False, {"A": "default"}, launching.one_gpu(1))
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["A"]) == ("7", "default")


def test_runs_resume_and_report(arguments, tmp_path, capfd):
    assert compare.main([*arguments, "--budget-minutes", "0.0001"]) == 0  # a first run is always begun
    said = capfd.readouterr().out
    assert "4 runs, 0 of them done" in said
    assert "Budget:" in said
    assert "3 left" in said
    (first,) = read(tmp_path / "my.csv")
    assert (first.method, first.rate, first.seed, first.steps, first.tokens) == ("dense", 1e-3, 0, 4, 4 * 16 * 32)
    assert first.commit == "abc1234"
    assert first.torch == torch.__version__
    assert 6 < first.val_loss < 7

    assert compare.main(arguments) == 0
    said = capfd.readouterr().out
    assert "4 runs, 1 of them done" in said
    results = read(tmp_path / "my.csv")
    assert results[0] == first
    order = [("dense", 1e-3), ("slope r=4", 1e-3), ("dense", 2e-3), ("slope r=4", 2e-3)]
    assert [(r.method, r.rate) for r in results] == order
    assert said.count("| dense |") == 1
    assert "Seed set to" not in said  # Lightning's words go to the log
    (log,) = (tmp_path / "runs").glob("dense-0.001-0-*/log.txt")
    assert "Trainable params" in log.read_text()
    assert "<svg" in (tmp_path / "my-curves.svg").read_text()

    lines = (tmp_path / "my.csv").read_bytes()
    assert compare.main(arguments) == 0
    assert "4 runs, 4 of them done" in capfd.readouterr().out
    assert (tmp_path / "my.csv").read_bytes() == lines


def test_methods_see_the_same_tokens_in_the_same_order(arguments, monkeypatch):
    """And begin with the same weights: what differs with one seed is the method."""
    seen: dict[str, list] = {}

    original = GPT2Pretraining.training_step

    def watch(module, batch, batch_idx):
        first = [module.net.wte.weight.detach().clone()]
        seen.setdefault(module.method, first).append(batch["input_ids"])
        return original(module, batch, batch_idx)

    monkeypatch.setattr(GPT2Pretraining, "training_step", watch)
    more = ["--methods", "all", "--rates", "1e-3", "--seeds", "7"]
    assert compare.main([*arguments[:8], *more, *SMALL]) == 0
    assert seen.keys() == {"dense", "2:4 sparse", "Extended SR-STE", "FST"}
    for method, tensors in seen.items():
        for mine, others in zip(tensors, seen["dense"], strict=False):
            assert torch.equal(mine, others), method


def test_a_process_a_run(arguments, tmp_path, capfd):
    arguments.remove("--in-process")
    assert compare.main([*arguments, "--methods", "slope r=4", "--rates", "1e-3"]) == 0
    (result,) = read(tmp_path / "my.csv")
    assert result.switched_at_step == 3
    assert "| slope r=4 | 0.001* | 1 |" in capfd.readouterr().out


def test_a_run_that_fails_is_named_and_made_again(arguments, tmp_path, capfd):
    broken = [*arguments, "--add", "wrong: tiny.yaml --model.slope.adapter_rank -1", "--methods", "wrong", "dense"]
    assert compare.main([*broken, "--rates", "1e-3"]) == 1
    said = capfd.readouterr().out
    assert "wrong, rate 0.001, seed 0 FAILED" in said
    assert "adapter_rank=-1" in said
    assert [r.method for r in read(tmp_path / "my.csv")] == ["dense"]  # the others went on
    assert compare.main([*broken, "--rates", "1e-3"]) == 1
    assert "2 runs, 1 of them done" in capfd.readouterr().out


def test_best_rates_are_taken_from_the_file(arguments, tmp_path):
    options = ["--best-rates", "--seeds", "0", "1"]
    settings = {
        name: f"tiny{'_dense' if name == 'dense' else ''}.yaml {shlex.join(SMALL)}" for name in ("dense", "slope r=4")
    }
    for name, rate, loss in (
        ("dense", 1e-3, 3.0),
        ("dense", 2e-3, 2.0),
        ("slope r=4", 4e-3, math.nan),
        ("slope r=4", 1e-3, 3),
    ):
        append_row(
            tmp_path / "my.csv", row(method=name, settings=settings[name], rate=rate, val_loss=loss, family="tiny")
        )
    parsed = parse(arguments, options)
    found = [(plan.method, plan.rate, plan.seed) for plan in plans("tiny", *parsed)]
    assert found == [("dense", 2e-3, 0), ("slope r=4", 1e-3, 0), ("dense", 2e-3, 1), ("slope r=4", 1e-3, 1)]
    with pytest.raises(SystemExit, match="has no run of fst to choose a rate from"):
        plans("tiny", *parse(arguments, [*options, "--methods", "fst"]))


def parse(arguments, more):
    """The options as the runner hands them to `plans`, with what is for every run."""
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run_all", lambda options, overrides: caught.append((options, overrides)) or 0)
        compare.main([*arguments, *more])
    return caught[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "banana"], "'banana' unknown; tiny has dense, slope r=4"),
        (["--rates", "0.001", "7"], "7 is no learning rate"),
        (["--add", "mine tiny.yaml"], "'NAME: CONFIG.yaml ARGUMENTS' is expected"),
        (["--add", "mine: nothing.yaml"], "'NAME: CONFIG.yaml ARGUMENTS' is expected"),
        (["--add", "dense: tiny.yaml"], "dense is one of the methods already"),
        (["--methods", "dense@fast"], "'dense@fast': METHOD or METHOD@RATE,RATE is expected"),
        (["--methods", "dense@1e-3,2"], "2 is no learning rate"),
        (["--methods", "dense", "dense@2e-3"], "--methods: dense is there twice"),
        (["--methods", "dense@2e-3,2e-3"], "--methods dense: 0.002 is there twice"),
        (["--rates", "1e-3", "0.001"], "--rates: 0.001 is there twice"),
        (["--seeds", "1", "1"], "--seeds: 1 is there twice"),
        (["--add", "a: tiny.yaml", "--add", "a: tiny_dense.yaml"], "--add: a is there twice"),
        (["--best-rates", "--methods", "dense@1e-3"], "dense came with rates of its own"),
    ],
)
def test_wrong_options_are_named(arguments, more, message):
    with pytest.raises(SystemExit, match=message):
        compare.main([*arguments, *more])


def test_methods_may_come_with_rates_of_their_own(arguments):
    options = argparse.Namespace(
        methods=["dense@1e-3", "fst", "slope r=4@3e-3,4e-3,5e-3"],
        add=[],
        rates=[7e-3, 8e-3],
        seeds=[0, 1],
        best_rates=False,
    )
    found = [(plan.method, plan.rate, plan.seed) for plan in plans("tiny", options, [])]
    first = [("dense", 1e-3, 0), ("fst", 7e-3, 0), ("slope r=4", 3e-3, 0), ("fst", 8e-3, 0), ("slope r=4", 4e-3, 0)]
    assert found[:6] == [*first, ("slope r=4", 5e-3, 0)]
    assert found[6:] == [(method, rate, 1) for method, rate, _ in found[:6]]
    assert {plan.family for plan in plans("tiny", options, [])} == {"tiny"}


def test_another_csv_is_refused(arguments, tmp_path):
    (tmp_path / "my.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="its columns are a, b"):
        compare.main(arguments)


@pytest.mark.parametrize("family", [*FAMILIES])
def test_every_method_is_a_command_that_parses(family, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for method, settings in FAMILIES[family].methods.items():
        plan = Plan(family, method, settings, 1.5e-3, 3)
        line = compare.command_line(plan, ["--data.source", "FOLDER"], Path("runs"), checkpoints=False)
        with pytest.raises(SystemExit) as stop:
            pretrain([*line, "--print_config"])
        assert stop.value.code == 0, method
        assert "learning_rate: 0.0015" in capsys.readouterr().out
    assert set(DEFAULT[family]) <= FAMILIES[family].methods.keys()


def test_report_has_the_best_rate_and_the_spread(tmp_path):
    rows = [row(rate=rate, val_loss=loss) for rate, loss in ((1e-3, 4.2), (2e-3, 4.0), (4e-3, math.nan))]
    rows += [row(rate=2e-3, seed=seed, val_loss=loss) for seed, loss in ((1, 4.1), (2, 3.9))]
    rows.append(row(method="slope r=0", settings="novels_slope.yaml", val_loss=4.5, tokens_per_second=123456.0))
    rows.append(row(settings="novels_dense.yaml --model.size medium", val_loss=3.5))
    rows.append(row(method="fst", settings="novels_fst.yaml --model.fst.decay 0", val_loss=3.7))
    rows.append(row(method="fst", settings="novels_fst.yaml", val_loss=math.nan))
    for result in rows:
        append_row(tmp_path / "my.csv", result)
    assert [r for r in read(tmp_path / "my.csv") if r.val_loss == r.val_loss] == [
        r for r in rows if r.val_loss == r.val_loss
    ]
    lines = report.report(read(tmp_path / "my.csv")).splitlines()
    assert lines[2] == (
        "| dense | 0.002 | 3 | 4.0000 ± 0.1000 | 54.60 | 100 | 10 | 1.00 | 0.001: 4.2000, 0.002: 4.0000, 0.004: inf |"
    )
    assert lines[3] == "| slope r=0 | 0.001* | 1 | 4.5000 | 90.02 | 123,456 | 10 | 1.00 | 0.001: 4.5000 |"
    assert lines[4] == "| fst | 0.001* | 1 | inf | inf | 100 | 10 | 1.00 | 0.001: inf |"
    assert "a better one may lie beyond" in lines[6]
    assert lines[10].startswith("| dense | 0.001* | 1 | 3.5000 |"), "another size is another table"
    assert "1,000 tokens a run, all with `--model.size medium`. " in lines[12]
    assert lines[16].startswith("| fst | 0.001* | 1 | 3.7000 |")
    assert report.report([]) == "No results yet."


def test_a_curve_that_was_begun_twice_is_the_second(tmp_path):
    """A run is cut between its curve and its row: it is made again, and its curve is written again."""
    result, file = row(), tmp_path / "my.csv"
    append_curve(file, Curve(result.run, [(1, 10, 5.0, math.nan), (2, 20, 4.0, math.nan)]))
    append_curve(file, Curve(result.run, [(1, 10, 5.5, math.nan), (2, 20, 4.5, math.nan), (2, 20, math.nan, 4.6)]))
    append_row(file, result)
    points = read_curves(file)[result.run].points
    assert [(step, loss) for step, _, loss, _ in points if loss == loss] == [(1, 5.5), (2, 4.5)]
    with curves_file(file).open() as stream:
        assert csv.DictReader(stream).fieldnames == ["run", "step", "tokens", "train_loss", "val_loss"]
    assert "my-curves.svg" in report.draw(file)


def test_curves_are_drawn_in_the_order_of_their_losses_and_against_dense(tmp_path):
    file = tmp_path / "my.csv"
    for result in (row(), row(method="slope r=0", settings="novels_slope.yaml", val_loss=3.9)):
        points = [(1, 10, result.val_loss + 1, math.nan), (2, 20, result.val_loss, math.nan), (2, 20, math.nan, 4.6)]
        append_curve(file, Curve(result.run, points))
        append_row(file, result)
        report.draw(file)
        picture = (tmp_path / "my-curves.svg").read_text()
        assert ("loss minus that of" in picture) == (
            result.method != "dense"
        )  # one alone has nothing to be compared with
    assert picture.index(">slope r=0, rate 0.001<") < picture.index(">dense, rate 0.001<")
    curves = [([(1.0, 5.0), (2.0, 4.0), (3.0, 3.5)], [(2.0, 4.5)]), ([(1.0, 6.0), (2.0, 4.5)], [(2.0, 4.25)])]
    assert _less(*curves) == ([(1.0, -1.0), (2.0, -0.5)], [(2.0, 0.25)])


def test_a_curve_is_the_mean_over_seeds(tmp_path):
    """Not that of the best one; where one of them ended early (diverged), up to there."""
    nan = math.nan
    first = Curve("a", [(1, 10, 5.0, nan), (2, 20, 4.0, nan), (2, 20, nan, 4.5), (3, 30, 3.0, nan)])
    second = Curve("b", [(1, 10, 6.0, nan), (2, 20, 4.5, nan), (2, 20, nan, 4.25)])
    points = report.mean_curve([first, second])
    assert str(points) == str([(1, 10, 5.5, nan), (2, 20, 4.25, nan), (2, 20, nan, 4.375)])
    file = tmp_path / "my.csv"
    for result in (row(), row(seed=1, val_loss=3.9), row(rate=2e-3, val_loss=4.6)):
        append_curve(file, Curve(result.run, first.points))
        append_row(file, result)
    report.draw(file)
    picture = (tmp_path / "my-curves.svg").read_text()
    assert ">dense, rate 0.001, 2 seeds<" in picture
    assert "0.002" not in picture


def two_sizes() -> list[Result]:
    """Small and medium models of one CSV file, at the same rate; the reader's own method among them."""
    methods = {
        "dense": "novels_dense.yaml",
        "slope r=0": "novels_slope.yaml --model.slope.adapter_rank 0",
        "early": "novels_slope.yaml --model.slope.adapter_rank 16 --model.slope.adapter_start 0.5",
    }
    sizes = (("", 4.0), (" --model.size medium", 3.0))
    return [
        row(method=name, settings=own + size, val_loss=loss + i / 10)
        for size, loss in sizes
        for i, (name, own) in enumerate(methods.items())
    ]


def test_two_sizes_in_a_file_are_two_tables_and_two_pictures(tmp_path):
    file = tmp_path / "my.csv"
    for result in two_sizes():
        append_curve(file, Curve(result.run, [(1, 10, result.val_loss, math.nan), (1, 10, math.nan, result.val_loss)]))
        append_row(file, result)
    small, medium = report.report(read(file)).split("\n\n| method")
    for table, losses in ((small, ("4.0", "4.1", "4.2")), (medium, ("3.0", "3.1", "3.2"))):
        for method, loss in zip(("dense", "slope r=0", "early"), losses, strict=True):
            assert f"| {method} | 0.001* | 1 | {loss}000 |" in table
    assert report.draw(file).splitlines() == [f"Loss curves: {tmp_path}/my-curves{n}.svg" for n in ("", "-2")]
    first, second = ((tmp_path / f"my-curves{n}.svg").read_text() for n in ("", "-2"))
    assert "medium" not in first
    assert "GPT-2 (--model.size medium), G" in second
    for picture in (first, second):
        assert picture.count(">early, rate 0.001<") == 1
        assert "loss minus that of" in picture


def test_labels_tell_apart_what_has_one_name():
    results = two_sizes()
    found = labels(results)
    assert [*found.values()][::3] == ["dense", "dense (`--model.size medium`)"]
    assert [*found.values()][2::3] == ["early", "early (`--model.size medium`)"]
    assert {*labels(results[:3]).values()} == {"dense", "slope r=0", "early"}
    other = row(method="early", settings="novels_slope.yaml --model.slope.adapter_rank 64")
    assert labels([results[2], other])[other.settings] == "early (`--model.slope.adapter_rank 64`)"


def test_without_matplotlib_the_report_says_so(tmp_path, monkeypatch):
    append_curve(tmp_path / "my.csv", Curve(row().run, [(1, 10, 5.0, math.nan)]))
    append_row(tmp_path / "my.csv", row())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in report.draw(tmp_path / "my.csv")
