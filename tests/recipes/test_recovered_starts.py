"""Comparisons that start from checkpoints of a recovery: names, checks before anything runs, and the runs."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from recipes.bert_large import comparison, glue_all
from recipes.bert_large.glue_sample import write_sample
from recipes.bert_large.ledger import read
from recipes.bert_large.methods import Place, check_recovered, recovered_checkpoint
from tests.recipes.test_comparison import PLAIN, go, made_runs, options, pretrained, recovered


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("glue"))


def test_another_folder_of_recoveries_is_another_run(tmp_path, monkeypatch):
    """By its name alone, so that a comparison goes on where the folder lies elsewhere."""
    starts = ["recovered", "plain", "recovered+teacher", "teacher+recovered", "gradual"]
    folder = tmp_path / "novels-1500"
    expected = ["recovered=novels-1500", "plain", "teacher+recovered=novels-1500", "gradual"]
    for place in (folder, Path("elsewhere/novels-1500/"), Path("novels-1500")):
        assert comparison.check_starts(starts, recovered=place) == expected
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert comparison.check_starts(["recovered"], recovered=Path(".")) == ["recovered=novels-1500"]
    both = comparison.check_starts(["early+recovered", "gradual"], 0.25, Path("b"))
    assert both == ["early+recovered=b", "gradual=0.25"]
    run = replace(PLAIN, rank=0, start="recovered=novels-1500")
    early = replace(PLAIN, start="early+teacher+recovered=b")
    assert (run.label, run.starts) == ("2:4 wanda, r = 0, recovered=novels-1500", {"recovered"})
    assert early.label == "2:4 wanda, r = 4, early + teacher + recovered=b"
    assert (early.starts, early.without("early")) == ({"early", "teacher", "recovered"}, "teacher+recovered=b")
    assert run.name != replace(run, start="recovered=b").name
    given = options("--starts", "plain", "recovered", "--recovered", str(folder))
    assert given.starts == ["plain", "recovered=novels-1500"]


@pytest.mark.parametrize("name", ["a+teacher", "a=b", "a,b", "/"])
def test_the_name_of_a_recovery_is_one_part_of_a_start(name, tmp_path):
    with pytest.raises(SystemExit, match=r"is part of the rows' and may not have \+, = or ,"):
        comparison.check_starts(["recovered"], recovered=tmp_path / name)


def test_a_folder_called_early_leaves_out_no_run(tmp_path):
    given = options(
        "--methods", "sparse", "--ranks", "0", "4", "--starts", "recovered", "early", "--recovered", "early-2"
    )
    found = comparison.runs(given, comparison.Place("x.yaml", "glue", None), ["rte"], [1e-3], dict)
    assert [(run.start, run.rank) for run in found] == [
        ("recovered=early-2", 0),
        ("recovered=early-2", 4),
        ("early", 4),
    ]


def test_a_recovery_is_for_sparse_runs(capsys):
    with pytest.raises(SystemExit):
        options("--methods", "dense", "--starts", "recovered", "--recovered", "x")
    assert "--recovered x has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["recovered", "teacher+recovered"])
def test_a_recovered_start_needs_its_folder(start):
    message = f"--starts {start} needs --recovered FOLDER, with checkpoints of pretrain_recover.yaml"
    for call in (lambda: comparison.check_starts(["plain", start]), lambda: options("--starts", "plain", start)):
        with pytest.raises(SystemExit) as stop:
            call()
        assert stop.value.code == message
    assert comparison.check_starts(["plain", "teacher"]) == ["plain", "teacher"]


@pytest.mark.parametrize("starts", [[], ["--starts", "plain", "teacher+gradual"]])
def test_a_folder_of_recoveries_without_a_start_from_it_is_a_mistake(capsys, starts):
    with pytest.raises(SystemExit) as stop:
        options("--recovered", "made/novels", *starts)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--recovered made/novels has no effect without a recovered start: add --starts recovered" in said
    assert options("--recovered", "made/novels", "--starts", "teacher+recovered").starts == ["teacher+recovered=novels"]


@pytest.mark.parametrize("starts", [["recovered"], ["plain", "teacher+recovered"]])
def test_a_run_starts_from_one_checkpoint(tmp_path, data, monkeypatch, starts):
    """Weights that are one, and a recovery, are two. A folder of weights is for the dense runs beside it."""
    monkeypatch.setattr(comparison, "train", lambda run, *rest: pytest.fail(f"{run} was run"))
    weights = str(tmp_path / "phase1.ckpt")  # whatever is in it, or that it is not there
    place = ["--config", "glue_minilm.yaml", "--data", str(data), "--runs", str(tmp_path), "--tasks", "rte"]
    asked = [*place, "--methods", "sparse", "--starts", *starts, "--recovered", str(tmp_path / "novels")]
    spelt = starts[-1].replace("recovered", "recovered=novels").replace("+", r"\+")
    message = f"--weights {weights} and --starts {spelt}: a run starts from one checkpoint; leave one of them out"
    with pytest.raises(SystemExit, match=f"^{message}$"):
        glue_all.main([*asked, "--weights", weights])
    given = options("--starts", *starts, "--recovered", "novels").starts
    Place("glue_minilm.yaml", "glue", str(tmp_path)).check_methods(["dense", "sparse"], given)
    Place("glue_minilm.yaml", "glue", None).check_methods(["dense", "sparse"], given)


def test_a_recovered_start_takes_the_checkpoint_of_its_rank_before_that_of_its_mask(tmp_path, monkeypatch):
    (tmp_path / "wanda.ckpt").touch()
    (tmp_path / "wanda-r4.ckpt").touch()
    (tmp_path / "magnitude-r16.ckpt").touch()
    run = replace(PLAIN, start="recovered=novels")
    assert recovered_checkpoint(run, tmp_path) == tmp_path / "wanda-r4.ckpt"
    assert recovered_checkpoint(replace(run, rank=0), tmp_path) == tmp_path / "wanda.ckpt"
    assert recovered_checkpoint(replace(run, mask="magnitude", rank=16), tmp_path) == tmp_path / "magnitude-r16.ckpt"
    monkeypatch.chdir(tmp_path)  # whatever directory the run is made in
    assert recovered_checkpoint(run, Path(".")) == tmp_path / "wanda-r4.ckpt"
    for other, names in (
        (replace(run, mask="magnitude"), "neither magnitude-r4.ckpt nor magnitude.ckpt"),
        (replace(run, mask="random", rank=0), "neither random-r0.ckpt nor random.ckpt"),
    ):
        with pytest.raises(SystemExit, match=f"--recovered .* has {names}: copy the checkpoint"):
            check_recovered([PLAIN, run, other], tmp_path)
    check_recovered([PLAIN, run], tmp_path)
    check_recovered([PLAIN], None)


@pytest.mark.parametrize(
    ("starts", "folder", "message"),
    [
        (
            ["recovered"],
            None,
            r"--starts recovered needs --recovered FOLDER, with checkpoints of pretrain_recover\.yaml",
        ),
        (["plain", "teacher+recovered"], None, r"--starts teacher\+recovered needs --recovered FOLDER"),
        (["recovered"], "nowhere", r"nowhere has neither transposable-r4\.ckpt nor transposable\.ckpt"),
        (["recovered"], "", "has neither"),
        (["tuned+recovered"], "a", r"--starts tuned\+recovered=a: a run starts from one place, recovered or tuned"),
        (
            ["gradual+recovered"],
            "a",
            r"--starts recovered=a\+gradual: a run starts from one place, recovered or gradual",
        ),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_recovered_starts_are_checked_before_anything_runs(tmp_path, data, monkeypatch, starts, folder, message, more):
    monkeypatch.setattr(comparison, "train", lambda run, *rest: pytest.fail(f"{run} was run"))
    given = [] if folder is None else ["--recovered", str(tmp_path / folder)]
    arguments = ["--methods", "sparse", "--masks", "transposable", "--ranks", "4", "--starts", *starts, *given, *more]
    with pytest.raises(SystemExit, match=message):
        go(tmp_path, data, *arguments)


def test_prepared_are_the_dense_runs_that_others_start_from_alone(tmp_path, data, capsys):
    """So they can be made while a recovery runs; the comparison itself then finds them, and still asks for its checkpoint."""
    asked = ["--methods", "sparse", "--seeds", "0", "1", "--starts", "teacher+recovered"]
    asked += ["--recovered", str(tmp_path / "later")]
    assert go(tmp_path, data, *asked, "--prepare", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "2 dense runs that others start from come first.\n  rte, dense, rate 0.001, seed 0\n" in said
    assert "teacher" not in said
    assert go(tmp_path, data, *asked, "--prepare") == 0
    assert [result.label for result in read(tmp_path / "results.csv")] == ["dense", "dense"]
    capsys.readouterr()
    assert go(tmp_path, data, *asked, "--prepare") == 0
    assert "--prepare: none of these runs starts from a dense one that is not there yet." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="later has neither"):
        go(tmp_path, data, *asked)


def test_recovered_starts_keep_the_masks_of_the_recovery(tmp_path, data, monkeypatch):
    """With a calibrated mask, of the checkpoint of the rank if there is one, whose adapters are awake; and a teacher."""
    folder = recovered(tmp_path, "--model.slope.mask_calibration_batches", "2", wanda=2, wanda_r4=3)
    given = {}
    train = comparison.train
    monkeypatch.setattr(
        comparison, "train", lambda run, job, more, keep: given.update({run.label: more}) or train(run, job, more, keep)
    )
    arguments = ["--methods", "sparse", "--masks", "wanda", "--ranks", "0", "4", "--recovered", str(folder)]
    assert go(tmp_path, data, *arguments, "--starts", "recovered", "recovered+teacher") == 0
    results = {result.label: result for result in read(tmp_path / "results.csv")}
    assert [(label, result.steps_before, result.steps) for label, result in results.items() if label != "dense"] == [
        ("2:4 wanda, r = 0, recovered=novels-3", 2, 20), ("2:4 wanda, r = 0, teacher + recovered=novels-3", 2, 20),
        ("2:4 wanda, r = 4, recovered=novels-3", 3, 20), ("2:4 wanda, r = 4, teacher + recovered=novels-3", 3, 20),
    ]  # fmt: skip
    assert given["dense"] == []
    assert results.pop("dense").steps_before == 0
    for label, result in results.items():
        start = folder / ("wanda-r4.ckpt" if result.rank else "wanda.ckpt")
        assert given[label][:2] == ["--model.weights", str(start)]
        assert f"Masks of 10 layers are still those of {start}." in (tmp_path / result.run.name / "log.txt").read_text()
        assert ("--model.teacher.checkpoint" in given[label]) == ("teacher" in label)


def test_recoveries_of_another_folder_are_made_again_and_no_folder_is_needed_for_what_is_done(
    tmp_path, data, monkeypatch, capsys
):
    folder = recovered(tmp_path, magnitude=3)
    other = tmp_path / "novels-2"
    other.mkdir()
    shutil.copy(pretrained(tmp_path, "two", steps=2), other / "magnitude.ckpt")
    made = made_runs(monkeypatch)

    def compare_from(place, *more):
        made.clear()
        asked = ["--methods", "sparse", "--starts", "recovered", "--recovered", str(place), *more]
        assert go(tmp_path, data, *asked) == 0
        return capsys.readouterr().out

    label = "rte, 2:4 magnitude, r = 0, recovered={}, rate {:g}, seed 0"
    assert "1 runs, 0 of them done." in compare_from(folder)
    assert made == [label.format("novels-3", 1e-3)]
    assert "1 runs, 0 of them done." in compare_from(other)
    assert made == [label.format("novels-2", 1e-3)]
    for place in (folder, other):
        shutil.rmtree(place)
        assert "1 runs, 1 of them done." in compare_from(place)
        assert made == []
    assert "1 runs, 1 of them done." in compare_from(tmp_path / "moved" / "novels-3")
    assert made == []
    with pytest.raises(SystemExit, match=r"novels-3 has neither magnitude-r0\.ckpt nor magnitude\.ckpt"):
        compare_from(folder, "--rates", "1e-3", "3e-3")  # one of the two is missing
    assert made == []
    found = [(result.start, result.steps_before) for result in read(tmp_path / "results.csv")]
    assert found == [("recovered=novels-3", 3), ("recovered=novels-2", 2)]
    assert "| 2:4 magnitude, r = 0, recovered=novels-2 |" in (tmp_path / "results.md").read_text()
