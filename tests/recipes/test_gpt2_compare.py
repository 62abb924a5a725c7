"""The comparison runner: what it runs, that it resumes, what it says of failures."""

import argparse
import dataclasses
import math
import re
import shlex
import threading
from pathlib import Path

import pytest
import torch

from recipes import launching
from recipes.gpt2 import compare
from recipes.gpt2 import plans as module
from recipes.gpt2.ledger import Curve, Result, read
from recipes.gpt2.module import GPT2Pretraining
from recipes.gpt2.plans import DEFAULT, FAMILIES, Plan, Queue, plans
from recipes.gpt2.pretrain import main as pretrain
from recipes.launching import RunError
from recipes.ledger import append_row
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
        **{"cuda": "13", "cusparselt": "none", "slope_pl": "0", "commit": "c", "text": "t"},
    )
    found = dataclasses.replace(base, **changes)
    return dataclasses.replace(found, run=f"{found.settings} {found.rate} {found.seed}")


def test_runs_side_by_side(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    both, made = threading.Barrier(2, timeout=30), []

    def one(plan, location, options, environment, turn):
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
    assert compare.main([*arguments, "--gpus", "0", "1", "--budget-minutes", "9"]) == 1
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


def test_what_gets_ready_waits_for_another_run_within_the_limit(monkeypatch):
    monkeypatch.setattr(module.time, "perf_counter", lambda: 100.0)
    one, two = (Plan("tiny", name, f"{name}.yaml", 1e-3, 0) for name in ("dense", "slope"))
    queue = Queue([one, two], 5, began=100.0, seconds={"dense.yaml": 200.0})
    assert queue.expected(two) is None
    assert queue.take(free_at=201.0) is None, "one ends too late, and of two nothing is known"
    assert queue.take(free_at=199.0) is one
    queue.took(one, 50.0)
    assert queue.expected(one) == 200.0
    assert queue.expected(two) == 50.0
    assert queue.take(free_at=351.0) is None
    assert queue.take(free_at=349.0) is two
    without_limit = Queue([one, two], None, began=100.0)
    assert without_limit.expected(one) == 0.0
    assert without_limit.take(free_at=1e9) is one


def test_the_next_run_gets_ready_while_one_trains(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    both, made = threading.Barrier(2, timeout=30), []

    def one(plan, location, options, environment, turn):
        made.append(turn)
        if len(made) < 3:
            both.wait()
        result = row(settings=plan.settings, rate=plan.rate, method=plan.method)
        return result, Curve(result.run, [(1, 1, 5.0, math.nan)]), tmp_path / "no trace"

    monkeypatch.setattr(compare, "train", one)
    arguments.remove("--in-process")
    assert compare.main([*arguments, "--gpus", "0"]) == 0
    assert made == [tmp_path / "runs" / "gpu-4.lock"] * 4
    assert len(read(tmp_path / "my.csv")) == 4


def test_lanes_of_one_gpu_share_its_lock(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    seen = []

    def one(plan, location, options, environment, turn):
        seen.append((environment["CUDA_VISIBLE_DEVICES"], turn.name))
        result = row(settings=plan.settings, rate=plan.rate, method=plan.method)
        return result, Curve(result.run, [(1, 1, 5.0, math.nan)]), tmp_path / "no trace"

    monkeypatch.setattr(compare, "train", one)
    arguments.remove("--in-process")
    assert compare.main([*arguments, "--gpus", "1", "1"]) == 0
    assert seen == [("7", "gpu-7.lock")] * 4


def test_lanes_share_the_cores(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("torch.get_num_threads", lambda: 32)
    monkeypatch.setattr(launching, "one_thread", dict)  # as where there is a GPU
    seen = []

    def one(recipe, main, given, folder, in_process, defaults, settings):
        seen.append(defaults)
        raise RunError("enough")

    monkeypatch.setattr(launching, "train_and_read", one)
    arguments.remove("--in-process")
    for gpus in (["0"], ["0", "1"]):
        assert compare.main([*arguments, "--gpus", *gpus]) == 1
    assert seen == [{}] * 4 + [{"OMP_NUM_THREADS": "16", "RAYON_NUM_THREADS": "16"}] * 4


def test_processes_take_turns(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    arguments.remove("--in-process")
    arguments[arguments.index("2e-3") : arguments.index("2e-3") + 1] = []
    assert compare.main([*arguments, "--gpus", "0"]) == 0
    assert len(read(tmp_path / "my.csv")) == 2
    assert (tmp_path / "runs" / "gpu-4.lock").exists()
    for log in (tmp_path / "runs").glob("*/log.txt"):
        assert "recipes.turns.Turn" in log.read_text().splitlines()[0]


def test_a_lane_sets_the_environment_of_its_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    seen = {}

    def start(command, **options):
        seen.update(options["env"])
        return 1

    monkeypatch.setattr(launching.children, "run", start)
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
    assert re.fullmatch(r"stories\.txt, [\d,]{6,} tokens, [0-9a-f]{8}", first.text)
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
