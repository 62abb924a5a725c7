"""Zero-shot scores in a comparison: made once from the runs' checkpoints, kept beside the results and shown."""

import math
import time

import pytest

from recipes.gpt2 import compare, scoring
from recipes.gpt2.ledger import read
from recipes.gpt2.scoring import TaskScore, Zeroshot, read_scores, score_table, scores_file
from recipes.launching import RunError
from recipes.ledger import append_row
from tests.recipes.test_gpt2_compare import SMALL, row
from tests.recipes.test_zeroshot_tasks import CASES, write


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("piqa", "winogrande", "lambada"):
        write(folder, name, CASES[name][0])
    return folder


@pytest.fixture
def arguments(tmp_path, monkeypatch, tasks):
    monkeypatch.delenv("SLOPE_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = ["run", "--csv", str(tmp_path / "my.csv"), "--runs", str(tmp_path / "runs"), "--family", "tiny"]
    return [*place, "--in-process", "--methods", "dense", "slope r=4", "--rates", "1e-3", *SMALL]


def test_runs_are_scored_once_and_shown(arguments, tmp_path, tasks, capfd):
    """By the real command, on the tokenizer that the checkpoints name; what is scored needs its checkpoint no longer."""
    assert compare.main([*arguments, "--zeroshot", str(tasks)]) == 0
    said = capfd.readouterr().out
    assert "Zero-shot scores of 2 runs: winogrande, piqa, lambada" in said
    results, scores = read(tmp_path / "my.csv"), read_scores(tmp_path / "my.csv")
    assert scores.keys() == {result.run for result in results}
    for by_task in scores.values():
        assert by_task.keys() == {"winogrande", "piqa", "lambada"}
        assert all(row.documents == len(CASES[task][0]) for task, row in by_task.items())
        assert all(0 <= row.accuracy <= 100 for row in by_task.values())
    assert "| | seeds | winogrande | piqa | lambada | mean of 2 |" in said
    assert "| published: dense | | 50.6 | 59.8 |  | 55.20 |" in said
    assert not [*(tmp_path / "runs").glob("**/*.ckpt")]

    lines = scores_file(tmp_path / "my.csv").read_bytes()
    assert compare.main([*arguments, "--zeroshot", str(tasks)]) == 0
    assert scores_file(tmp_path / "my.csv").read_bytes() == lines, "nothing is made again"
    write(tasks, "race", CASES["race"][0])
    assert compare.main([*arguments, "--zeroshot", str(tasks)]) == 0
    said = capfd.readouterr().out
    assert (
        "Not scored, for their checkpoints are not there: dense, rate 0.001, seed 0; slope r=4, rate 0.001, seed 0."
        in said
    )
    assert compare.main(["report", "--csv", str(tmp_path / "my.csv")]) == 0
    assert "| published: SLoPe 2.1% |" in capfd.readouterr().out


def test_a_run_that_cannot_be_scored_is_named_and_tried_again(arguments, tmp_path, tasks, capfd, monkeypatch):
    def fail(checkpoint, *rest):
        assert checkpoint.is_file()
        raise RunError("out of memory")

    monkeypatch.setattr(scoring, "score", fail)
    assert compare.main([*arguments, "--zeroshot", str(tasks), "--tasks", "piqa"]) == 1
    assert "Scores of dense, rate 0.001, seed 0 FAILED: out of memory" in capfd.readouterr().out
    assert len([*(tmp_path / "runs").glob("**/*.ckpt")]) == 2, "kept for the next time"
    assert len(read(tmp_path / "my.csv")) == 2

    def give(checkpoint, run, *rest):
        time.sleep(0.05)  # longer than the budget below, 6 ms
        return [TaskScore(run, "piqa", 50.0, math.nan, 1)]

    monkeypatch.setattr(scoring, "score", give)
    more = ["--zeroshot", str(tasks), "--tasks", "piqa", "--checkpoints", "--budget-minutes", "1e-4"]
    assert compare.main([*arguments, *more]) == 0
    assert "1 runs are left to score" in capfd.readouterr().out
    assert compare.main([*arguments, *more]) == 0
    assert len(read_scores(tmp_path / "my.csv")) == 2
    assert len([*(tmp_path / "runs").glob("**/*.ckpt")]) == 2, "--checkpoints keeps them"


def test_processes_side_by_side_share_the_cores(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(scoring.children, "run", lambda command, **options: seen.append(options["env"]) or 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 32)
    for given in ({}, {"OMP_NUM_THREADS": "3"}):
        for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        for processes in (1, 5, 64):
            with pytest.raises(RunError):
                scoring.score(tmp_path / "a.ckpt", "a", tmp_path, "hub", ["piqa"], {}, processes)
    threads = [(env.get("OMP_NUM_THREADS"), env.get("RAYON_NUM_THREADS")) for env in seen]
    assert threads == [(None, None), ("6", "6"), ("1", "1"), ("3", None), ("3", "6"), ("3", "1")]


def test_the_table_has_means_over_seeds_and_over_shared_tasks(tmp_path):
    file = tmp_path / "my.csv"
    results = [row(), row(seed=1), row(rate=2e-3, val_loss=5.0), row(method="slope r=0", settings="novels_slope.yaml")]
    accuracies = [
        {"piqa": 60.0, "race": 30.0, "lambada": 10.0},
        {"piqa": 62.0, "race": 28.0, "lambada": 10.0},
        {"piqa": 99.0},
        {"piqa": 50.0},
    ]
    for result, by_task in zip(results, accuracies, strict=True):
        for task, accuracy in by_task.items():
            append_row(scores_file(file), TaskScore(result.run, task, accuracy, math.nan, 7))
    table = score_table(results, read_scores(file))
    assert table is not None
    lines = table.splitlines()
    assert lines[0] == "| | seeds | piqa | race | lambada | mean of 1 |"
    assert lines[2] == "| dense, rate 0.001 | 2 | 61.0 ± 1.4 | 29.0 ± 1.4 | 10.0 ± 0.0 | **61.00 ± 1.41** |"
    assert lines[3] == "| slope r=0, rate 0.001 | 1 | 50.0 |  |  | **50.00** |"
    assert lines[4] == "| chance | | 50.0 | 25.0 |  | 50.00 |"
    assert lines[5] == "| published: dense | | 59.8 | 28.4 |  | 59.80 |"
    assert "Documents: piqa 7, race 7, lambada 7." in lines[-1]
    assert "near-copies" in lines[-1]
    assert score_table(results, {}) is None


def test_sizes_are_not_taken_for_seeds(tmp_path):
    """Two sizes have the same method and rate, but they are rows of their own."""
    file = tmp_path / "my.csv"
    results = [row(), row(settings="novels_dense.yaml --model.size medium", val_loss=3.0)]
    for result, accuracy in zip(results, (50.0, 60.0), strict=True):
        append_row(scores_file(file), TaskScore(result.run, "piqa", accuracy, math.nan, 7))
    table = score_table(results, read_scores(file))
    assert table is not None
    assert "| dense, rate 0.001 | 1 | 50.0 |" in table
    assert "| dense (`--model.size medium`), rate 0.001 | 1 | 60.0 |" in table


def test_where_tasks_come_from(tasks, tmp_path, monkeypatch):
    assert Zeroshot.of(str(tasks), None, False).tasks == ["winogrande", "piqa", "lambada"]
    monkeypatch.delenv("SLOPE_DATA_DIR", raising=False)
    assert Zeroshot.of("", ["hellaswag"], False) == Zeroshot("hub", ["hellaswag"], False)
    (tmp_path / "shared").mkdir()
    tasks.rename(tmp_path / "shared/zeroshot")
    monkeypatch.setenv("SLOPE_DATA_DIR", str(tmp_path / "shared"))
    assert Zeroshot.of("", None, True).data == str(tmp_path / "shared/zeroshot")
    with pytest.raises(SystemExit, match="--tasks: jeopardy unknown; expected some of mmlu"):
        Zeroshot.of("", ["jeopardy"], False)
    with pytest.raises(SystemExit, match="no file of any task there"):
        Zeroshot.of(str(tmp_path), None, False)


def test_tasks_without_zeroshot_is_an_error(arguments):
    with pytest.raises(SystemExit, match="--tasks has no effect without --zeroshot"):
        compare.main([*arguments, "--tasks", "piqa"])
