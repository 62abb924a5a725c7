"""What comparisons run beside the plain methods: masks and starts, the dense runs these need, several processes, SQuAD."""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from recipes.bert_large import compare, comparison, glue, glue_all, pretrain
from recipes.bert_large.glue_report import best_rates
from recipes.bert_large.glue_sample import write_sample
from recipes.bert_large.ledger import read
from recipes.bert_large.methods import (
    MASKS,
    STARTS,
    Place,
    Run,
    dense_sibling,
    first_stage,
    method_arguments,
)
from recipes.launching import RunError
from slope_pl.lightning import faded_masks
from slope_pl.models import BertConfig, BertForQuestionAnswering, save_pretrained

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data" / "sample"
CONFIGS = ("glue.yaml", "glue_dense.yaml")
PLAIN = Run("rte", "sparse", "wanda", 4, "plain", 1e-3, 0, "", "s")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("glue"))


def go(tmp_path, data, *arguments: str, steps: int = 20) -> int:
    place = [
        "--config",
        "glue_sample.yaml",
        "--data",
        str(data),
        "--runs",
        str(tmp_path),
        "--tasks",
        "rte",
        "--in-process",
    ]
    return glue_all.main([*place, *arguments, "--trainer.max_steps", str(steps), "--trainer.accelerator", "cpu"])


def pretrained(tmp_path, name: str, *arguments: str, steps: int = 2) -> str:
    """A sparse checkpoint of pretraining, of the architecture of glue_sample.yaml."""
    sizes = ["hidden_size", "64", "num_hidden_layers", "2", "num_attention_heads", "4", "intermediate_size", "128"]
    sizes += ["vocab_size", "2048", "max_position_embeddings", "64"]
    bert = [word for key, value in zip(sizes[::2], sizes[1::2], strict=True) for word in (f"--model.bert.{key}", value)]
    short = ["--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu"]
    cli = pretrain.main(
        ["fit", "--config", str(ROOT / "recipes/bert_large/pretrain_tiny.yaml"), *bert, *short,
         "--data.cache_dir", str(tmp_path / "cache"), *arguments,
         "--trainer.logger.init_args.save_dir", str(tmp_path / name)]
    )  # fmt: skip
    assert cli is not None
    return cli.trainer.checkpoint_callback.last_model_path


def recovered(tmp_path, *arguments: str, **steps: int) -> Path:
    """A folder with checkpoints for recovered starts, by name the steps that each was trained for.

    Runs of pretraining: a recovery leaves the same file (test_imitation.py).
    """
    folder = tmp_path / "novels-3"
    folder.mkdir()
    for name, count in steps.items():
        rank = name.partition("_r")[2]
        awake = ["--model.slope.adapter_rank", rank, "--model.slope.adapter_start_step", "0"] if rank else []
        saved = pretrained(tmp_path, name, *arguments, *awake, steps=count)
        shutil.copy(saved, folder / f"{name.replace('_', '-')}.ckpt")
    return folder


def made_runs(monkeypatch) -> list[str]:
    """The runs that are made from here on."""
    made = []
    train = comparison.train
    monkeypatch.setattr(comparison, "train", lambda run, *rest: made.append(str(run)) or train(run, *rest))
    return made


# Names and arguments ---------------------------------------------------------------------------------------------------


def test_starts_have_one_spelling_and_labels():
    assert comparison.check_starts(["gradual+teacher", "plain", "teacher+gradual"]) == ["teacher+gradual", "plain"]
    assert PLAIN.label == "2:4 wanda, r = 4"
    assert replace(PLAIN, start="early+teacher").label == "2:4 wanda, r = 4, early + teacher"
    assert replace(PLAIN, arguments="--a 1").label == "2:4 wanda, r = 4, --a 1"
    assert PLAIN.name != replace(PLAIN, settings="t").name


def test_runs_that_others_start_from():
    run = replace(PLAIN, start="early+teacher+gradual", arguments="--x 1")
    sibling, faded = dense_sibling(run, 3e-4), first_stage(run)
    assert (sibling.label, sibling.rate, sibling.seed, sibling.starts) == ("dense", 3e-4, 0, set())
    assert (faded.method, faded.mask, faded.rank, faded.start, faded.rate) == ("fade", "wanda", 0, "teacher", 1e-3)
    assert comparison._stages([run, replace(run, rank=16)], {"rte": 3e-4}) == [[sibling], [faded]]  # each once
    assert comparison._stages([PLAIN], {"rte": 3e-4}) == [[], []]


