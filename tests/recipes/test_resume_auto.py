"""``fit --resume auto``: the same command, started again after whatever happened, ends as the run that nothing happened to."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from recipes import launching, resuming
from recipes.bert_large import glue, pretrain, squad
from recipes.gpt2.pretrain import main
from recipes.meter import _read
from slope_pl import CheckpointError, ConfigError
from tests.recipes.test_gpt2_recipe import ROOT, SMALL, STORIES

COMMAND = [
    *("fit", "--config", str(ROOT / "recipes/gpt2/tiny.yaml"), *SMALL, "--data.context", "32"),
    *("--data.source", str(STORIES / "stories.txt"), "--data.tokenizer", str(STORIES / "tokenizer.json")),
    *("--trainer.max_steps", "12", "--trainer.val_check_interval", "6", "--trainer.accelerator", "cpu"),
    *("--trainer.limit_val_batches", "2", "--trainer.log_every_n_steps", "4", "--model.sample_tokens", "8"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def fit(tmp_path, cache, capfd):
    """Runs the command; returns what it said on stderr."""

    def run(folder="runs", *arguments: str, resume: bool = True) -> str:
        where = ["--data.cache_dir", cache, "--trainer.logger.init_args.save_dir", str(tmp_path / folder)]
        main([*COMMAND, *where, *(["--resume", "auto"] if resume else []), *arguments])
        return capfd.readouterr().err

    return run


def weights(folder: Path) -> dict:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def without_times(curve: Path) -> list[str]:
    return sorted(curve.read_text().splitlines())


def test_a_run_killed_in_its_last_validation_gets_its_scores(fit, tmp_path):
    fit()
    result = tmp_path / "runs/gpt2/version_0/result-fit.json"
    expected = json.loads(result.read_text())["scores"]
    result.unlink()
    fit()
    found = json.loads(result.read_text())
    assert (found["stage"], found["steps"], found["scores"]) == ("fit", 12, expected)
    validated = result.with_name("result-validate.json")
    assert json.loads(validated.read_text())["scores"] == expected
    validated.unlink()
    fit()
    assert not validated.exists(), "there is a result: nothing is validated"


def test_the_same_command_goes_on_to_the_same_end(fit, tmp_path):
    fit("whole", resume=False)
    strike = ["--trainer.callbacks+", "tests.faults.strike.Strike", "--trainer.callbacks.mark", str(tmp_path / "mark")]
    strike += ["--trainer.callbacks.step", "8", "--trainer.callbacks.name", "SIGTERM"]
    with pytest.raises(SystemExit) as stop:
        fit("runs", *strike)
    assert stop.value.code == 143
    home, whole = tmp_path / "runs/gpt2/version_0", tmp_path / "whole/gpt2/version_0"
    file = home / "checkpoints/stopped-step9.ckpt"
    config = (home / "config.yaml").read_bytes()
    assert f"going on from {file}" in fit("runs", *strike)
    assert [path.name for path in (tmp_path / "runs/gpt2").iterdir()] == ["version_0"]
    assert (home / "config.yaml").read_bytes() == config
    assert yaml.safe_load((home / "config_resumed.yaml").read_text())["ckpt_path"] == str(file)
    a, b = weights(home), weights(whole)
    assert [name for name in b if not torch.equal(a[name], b[name])] == []
    assert without_times(home / "curve.csv") == without_times(whole / "curve.csv")
    results = [json.loads((folder / "result-fit.json").read_text()) for folder in (home, whole)]
    for key in ("scores", "tokens", "steps", "val_step", "woke_at_step", "resetups", "sample"):
        assert results[0][key] == results[1][key]
    # Once more: nothing is left to do, and nothing is written over.
    written = (home / "result-fit.json").read_bytes()
    before = launching.results(tmp_path, "fit")
    assert f"going on from {home / 'checkpoints/last.ckpt'}" in fit("runs", *strike)
    assert (home / "result-fit.json").read_bytes() == written
    assert without_times(home / "curve.csv") == without_times(whole / "curve.csv")
    assert launching.newest(str(tmp_path), "fit", before) == home / "result-fit.json"
    # A damaged one is left out and named, and one that was asked for by name is an error.
    last = home / "checkpoints/last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    said = fit("runs")
    assert f"{last} IS DAMAGED and left out: " in said
    assert f"going on from {file}" in said
    last.write_bytes(content)
    for subcommand in (["fit"], ["validate"]):
        with pytest.raises(CheckpointError, match=rf"{last} is damaged: the checksum of .* is wrong"):
            main([*subcommand, *COMMAND[1:], "--ckpt_path", str(last)])
    # Another rate is another run.
    said = fit("runs", "--model.learning_rate", "1e-3", "--trainer.max_steps", "6")
    assert f"{last} is of another run and left out: model.learning_rate = 0.002 there, 0.001 here" in said
    assert f"no whole checkpoint of this run below {tmp_path / 'runs/gpt2'}: IT BEGINS ANEW" in said
    assert json.loads((tmp_path / "runs/gpt2/version_1/result-fit.json").read_text())["steps"] == 6


def run_of(folder: Path, *files: str, learning_rate=0.1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {}} | ({} if "weights" in name else {"loops": {}}), folder / name)
    settings = {"model": {"learning_rate": learning_rate}, "data": {}, "seed_everything": 1, "trainer": {"devices": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def logger(save_dir, **settings):
    options = {"save_dir": str(save_dir), "name": "gpt2", "version": None, **settings}
    return {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": options}


SETTINGS = {"model": {"learning_rate": 0.1}, "data": {}, "seed_everything": 1}


def test_weights_alone_are_left_out_and_named(tmp_path):
    """A run with a second saver, of weights, would never go on."""
    home = tmp_path / "gpt2/version_0/checkpoints"
    run_of(home.parent, "checkpoints/a.ckpt", "checkpoints/weights.ckpt")
    os.utime(home / "a.ckpt", (1e6, 1e6))
    found = resuming.choose({"logger": logger(tmp_path)}, SETTINGS)
    assert found.checkpoint == str(home / "a.ckpt")
    assert f"{home / 'weights.ckpt'} holds weights alone (save_weights_only) and is left out" in found.lines[0]


def test_a_link_to_nothing_is_left_out_and_named(tmp_path):
    home = tmp_path / "gpt2/version_0/checkpoints"
    run_of(home.parent, "checkpoints/a.ckpt")
    (home / "last.ckpt").symlink_to("gone.ckpt")
    found = resuming.choose({"logger": logger(tmp_path)}, SETTINGS)
    assert found.checkpoint == str(home / "a.ckpt")
    assert (
        f"{home / 'last.ckpt'} IS DAMAGED and left out: it is a link to gone.ckpt, which is not there" in found.lines[0]
    )


def test_the_newest_of_all_versions_of_the_run(tmp_path):
    for i, (version, rate) in enumerate((("version_0", 0.1), ("version_1", 0.1), ("version_2", 0.3))):
        run_of(tmp_path / "gpt2" / version, "checkpoints/a.ckpt", learning_rate=rate)
        os.utime(tmp_path / "gpt2" / version / "checkpoints/a.ckpt", (1e6 + i, 1e6 + i))
    found = resuming.choose({"logger": logger(tmp_path)}, SETTINGS)
    assert found.checkpoint == str(tmp_path / "gpt2/version_1/checkpoints/a.ckpt")
    assert found.version == "version_1"
    assert "version_2" in found.lines[0]
    given = resuming.choose({"logger": logger(tmp_path, version=0)}, SETTINGS)
    assert (given.checkpoint, given.version) == (str(tmp_path / "gpt2/version_0/checkpoints/a.ckpt"), None)


def test_a_curve_ends_at_the_checkpoint_that_the_run_goes_on_from(tmp_path):
    """A killed run may have written more, and the last line by half; it writes all of that again."""
    curve = tmp_path / "curve.csv"
    curve.write_text("step,tokens,train_loss,val_loss\n5,10,2.5,\n6,12,2.0,\n6,12,,2.25\n7,14,1.5,\n8,1")
    assert _read(curve, 6) == [(5, 10, 2.5, None), (6, 12, 2.0, None), (6, 12, None, 2.25)]
    assert _read(curve, 0) == []
    assert _read(tmp_path / "none.csv", 6) == []


def test_what_is_left_out_is_named_once_a_run(tmp_path):
    run_of(tmp_path / "gpt2/version_0", "checkpoints/a.ckpt", "checkpoints/b.ckpt", learning_rate=0.3)
    (tmp_path / "gpt2/stray").mkdir()
    torch.save({}, tmp_path / "gpt2/stray/c.ckpt")
    found = resuming.choose({"logger": logger(tmp_path)}, SETTINGS)
    assert found.checkpoint is None
    assert len(found.lines) == 3
    assert "model.learning_rate = 0.3 there, 0.1 here" in "".join(found.lines)
    assert "c.ckpt is of another run and left out: no config.yaml above it says which" in "".join(found.lines)
    assert "IT BEGINS ANEW" in found.lines[-1]


def test_a_folder_that_the_config_names_is_looked_into(tmp_path):
    run_of(tmp_path / "logs/gpt2/version_0")
    (tmp_path / "scratch").mkdir()
    torch.save({}, tmp_path / "scratch/a.ckpt")
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}]
    trainer = {"logger": logger(tmp_path / "logs"), "callbacks": callbacks}
    assert resuming.choose(trainer, SETTINGS).checkpoint is None
    callbacks.append({"class_path": "x.ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "scratch")}})
    found = resuming.choose(trainer, SETTINGS)
    assert (found.checkpoint, found.version) == (str(tmp_path / "scratch/a.ckpt"), None)


@pytest.mark.parametrize("trainer", [{"logger": False}, {"logger": {"class_path": "x.WandbLogger", "init_args": {}}}])
def test_a_run_without_a_folder_is_told_so(trainer, tmp_path):
    with pytest.raises(ConfigError, match="does not know this run's folder"):
        resuming.choose(trainer, SETTINGS)
    run_of(tmp_path, "checkpoints/a.ckpt")
    found = resuming.choose({"logger": False, "default_root_dir": str(tmp_path)}, SETTINGS)
    assert found.checkpoint == str(tmp_path / "checkpoints/a.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "auto", "--ckpt_path", "a.ckpt"], "--resume auto and --ckpt_path a.ckpt contradict each other"),
        (["--resume", "a.ckpt"], "auto is all that it takes; name a checkpoint with --ckpt_path a.ckpt"),
    ],
)
def test_contradictions(arguments, message):
    with pytest.raises(ConfigError, match=message):
        main([*COMMAND, *arguments])


@pytest.mark.parametrize(
    ("recipe", "config"),
    [
        (main, "gpt2/small"),
        (pretrain.main, "bert_large/pretrain_phase1"),
        (squad.main, "bert_large/squad"),
        (glue.main, "bert_large/glue"),
    ],
)
def test_every_recipe_takes_it_in_fit_alone(recipe, config, capsys):
    arguments = ["--config", str(ROOT / f"recipes/{config}.yaml"), "--resume", "auto", "--print_config"]
    with pytest.raises(SystemExit) as stop:
        recipe(["fit", *arguments])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["resume"] == "auto"
    with pytest.raises(SystemExit) as stop:
        recipe(["validate", *arguments])
    assert stop.value.code == 2
    capsys.readouterr()


def test_processes_that_this_one_starts_get_the_checkpoint(tmp_path, monkeypatch, capsys):
    """Lightning starts ranks with the command line of their parent: they must not look again."""
    run_of(tmp_path / "gpt2/version_3", "checkpoints/a.ckpt")
    given = ["pretrain", "fit", "--model.learning_rate", "0.1", "--resume", "auto", "--data.source", "x"]
    given += ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*given])
    monkeypatch.setattr(resuming, "_difference", lambda config, settings: None)

    def enough(self):
        raise InterruptedError

    monkeypatch.setattr(LightningCLI, "_parse_ckpt_path", enough)
    with pytest.raises(InterruptedError):
        main()
    checkpoint = str(tmp_path / "gpt2/version_3/checkpoints/a.ckpt")
    end = ["--ckpt_path", checkpoint, "--trainer.logger.init_args.version", "version_3"]
    assert sys.argv == [*given[:4], *given[6:], *end]
    assert launching.without_resume(["fit", "--resume=auto", "--x"]) == ["fit", "--x"]


def test_rank_zero_decides(monkeypatch, tmp_path):
    """The other rank sees an empty disk, and does not even look."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    child = os.fork()
    monkeypatch.setenv("LOCAL_RANK", "0" if child else "1")
    if not child:
        try:
            told = resuming.decided_by_rank_zero(lambda: resuming.Choice("mine.ckpt"), 1)
            (tmp_path / "told").write_text(f"{told.checkpoint} {told.version}")
        finally:
            os._exit(0)
    decided = resuming.decided_by_rank_zero(lambda: resuming.Choice("zero.ckpt", "version_2"), 1)
    os.waitpid(child, 0)
    assert (decided.checkpoint, decided.version) == ("zero.ckpt", "version_2")
    assert (tmp_path / "told").read_text() == "zero.ckpt version_2"
