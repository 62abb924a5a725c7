"""The pretraining configs parse, say what they are, hold the published hyperparameters; what `make bert-pretrain` decides."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from recipes.bert_large import pretrain_launch
from recipes.bert_large.pretrain import main
from recipes.bert_large.pretrain_module import polynomial_rate
from recipes.cli import lay_over

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes/bert_large"
CONFIGS = {path.stem: path for path in sorted(FOLDER.glob("pretrain*.yaml"))}
# Those for many devices are tested in test_multi_gpu.py.
RUNS = [path for name, path in CONFIGS.items() if name != "pretrain_base" and not name.endswith("multi_gpu")]
HEADER = ("Reproduces", "Hardware", "Hours", "Metric", "Command")


def resolved(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def comments(path: Path) -> list[str]:
    return [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]


def command(path: Path) -> list[str]:
    """The command of a header, with its continuation line."""
    text = "\n".join(comments(path))
    found = re.search(r"^Command\s+(python -m .*(?:\n--.*)?)", text, re.M)
    return shlex.split(found[1])


def test_no_config_is_overlooked():
    kinds = ("phase1", "phase2", "phase1_novels", "phase2_novels", "tiny")
    phases = {f"pretrain_{name}{dense}" for name in kinds for dense in ("", "_dense")}
    assert {path.stem for path in RUNS} == phases | {"pretrain_tiny_phase2", "pretrain_recover"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_header_says_what_the_run_is(path):
    for label in HEADER:
        assert any(re.match(rf"{label}\s+\S", line) for line in comments(path)), label
    assert path.name in " ".join(comments(path))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_command_of_the_header_parses(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = command(path)
    assert words[:4] == ["python", "-m", "recipes.bert_large.pretrain", "fit"]
    assert f"recipes/bert_large/{path.name}" in words
    config = resolved(capsys, *words[3:])
    assert config["trainer"]["max_steps"] > 0
    recovers = path.name == "pretrain_recover.yaml"  # a fine-tuning on hidden states, the others are pretraining
    assert config["model"]["optimizer"] == ("adamw" if recovers else "lamb")
    assert (config["model"]["imitation"] is not None) == recovers


def test_recovery_imitates_what_it_starts_from_without_dropout(capsys):
    path = CONFIGS["pretrain_recover"]
    config = resolved(capsys, *command(path)[3:])
    model, data, trainer = config["model"], config["data"], config["trainer"]
    assert model["imitation"] == {"weight": 1.0, "teacher": None}
    assert (model["weights"], data["tokenizer"], data["source"]) == ("WEIGHTS", "WEIGHTS", "FOLDER")
    assert (model["bert"], model["start_from"], model["dropout"]) == (None, None, 0.0)
    assert model["slope"]["mask"] == "magnitude"
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0  # the last step is validated too
    # The line for adapters: awake in this run, from the first step on.
    (line,) = [line for line in comments(path) if line.startswith("Adapters")]
    options = shlex.split(re.search(r"--[^:]*", line)[0])
    slope = resolved(capsys, "fit", "--config", str(path), *options)["model"]["slope"]
    assert (slope["adapter_rank"], slope["adapter_start_step"]) == (16, 0)


@pytest.mark.parametrize("name", ["phase1", "phase2", "tiny"])
def test_dense_siblings_differ_in_the_method_alone(capsys, name):
    sparse = resolved(capsys, "fit", "--config", str(CONFIGS[f"pretrain_{name}"]))
    dense = resolved(capsys, "fit", "--config", str(CONFIGS[f"pretrain_{name}_dense"]))
    assert sparse["model"].pop("slope")["mask"] == "magnitude"
    assert dense["model"].pop("slope") is None
    assert sparse == dense


@pytest.mark.parametrize(
    ("name", "steps", "batch", "length", "predictions", "rate", "warmup"),
    [("phase1", 7038, 65536, 128, 20, 6e-3, 0.2843), ("phase2", 1563, 32768, 512, 80, 4e-3, 0.128)],
)
def test_published_hyperparameters(capsys, name, steps, batch, length, predictions, rate, warmup):
    config = resolved(capsys, "fit", "--config", str(CONFIGS[f"pretrain_{name}"]))
    data, model, trainer = config["data"], config["model"], config["trainer"]
    assert trainer["max_steps"] == steps
    assert data["batch_size"] * trainer["accumulate_grad_batches"] * trainer["devices"] == batch
    assert (data["max_length"], data["max_predictions"], data["short_probability"]) == (length, predictions, 0.1)
    assert (model["learning_rate"], model["warmup"], model["decay_power"]) == (rate, warmup, 0.5)
    assert (model["weight_decay"], model["adapter_weight_decay"]) == (0.01, 1e-4)
    assert (trainer["gradient_clip_val"], model["always_adapt"]) == (1.0, False)
    # The other hardware in the header is the same batch, and its last step is validated too.
    assert steps * trainer["accumulate_grad_batches"] % trainer["val_check_interval"] == 0
    text = " ".join(comments(CONFIGS[f"pretrain_{name}"]))
    devices, accumulate, every = (
        int(re.search(rf"--trainer\.{key} (\d+)", text)[1])
        for key in ("devices", "accumulate_grad_batches", "val_check_interval")
    )
    assert data["batch_size"] * accumulate * devices == batch
    assert steps * accumulate % every == 0


@pytest.mark.parametrize("rank", ["4", "16", "64"])
def test_the_ranks_of_the_header_parse(capsys, rank):
    (line,) = [line for line in comments(CONFIGS["pretrain_phase2"]) if line.startswith("Ranks")]
    start = re.search(r"adapter_start_step (\d+)", line)[1]
    assert int(start) == 1563 - 86
    wanted = ["--model.slope.adapter_rank", rank, "--model.slope.adapter_start_step", start]
    config = resolved(capsys, "fit", "--config", str(CONFIGS["pretrain_phase2"]), *wanted)
    assert config["model"]["slope"]["adapter_rank"] == int(rank)


def test_the_schedule_is_the_published_one():
    rate = polynomial_rate(7038, 0.2843, 0.5)
    assert rate(0) == pytest.approx(1 / 7038 / 0.2843)
    top = max(range(7038), key=rate)
    assert rate(top) == pytest.approx(1.0, abs=1e-3)
    assert rate(top + 1) == pytest.approx((1 - 0.2843) ** 0.5, abs=1e-3)
    assert rate(7037) == 0.0
    assert rate(7036) == pytest.approx((1 / 7038) ** 0.5)
    assert polynomial_rate(10, 0.0, 1.0)(0) == pytest.approx(0.9)


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"], ["-c", "{}"]])
def test_a_config_is_laid_over_those_that_it_continues(form):
    for name, under in (
        ("pretrain_phase1_dense", ["pretrain_phase1"]), ("pretrain_tiny_phase2", ["pretrain_tiny"]), ("pretrain_tiny", []),
    ):  # fmt: skip
        own = [part.format(CONFIGS[name]) for part in form]
        before = [word for sibling in under for word in ("--config", str(CONFIGS[sibling]))]
        assert lay_over(["fit", *own, "--x", "1"]) == ["fit", *before, *own, "--x", "1"]
        if under:
            assert lay_over(["fit", *before, *own]) == ["fit", *before, *own]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.slope.mask", "banana"], "magnitude"),
        (["--model.optimizer", "sgd"], "lamb"),
        (["--model.learning_rat", "1e-4"], "learning_rat"),
        (["--data.max_length", "three"], "max_length"),
        (["--data.context", "3"], "context"),
        (["--trainer.max_step", "3"], "max_step"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
    ],
)
def test_wrong_settings_are_named(capsys, arguments, message):
    with pytest.raises((SystemExit, ValueError)) as stop:
        main(["fit", "--config", str(CONFIGS["pretrain_tiny"]), *arguments, "--print_config"])
    assert message in capsys.readouterr().err + str(stop.value)


# The launcher ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "data", "configs"),
    [
        (True, "folder", ["pretrain_phase1.yaml", "pretrain_phase2.yaml"]),
        (True, None, ["pretrain_tiny.yaml", "pretrain_tiny_phase2.yaml"]),
        (False, "folder", ["pretrain_tiny.yaml", "pretrain_tiny_phase2.yaml"]),
    ],
)
def test_the_real_phases_run_with_a_gpu_and_a_text(monkeypatch, capsys, gpu, data, configs):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    phases = pretrain_launch.plan(data, "vocab.txt" if data else None)
    assert [Path(phase[1]).name for phase in phases] == configs
    real = gpu and data is not None
    assert all(("folder" in phase) == ("vocab.txt" in phase) == real for phase in phases)
    said = capsys.readouterr().out
    assert ("NOTE: your text is left aside" in said) == (data is not None and not real)
    for phase in phases:
        monkeypatch.chdir(ROOT)
        resolved(capsys, "fit", *phase)


def launched(monkeypatch, tmp_path, *arguments, losses=(2.0, 2.0), failing=None):
    """The commands that the launcher runs, with what they leave faked."""
    commands = []

    def run(subcommand, given):
        commands.append((subcommand, given))
        if len(commands) == failing:
            return 3
        folder = tmp_path / f"version_{len(commands)}"
        folder.mkdir()
        loss = losses[subcommand == "validate"]
        content = {"scores": {"val/loss": loss}, "checkpoint": f"{len(commands)}.ckpt"}
        (folder / f"result-{subcommand}.json").write_text(json.dumps(content))
        return 0

    monkeypatch.setattr(pretrain_launch, "run", run)
    monkeypatch.setattr("sys.argv", ["launch", "--runs", str(tmp_path), *arguments])
    return pretrain_launch.main(), commands


def test_phase_2_starts_from_the_checkpoint_of_phase_1(monkeypatch, tmp_path, capsys):
    status, commands = launched(monkeypatch, tmp_path, "--", "--trainer.max_steps", "7")
    assert status == 0
    assert [name for name, _ in commands] == ["fit", "fit", "validate"]
    assert "--model.start_from" not in commands[0][1]
    assert commands[1][1][commands[1][1].index("--model.start_from") + 1] == "1.ckpt"
    assert commands[2][1][-2:] == ["--ckpt_path", "2.ckpt"]
    assert all("--trainer.max_steps" in given for _, given in commands)
    assert "the same." in capsys.readouterr().out


def test_phase_1_can_be_left_out(monkeypatch, tmp_path):
    status, commands = launched(monkeypatch, tmp_path, "--start_from", "old.ckpt")
    assert status == 0
    assert [name for name, _ in commands] == ["fit", "validate"]
    assert commands[0][1][1].endswith("phase2.yaml")
    assert "old.ckpt" in commands[0][1]


def test_failures_and_differences_end_in_a_status(monkeypatch, tmp_path, capsys):
    for failing in (1, 2, 3):
        folder = tmp_path / str(failing)
        folder.mkdir()
        status, commands = launched(monkeypatch, folder, failing=failing)
        assert (status, len(commands)) == (3, failing)
    folder = tmp_path / "differ"
    folder.mkdir()
    assert launched(monkeypatch, folder, losses=(2.0, 2.1))[0] == 1
    assert "THEY DIFFER" in capsys.readouterr().out
