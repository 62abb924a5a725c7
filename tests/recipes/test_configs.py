"""Every SQuAD config is parsed by the command line it is made for, and says what it is; other recipes test their own."""

import re
from pathlib import Path

import pytest
import yaml

from recipes.bert_large.squad import main

RECIPES = Path(__file__).parents[2] / "recipes"
# Those for many devices are tested in test_multi_gpu.py.
RUNS = [
    p for p in sorted((RECIPES / "bert_large").glob("squad*.yaml")) if not p.stem.endswith(("multi_gpu", "deepspeed"))
]
HEADER = ("Reproduces", "Hardware", "Hours", "Metric", "Command")


def resolved(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_no_config_is_overlooked():
    families = {f"{path.parent.name}/{path.stem.split('_')[0]}" for path in RECIPES.rglob("*.yaml")}
    tested = {
        "bert_large": ("base", "squad", "glue", "start", "pretrain"),
        "gpt2": ("base", "small", "large", "novels", "tiny"),
    }
    assert families <= {f"{folder}/{name}" for folder, names in tested.items() for name in names}
    assert [path.name for path in RUNS] == [
        "squad.yaml",
        "squad_dense.yaml",
        "squad_minilm.yaml",
        "squad_sample.yaml",
    ]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_config_parses(path, capsys):
    config = resolved(capsys, "--config", str(path))
    assert config["data"]["max_length"] > 0
    assert config["trainer"]["logger"]["class_path"] == "lightning.pytorch.loggers.TensorBoardLogger"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_header_says_what_the_run_is(path):
    comments = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    for label in HEADER:
        assert any(re.match(rf"{label}\s+\S", line) for line in comments), label
    assert path.name in " ".join(comments)


def test_sparse_and_dense_differ_in_the_method_alone(capsys):
    sparse = resolved(capsys, "--config", str(RECIPES / "bert_large/squad.yaml"))
    dense = resolved(capsys, "--config", str(RECIPES / "bert_large/squad_dense.yaml"))
    assert sparse["model"].pop("slope")["mask"] == "magnitude"
    assert dense["model"].pop("slope") is None
    assert sparse == dense


@pytest.mark.parametrize("rank", [0, 4, 16, 64])
def test_one_override_sets_the_rank(capsys, rank):
    config = resolved(
        capsys, "--config", str(RECIPES / "bert_large/squad.yaml"), "--model.slope.adapter_rank", str(rank)
    )
    assert config["model"]["slope"]["adapter_rank"] == rank


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.slope.mask", "banana"], "magnitude"),
        (["--model.slope.adaptor_rank", "4"], "adaptor_rank"),
        (["--model.learning_rat", "1e-4"], "learning_rat"),
        (["--data.max_length", "three"], "max_length"),
        (["--trainer.max_step", "3"], "max_step"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
    ],
)
def test_wrong_settings_are_named(capsys, arguments, message):
    with pytest.raises((SystemExit, ValueError)) as stop:
        main(["fit", "--config", str(RECIPES / "bert_large/squad_sample.yaml"), *arguments, "--print_config"])
    text = capsys.readouterr().err + str(stop.value)
    assert message in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.slope.adapter_rank", "-1"], "adapter_rank=-1"),
        (["--model.slope.adapter_rank_fraction", "0.1"], "give one of them"),
        (["--model.learning_rate", "0"], "learning_rate=0"),
        (["--data.max_length", "3"], "max_length"),
        (["--data.source", "no/such/folder/here"], "no/such/folder/here"),
        (["--model.weights", "./no_such_folder"], "no_such_folder"),
    ],
)
def test_wrong_values_are_named_before_training(capsys, tmp_path, arguments, message):
    small = ["--model.bert.num_hidden_layers", "1", "--trainer.max_steps", "1", "--trainer.default_root_dir"]
    with pytest.raises((SystemExit, ValueError, OSError)) as stop:
        main(
            [
                *("fit", "--config", str(RECIPES / "bert_large/squad_sample.yaml"), *small, str(tmp_path)),
                *("--trainer.logger", "false", *arguments),
            ]
        )
    assert message in capsys.readouterr().err + str(stop.value)
