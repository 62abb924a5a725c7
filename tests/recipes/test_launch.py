"""`make bert-large`: what it decides on which machine, and that it notices scores that differ."""

import json
import os

import pytest
import torch

from recipes import launching
from recipes.bert_large import launch


@pytest.fixture
def machine(monkeypatch):
    def make(gpu: bool, hub: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setattr(launching, "hub_is_reachable", lambda: hub)

    return make


@pytest.mark.parametrize(
    ("gpu", "hub", "data", "weights", "config"),
    [
        (True, True, None, None, "squad.yaml"),
        (True, False, "folder", "weights", "squad.yaml"),
        (True, False, "folder", None, "squad_sample.yaml"),
        (True, False, None, None, "squad_sample.yaml"),
        (False, True, None, None, "squad_sample.yaml"),
        (False, False, "folder", "weights", "squad_sample.yaml"),
    ],
)
def test_the_real_recipe_runs_where_everything_it_needs_is_there(machine, capsys, gpu, hub, data, weights, config):
    machine(gpu, hub)
    arguments = launch.plan(data, weights)
    assert arguments[:2] == ["--config", f"recipes/bert_large/{config}"]
    assert (data in arguments) == (data is not None)
    assert arguments.count("weights") == (2 if weights else 0)  # model and vocabulary
    said = capsys.readouterr().out
    assert ("RANDOM weights" in said) == (config == "squad_sample.yaml" and weights is None)


def test_own_data_with_the_samples_vocabulary_is_said(machine, capsys):
    machine(False, False)
    launch.plan("folder", None)
    assert "vocabulary of the bundled sample" in capsys.readouterr().out


@pytest.mark.parametrize(("f1", "status", "verdict"), [(50.0, 0, "the same."), (50.5, 1, "THEY DIFFER.")])
def test_scores_are_compared(tmp_path, capsys, f1, status, verdict):
    files = []
    for name, value in (("fit", 50.0), ("validate", f1)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"scores": {"val/f1": value}}))
    assert launch.compare(*files, checkpoint="last.ckpt") == status
    assert verdict in capsys.readouterr().out


def test_a_result_of_an_earlier_run_is_not_taken_for_the_new_one(tmp_path):
    old = tmp_path / "result-fit.json"
    old.write_text("{}")
    with pytest.raises(SystemExit, match=r"left no result-fit\.json"):
        launching.newest(str(tmp_path), "fit", before=launching.results(tmp_path, "fit"))


def test_a_failing_command_ends_the_run_with_its_status(machine, monkeypatch, tmp_path):
    machine(False, False)
    monkeypatch.setattr("sys.argv", ["launch", "--runs", str(tmp_path), "--", "--no_such_option"])
    monkeypatch.setattr(launch, "run", lambda subcommand, arguments: 2 if "--no_such_option" in arguments else 0)
    assert launch.main() == 2


def test_an_offline_hub_is_not_asked(monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    assert launching.hub_is_reachable() is False
