"""What the READMEs tell a user to do works: code blocks run, commands parse, targets and links exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.bert_large import compare, comparison, glue, glue_all, glue_plan, pretrain, squad
from recipes.bert_large.glue_sample import write_sample

ROOT = Path(__file__).parents[2]
READMES = [
    path
    for path in sorted(ROOT.rglob("README.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]


def blocks(language: str) -> list:
    found = []
    for path in READMES:
        for i, code in enumerate(re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)):
            found.append(pytest.param(code, id=f"{path.relative_to(ROOT)}-{i}"))
    return found


def commands(start: str) -> list[str]:
    lines = [line for block in blocks("sh") for line in block.values[0].splitlines()]
    return [line for line in lines if line.startswith(start)]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_block_runs(code, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_first_commands_are_the_two_of_the_readme():
    assert [line.split("#")[0].split() for line in commands("make ")[:2]] == [["make", "bert-large"], ["make", "test"]]


@pytest.mark.parametrize("line", commands("make "))
def test_make_target_exists(line):
    target = line.split()[1]
    done = subprocess.run(["make", "--dry-run", "PY=python", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_alone_lists_every_target():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert [target for target in targets if f"make {target} " not in listed] == []


RECIPES = {"squad": squad, "glue": glue, "pretrain": pretrain}


@pytest.mark.parametrize(
    "line", [line for name in RECIPES for line in commands(f"python -m recipes.bert_large.{name} fit")]
)
def test_fit_command_parses(line, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = line.split()[2].rpartition(".")[2]
    with pytest.raises(SystemExit) as stop:
        RECIPES[name].main([*shlex.split(line)[3:], "--print_config"])
    assert stop.value.code == 0
    told = {"squad": "max_answer_length", "glue": "task:", "pretrain": "start_from"}
    assert told[name] in capsys.readouterr().out


@pytest.mark.parametrize("subcommand", ["validate", "predict", "export"])
def test_the_other_subcommands_are_there(subcommand, capsys):
    assert commands(f"python -m recipes.bert_large.squad {subcommand}")
    with pytest.raises(SystemExit) as stop:
        squad.main([subcommand, "--help"])
    assert stop.value.code == 0
    assert "ckpt_path" in capsys.readouterr().out


RUNNERS = {"compare": compare, "glue_all": glue_all}


@pytest.mark.parametrize(
    "line", [line for name in RUNNERS for line in commands(f"python -m recipes.bert_large.{name}")]
)
def test_runner_command_plans_runs(line, monkeypatch, tmp_path, capsys):
    """As it stands, with folders that are there, best rates at hand and nothing made."""
    runner = RUNNERS[line.split()[2].rpartition(".")[2]]
    recovered = tmp_path / "recovered"
    recovered.mkdir()
    for mask in ("magnitude", "wanda"):
        (recovered / f"{mask}.ckpt").touch()
    folder = write_sample(tmp_path / "glue") if runner is glue_all else ROOT / "data/sample"
    places = {"FOLDER": str(folder), "WEIGHTS": str(tmp_path), "RECOVERED": str(recovered)}
    given = [places.get(word, word) for word in shlex.split(line)[3:]]
    monkeypatch.chdir(tmp_path if "--report" not in given else ROOT)
    monkeypatch.setattr(glue_plan, "minilm_folder", lambda: str(tmp_path))
    monkeypatch.setattr(compare, "minilm_folder", lambda: str(tmp_path))
    monkeypatch.setattr(glue_plan, "_shared_data", lambda: str(write_sample(tmp_path / "glue")))
    monkeypatch.setattr(comparison, "_best", lambda *arguments: 1e-4)
    assert runner.main([*given, *([] if "--report" in given else ["--dry-run"])]) == 0
    assert re.search(r"\d+ runs, 0 of them done|\| dense \|", capsys.readouterr().out)


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    assert [link for link in links if not link.startswith("http") and not (path.parent / link).exists()] == []
