"""Every GLUE config is parsed by the command line it is made for, and says what it is."""

import re
from pathlib import Path

import pytest
import yaml

from recipes.bert_large import squad
from recipes.bert_large.glue import main
from recipes.bert_large.glue_plan import RATES

FOLDER = Path(__file__).parents[2] / "recipes" / "bert_large"
CONFIGS = sorted(FOLDER.glob("glue*.yaml"))
RUNS = [path for path in CONFIGS if path.name != "glue_base.yaml"]
STARTS = sorted(FOLDER.glob("start_*.yaml"))  # laid over glue.yaml or squad.yaml
HEADER = ("Reproduces", "Hardware", "Hours", "Metric", "Command")


def resolved(capsys, *arguments: str, recipe=main) -> dict:
    with pytest.raises(SystemExit) as stop:
        recipe(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_no_config_is_overlooked():
    assert [path.name for path in CONFIGS] == [
        "glue.yaml",
        "glue_base.yaml",
        "glue_dense.yaml",
        "glue_minilm.yaml",
        "glue_sample.yaml",
    ]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_config_parses(path, capsys):
    config = resolved(capsys, "--config", str(path), "--data.task", "rte")
    assert config["data"]["task"] == "rte"
    assert config["trainer"]["logger"]["class_path"] == "lightning.pytorch.loggers.TensorBoardLogger"


@pytest.mark.parametrize("under", ["glue.yaml", "squad.yaml"])
@pytest.mark.parametrize("path", STARTS, ids=lambda path: path.name)
def test_a_start_changes_what_it_names(path, under, capsys):
    given = ["--config", str(FOLDER / under)]
    recipe = main if under == "glue.yaml" else squad.main
    plain, own = (resolved(capsys, *arguments, recipe=recipe) for arguments in (given, [*given, "--config", str(path)]))
    named = yaml.safe_load(path.read_text())["model"]
    for key, value in (named.pop("slope", {})).items():
        assert own["model"]["slope"].pop(key) == value
        plain["model"]["slope"].pop(key)
    for key, value in named.items():
        assert own["model"].pop(key) == value
        plain["model"].pop(key)
    assert own == plain


@pytest.mark.parametrize("path", RUNS + STARTS, ids=lambda path: path.name)
def test_header_says_what_the_run_is(path):
    comments = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    for label in HEADER:
        assert any(re.match(rf"{label}\s+\S", line) for line in comments), label
    assert path.name in " ".join(comments)


def test_sparse_and_dense_differ_in_the_method_alone(capsys):
    sparse = resolved(capsys, "--config", str(FOLDER / "glue.yaml"))
    dense = resolved(capsys, "--config", str(FOLDER / "glue_dense.yaml"))
    assert sparse["model"].pop("slope")["mask"] == "magnitude"
    assert dense["model"].pop("slope") is None
    assert sparse == dense


def test_published_settings(capsys):
    config = resolved(capsys, "--config", str(FOLDER / "glue.yaml"))
    assert (config["data"]["max_length"], config["data"]["batch_size"]) == (128, 4)
    assert (config["model"]["warmup"], config["seed_everything"]) == (0.1, 0)
    assert config["trainer"]["accumulate_grad_batches"] == 1


@pytest.mark.parametrize("name", RATES)
def test_the_configs_own_rate_is_the_first_of_the_runner(capsys, name):
    config = resolved(capsys, "--config", str(FOLDER / name))
    assert config["model"]["learning_rate"] == RATES[name][0]


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["validate", "--help"], ["export", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "recipes.bert_large.glue" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.slope.mask", "banana"], "magnitude"),
        (["--model.slope.adaptor_rank", "4"], "adaptor_rank"),
        (["--model.learning_rat", "1e-4"], "learning_rat"),
        (["--data.max_length", "three"], "max_length"),
        (["--trainer.max_step", "3"], "max_step"),
    ],
)
def test_wrong_settings_are_named(capsys, arguments, message):
    with pytest.raises((SystemExit, ValueError)) as stop:
        main(["fit", "--config", str(FOLDER / "glue.yaml"), *arguments, "--print_config"])
    assert message in capsys.readouterr().err + str(stop.value)