def test_another_share_of_fading_is_another_run_and_another_first_stage(capsys):
    (start,) = options("--starts", "gradual+teacher", "--fade", "0.25").starts
    assert start == "teacher+gradual=0.25"
    run = replace(PLAIN, start=start)
    assert (run.starts, run.fade, run.label) == (
        {"teacher", "gradual"},
        0.25,
        "2:4 wanda, r = 4, teacher + gradual=0.25",
    )
    usual = replace(PLAIN, start="teacher+gradual")
    assert usual.fade == first_stage(usual).fade == 0.5
    assert options("--starts", "gradual", "--fade", "0.5").starts == ["gradual"]
    stage = first_stage(run)
    assert (stage.fade, stage.starts, first_stage(usual).start) == (0.25, {"teacher"}, "teacher")
    assert stage.name != first_stage(usual).name
    assert method_arguments(stage, CONFIGS)[-2:] == ["--model.fade", "0.25"]
    with pytest.raises(SystemExit):
        options("--fade", "0.25", "--starts", "teacher")
    assert "--fade 0.25 has no effect without a gradual start" in capsys.readouterr().err


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", ["dense", "sparse", "fade"])
def test_arguments_parse(capsys, mask, method):
    run = replace(PLAIN, mask=mask, method=method, rank=0 if method == "fade" else 4, start="early")
    with pytest.raises(SystemExit) as stop:
        glue.main(["fit", *method_arguments(run, CONFIGS), "--data.task", "rte", "--print_config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert ("fade: 0.5" in text) == (method == "fade")
    if method != "dense":
        assert f"mask: {mask.removesuffix('-wanda').replace('wanda', 'magnitude')}\n" in text
        assert f"mask_calibration_batches: {16 if 'wanda' in mask else 0}\n" in text
        assert f"adapter_start_step: {0 if method == 'sparse' else 'null'}\n" in text


@pytest.mark.parametrize(("start", "batches"), [("gradual", "0"), ("early+recovered=a", "0"), ("teacher", "16")])
def test_a_start_that_brings_masks_does_not_choose_them(capsys, start, batches):
    arguments = method_arguments(replace(PLAIN, start=start), CONFIGS)
    at = len(arguments) - arguments[::-1].index("--model.slope.mask_calibration_batches")
    assert arguments[at] == batches
    with pytest.raises(SystemExit):
        glue.main(["fit", *arguments, "--data.task", "rte", "--print_config"])
    assert f"mask_calibration_batches: {batches}\n" in capsys.readouterr().out


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    comparison.add_options(parser, "", "")
    found = parser.parse_args(arguments)
    comparison.check_options(parser, found)
    found.csv = Path("none.csv")
    return found


def test_early_is_for_adapters_and_seeds_are_outermost():
    given = options("--ranks", "0", "4", "--starts", "plain", "early", "--seeds", "0", "1", "--masks", "wanda")
    found = [*comparison.runs(given, Place("glue_minilm.yaml", "glue", None), ["rte"], [1e-4], best_rates)]
    labels = ["dense", "2:4 wanda, r = 0", "2:4 wanda, r = 4", "2:4 wanda, r = 4, early"]
    assert [(run.seed, run.label) for run in found] == [(seed, label) for seed in (0, 1) for label in labels]


def test_best_rates_of_adapters_are_those_without(monkeypatch):
    place = Place("glue_minilm.yaml", "glue", None)
    best = {
        (place.settings, "rte", "2:4 wanda, r = 0"): 4e-4,
        (place.settings, "rte", "2:4 wanda, r = 0, teacher"): 2e-4,
    }
    given = options("--methods", "sparse", "--ranks", "4", "--masks", "wanda", "--best-rates")

    def rates(starts):
        given.starts = starts
        return [run.rate for run in comparison.runs(given, place, ["rte"], [], lambda results: best)]

    assert rates(["plain", "early", "teacher", "early+teacher"]) == [4e-4, 4e-4, 2e-4, 2e-4]
    with pytest.raises(SystemExit, match="has no run of rte, 2:4 wanda, r = 4, gradual to choose from"):
        rates(["gradual"])


# Runs ------------------------------------------------------------------------------------------------------------------


def test_every_start_runs_after_the_dense_runs_it_needs(tmp_path, data, caplog, monkeypatch):
    made = made_runs(monkeypatch)
    folder = recovered(tmp_path, "--model.slope.mask", "transposable", transposable=3)
    arguments = ["--masks", "transposable", "--ranks", "4", "--rates", "1e-3", "--starts"]
    every = [*arguments, *STARTS, "teacher+gradual", "--recovered", str(folder)]
    assert go(tmp_path, data, *every, "--methods", "sparse") == 0
    dense = "rte, dense, rate 0.001, seed 0"
    assert made[0] == dense
    assert {name.split(", rate")[0] for name in made[1:3]} == {
        f"rte, first stage of 2:4 transposable, r = 0{more}" for more in ("", ", teacher")
    }
    assert len(made) == 9
    results = {result.label: result for result in read(tmp_path / "results.csv")}
    assert next(iter(results)) == "dense"  # made for others, and a result of its own
    before = {result.start: result.steps_before for result in results.values()}
    assert before == {
        "plain": 0, "early": 0, "teacher": 0, "tuned": 20, "recovered=novels-3": 3, "gradual": 20, "teacher+gradual": 20,
    }  # fmt: skip
    woke = {result.start: result.woke_at_step for result in results.values()}
    assert (woke["early"], woke["gradual"]) == (0, 19)
    # Nothing of it is made again, and the first stages serve other ranks.
    made.clear()
    assert go(tmp_path, data, *every) == 0
    assert made == []
    assert go(tmp_path, data, *arguments, "gradual", "--ranks", "8") == 0
    assert made == ["rte, 2:4 transposable, r = 8, gradual, rate 0.001, seed 0"]
    # The second stage has the masks that the first one faded to, and the teacher was read.
    (stage,) = (tmp_path / "starts").glob("rte-fade-transposable-r0-plain-*")
    masks = faded_masks(json.loads((stage / "start.json").read_text())["checkpoint"])
    assert len(masks) == 10
    assert caplog.text.count("head included, faded to 2:4 masks") == 3
    assert caplog.text.count("head included, dense") == 1
    assert caplog.text.count("Teacher: ") == 3


def test_a_first_stage_of_another_share_is_not_taken_for_this_one(tmp_path, data, monkeypatch):
    arguments = ["--methods", "sparse", "--starts", "gradual"]
    assert go(tmp_path, data, *arguments) == 0
    made = []
    train = comparison.train
    monkeypatch.setattr(comparison, "train", lambda run, *rest: made.append(run) or train(run, *rest))
    assert go(tmp_path, data, *arguments, "--fade", "0.25") == 0
    assert [(run.method, run.fade) for run in made] == [("fade", 0.25), ("sparse", 0.25)]
    assert [r.start for r in read(tmp_path / "results.csv")] == ["gradual", "gradual=0.25"]


def test_weights_may_be_a_pretraining_checkpoint(tmp_path, data, capsys):
    """The chain by the runner: masks kept, no vocabulary taken from the checkpoint, checkpoints told apart."""
    saved = [pretrained(tmp_path, name, "--seed_everything", str(i)) for i, name in enumerate(("one", "two"))]
    own = [
        "--config",
        "glue_minilm.yaml",
        "--data",
        str(data),
        "--tasks",
        "rte",
        "--in-process",
        "--runs",
        str(tmp_path),
    ]
    own += ["--data.tokenizer", str(SAMPLE / "vocab.txt"), "--data.max_length", "64", "--trainer.max_epochs", "1"]
    own += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    for checkpoint in saved:
        assert glue_all.main([*own, "--weights", checkpoint, "--methods", "sparse"]) == 0
    first, second = read(tmp_path / "results.csv")  # two runs, although both files are called checkpoints/last.ckpt
    assert first.settings != second.settings
    assert "weights=checkpoints/last.ckpt#" in first.settings
    (log,) = tmp_path.glob(f"{first.run.name}/log.txt")
    assert f"are still those of {saved[0]}" in log.read_text()
    for more in ([], ["--methods", "sparse", "--starts", "teacher"]):
        with pytest.raises(SystemExit, match="is of a 2:4 sparse model, from which no dense run can start"):
            glue_all.main([*own, "--weights", saved[0], *more])
    with pytest.raises(SystemExit, match=r"--weights: .*none\.ckpt: no such file"):
        glue_all.main([*own, "--weights", str(tmp_path / "none.ckpt")])


def test_a_start_that_failed_fails_those_that_need_it(tmp_path, data, capsys, monkeypatch):
    def failing(run, *rest):
        raise comparison.RunError("out of luck")

    monkeypatch.setattr(comparison, "train", failing)
    assert go(tmp_path, data, "--methods", "sparse", "--starts", "tuned") == 1
    said = capsys.readouterr().out
    assert "rte, dense, rate 0.001, seed 0 FAILED: out of luck" in said
    assert (
        "tuned, rate 0.001, seed 0 FAILED: rte, dense, rate 0.001, seed 0, which it starts from, is not there" in said
    )


def test_dry_run_lists_and_makes_nothing(tmp_path, data, capsys):
    assert go(tmp_path, data, "--starts", "plain", "gradual", "--seeds", "0", "0", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "3 runs, 0 of them done.\n1 dense runs that others start from come first.\n  rte, first stage of" in said
    assert not list(tmp_path.iterdir())


def test_several_processes_make_many_runs_each(tmp_path, data):
    assert go(tmp_path, data, "--jobs", "2", "--seeds", "0", "1", "--starts", "teacher") == 0
    assert len(read(tmp_path / "results.csv")) == 4


def test_processes_side_by_side_share_the_cores(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.get_num_threads", lambda: 32)
    seen = []

    def one(recipe, main, given, folder, in_process, defaults):
        seen.append(defaults)
        raise RunError("enough")

    monkeypatch.setattr(comparison.launching, "train_and_read", one)
    place = ["--csv", str(tmp_path / "my.csv"), "--runs", str(tmp_path), "--methods", "dense"]
    assert compare.main([*place, "--rates", "1e-4", "2e-4", "--jobs", "4"]) == 1
    assert seen == [{"OMP_NUM_THREADS": "8", "RAYON_NUM_THREADS": "8"}] * 2


def test_squad_is_compared_by_the_same_runner(tmp_path, capsys):
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config |= {"vocab_size": 2048, "max_position_embeddings": 96}
    save_pretrained(BertForQuestionAnswering(BertConfig(**config)), tmp_path / "weights")
    (tmp_path / "weights" / "vocab.txt").write_text((SAMPLE / "vocab.txt").read_text())
    file = tmp_path / "results.csv"
    arguments = ["--csv", str(file), "--runs", str(tmp_path), "--data", str(SAMPLE), "--in-process"]
    arguments += ["--weights", str(tmp_path / "weights"), "--starts", "plain", "teacher+gradual", "--masks", "wanda"]
    arguments += ["--data.max_length", "96", "--data.max_question_length", "24", "--data.max_train_questions", "60"]
    arguments += ["--data.max_dev_questions", "12", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
    assert compare.main([*arguments, "--trainer.precision", "32-true"]) == 0
    results = read(file)
    assert [result.label for result in results] == ["dense", "2:4 wanda, r = 0", "2:4 wanda, r = 0, teacher + gradual"]
    for result in results:
        assert result.score == result.f1 == result.published
        assert (result.dev_rows, result.train_rows_seen > 100, result.exact_match >= 0) == (12, True, True)
    assert results[-1].steps_before == results[-1].steps > 0
    assert "| 2:4 wanda, r = 0, teacher + gradual | 0.0002 | 1 |" in capsys.readouterr().out
    adapted = replace(results[1], rank=16, f1=results[1].f1 + 2)
    assert (
        "at r = 0:\n\n| method | seeds | SQuAD (F1) |\n|---|---|---|\n| 2:4 wanda, r = 16 | 1 | +2.00 |"
        in compare.report([*results, adapted])
    )
