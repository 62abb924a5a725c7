"""SQuAD and GLUE, killed in the middle of an epoch: the checkpoint on the way is what the next start goes on from."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from recipes.bert_large import glue, squad
from recipes.bert_large.glue_sample import write_sample
from slope_pl.data import SquadDataModule
from tests.recipes.test_squad_recipe import ROOT, SAMPLE, TINY

FOLDER = ROOT / "recipes" / "bert_large"
# What each recipe's configs lie over, its period, and small data.
RECIPES = {
    "squad": (squad, "base.yaml", 1000, ["--data.max_length", "96", "--data.doc_stride", "48"]),
    "glue": (glue, "glue_base.yaml", 2000, ["--data.task", "rte", "--data.max_length", "64"]),
}
SPARSE = ["--model.slope.adapter_rank", "4", "--model.slope.adapter_start", "0.8"]
SPARSE += ["--model.slope.backward_refresh_steps", "3"]


def every(base: str, period: int, steps: int) -> dict:
    """The trainer's section with the recipe's own callbacks, its checkpoint on the way every ``steps`` steps."""
    callbacks = yaml.safe_load((FOLDER / base).read_text(encoding="utf-8"))["trainer"]["callbacks"]
    (saver,) = (found for cb in callbacks if "every_n_train_steps" in (found := cb.get("init_args", {})))
    assert saver["every_n_train_steps"] == period
    saver["every_n_train_steps"] = steps
    return {"trainer": {"callbacks": callbacks}}


@pytest.mark.parametrize("base", ["bert_large/base", "bert_large/glue_base", "bert_large/pretrain_base", "gpt2/base"])
def test_what_is_saved_on_the_way_is_saved_at_the_end_of_a_step(base):
    text = (ROOT / "recipes" / f"{base}.yaml").read_text(encoding="utf-8")
    callbacks = yaml.safe_load(text)["trainer"]["callbacks"]
    found = [cb["class_path"] for cb in callbacks if "every_n_train_steps" in cb.get("init_args", {})]
    assert found == ["slope_pl.lightning.StepCheckpoint"]


def weights(home: Path) -> dict:
    return torch.load(home / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("name", RECIPES)
def test_killed_within_an_epoch_it_ends_as_the_run_that_was_not(name, kind, tmp_path, capfd):
    recipe, base, period, own = RECIPES[name]
    source = SAMPLE if name == "squad" else write_sample(tmp_path / "glue")
    often = tmp_path / "often.yaml"
    often.write_text(yaml.safe_dump(every(base, period, 3)), encoding="utf-8")
    command = [
        *("fit", "--config", str(FOLDER / f"{name}{'_dense' if kind == 'dense' else ''}.yaml")),
        *("--config", str(often), "--model.weights", "null", "--model.bert", json.dumps(TINY)),
        *("--data.source", str(source), "--data.tokenizer", str(SAMPLE / "vocab.txt"), *own),
        *("--data.batch_size", "4", "--data.num_workers", "0", "--trainer.max_epochs", "2"),
        *("--trainer.limit_train_batches", "8", "--trainer.limit_val_batches", "2", "--trainer.precision", "32-true"),
        *("--trainer.accelerator", "cpu"),
        *([] if kind == "dense" else SPARSE),
    ]
    callbacks = ["--trainer.callbacks+", "tests.faults.strike.Strike", "--trainer.callbacks.step", "14"]

    def arguments(folder: str, mark: Path) -> list[str]:
        where = ["--trainer.logger.init_args.save_dir", str(tmp_path / folder), "--trainer.logger.init_args.name", "x"]
        return [*command, *where, *callbacks, "--trainer.callbacks.mark", str(mark), "--resume", "auto"]

    recipe.main(arguments("whole", often))  # a mark that is there: nothing strikes
    again = arguments("runs", tmp_path / "mark")
    killed = subprocess.run([sys.executable, "-m", recipe.PROG.split()[-1], *again], cwd=ROOT, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()[-3000:]
    home = tmp_path / "runs/x/version_0"
    files = {path.name for path in (home / "checkpoints").iterdir()}
    assert files == {"step12.ckpt"}, "the newest alone"
    capfd.readouterr()
    recipe.main(again)
    assert f"going on from {home / 'checkpoints/step12.ckpt'}" in capfd.readouterr().err
    whole = tmp_path / "whole/x/version_0"
    a, b = weights(home), weights(whole)
    assert a.keys() == b.keys()
    assert [key for key in b if not torch.equal(a[key], b[key])] == []
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"last.ckpt", "step15.ckpt"}
    assert {path.name for path in (home / "checkpoints").iterdir()} == {"last.ckpt", "step15.ckpt", "step12.ckpt"}
    results = [json.loads((folder / "result-fit.json").read_text()) for folder in (home, whole)]
    assert [Path(result["checkpoint"]).name for result in results] == ["last.ckpt"] * 2
    for key in ("scores", "steps", "woke_at_step", "resetups"):
        assert results[0][key] == results[1][key]
    assert results[0]["steps"] == 16
    assert (results[0]["woke_at_step"] is None) == (kind == "dense")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_while_data_are_prepared_is_answered(name, tmp_path, monkeypatch, capfd):
    number, before = signal.Signals[name], signal.getsignal(signal.Signals[name])
    monkeypatch.setattr(SquadDataModule, "prepare_data", lambda self: os.kill(os.getpid(), number))
    where = ["--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    with pytest.raises(SystemExit) as stop:
        squad.main(["fit", "--config", str(FOLDER / "squad_sample.yaml"), "--model.bert", json.dumps(TINY), *where])
    assert stop.value.code == 128 + number
    assert f"{name}: it came before training began. Nothing was trained, so nothing is saved." in capfd.readouterr().out
    assert not list(tmp_path.glob("**/*.ckpt"))
    assert signal.getsignal(number) == before
