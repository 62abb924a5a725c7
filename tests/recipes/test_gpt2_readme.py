"""What the GPT-2 README tells a user to do works."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from recipes.gpt2 import compare, plans
from recipes.gpt2.module import GPT2Pretraining
from recipes.gpt2.pretrain import main
from slope_pl import SLoPeConfig
from slope_pl.baselines import FSTConfig, SRSTEConfig

CONFIGS = {"slope": SLoPeConfig, "srste": SRSTEConfig, "fst": FSTConfig}
ROOT = Path(__file__).parents[2]
README = (ROOT / "recipes/gpt2/README.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]


def commands(start: str) -> list[str]:
    return [line for line in LINES if line.startswith(start)]


def test_every_line_is_of_a_kind_that_is_tested():
    kinds = ["make gpt2", "python -m recipes.gpt2.pretrain ", "python -m recipes.gpt2.compare "]
    kinds += ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun ", "sbatch recipes/slurm.sh "]
    others = [line for line in LINES if not any(line.startswith(kind) for kind in kinds)]
    assert [line for line in others if not line.startswith("python -m recipes.gpt2.zeroshot ")] == []


@pytest.mark.parametrize("line", commands("python -m recipes.gpt2.pretrain fit"))
def test_fit_command_parses(line, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(line)[3:], "--print_config"])
    assert stop.value.code == 0
    assert "learning_rate" in capsys.readouterr().out


LEVERS = re.findall(r"^\| ([^|]+) \| `(--model[^`]+)` \|$", README, re.M)


@pytest.mark.parametrize(("lever", "arguments"), LEVERS)
def test_a_lever_is_one_of_its_config(lever, arguments, capsys, monkeypatch):
    """Read by the command line, taken by the module, and not without effect on what it is a lever of."""
    monkeypatch.chdir(ROOT)
    config = (re.findall(r"`(\w+\.yaml)`", lever) or ["novels_slope.yaml"])[0]
    seen = {}
    for more in ([], shlex.split(arguments)):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", f"recipes/gpt2/{config}", *more, "--print_config"])
        assert stop.value.code == 0
        seen[bool(more)] = yaml.safe_load(capsys.readouterr().out)["model"]
    assert seen[True] != seen[False]
    given = {name: seen[True][name] for name in CONFIGS if seen[True][name] is not None}
    methods = {name: CONFIGS[name](**fields.get("init_args", fields)) for name, fields in given.items()}
    module = GPT2Pretraining(**seen[True] | methods)
    assert module.architecture.n_layer == seen[True]["gpt2"]["n_layer"]


def test_all_levers_are_found():
    assert len(LEVERS) == 10


def test_the_lines_for_many_gpus_are_those_of_the_config():
    header = " ".join(
        line[1:].strip()
        for line in (ROOT / "recipes/gpt2/small_multi_gpu.yaml").read_text().splitlines()
        if line[:1] == "#"
    )
    lines = [line for line in LINES if "torchrun" in line or "sbatch" in line]
    assert len(lines) == 2
    for line in lines:
        assert line in header


@pytest.mark.parametrize("subcommand", ["validate", "generate", "export"])
def test_the_other_subcommands_are_there(subcommand, capsys):
    (line,) = commands(f"python -m recipes.gpt2.pretrain {subcommand}")
    with pytest.raises(SystemExit) as stop:
        main([subcommand, "--help"])
    assert stop.value.code == 0
    known = capsys.readouterr().out
    for option in re.findall(r"--\w+", line):
        assert option in known


@pytest.mark.parametrize("line", commands("python -m recipes.gpt2.compare run"))
def test_compare_command_plans_its_runs(line, monkeypatch, tmp_path):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "run_all", lambda options, overrides: seen.append((options, overrides)) or 0)
    monkeypatch.setattr(plans, "best_rates", lambda results: dict.fromkeys(map(str, compare_settings()), 1e-3))
    assert compare.main(shlex.split(line)[3:]) == 0
    found = plans.plans("novels", *seen[0])
    assert found
    for plan in found:
        arguments = compare.command_line(plan, ["--data.source", "FOLDER"], tmp_path, checkpoints=False)
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--print_config"])
        assert stop.value.code == 0


def compare_settings() -> list[str]:
    return [*plans.FAMILIES["novels"].methods.values()]


def test_report_command_runs(monkeypatch, tmp_path, capsys):
    """Where there is nothing, and of what is measured: then the README shows its tables, or the losses that are in them."""
    shutil.copytree(ROOT / "recipes/gpt2/results", tmp_path / "recipes/gpt2/results")
    monkeypatch.chdir(tmp_path)
    for line in commands("python -m recipes.gpt2.compare report"):
        assert compare.main(shlex.split(line)[3:]) == 0
        said = capsys.readouterr().out
        tables = re.findall(r"(?:^\|.*\n)+", said, re.M)
        if "my.csv" in line:
            assert "No results yet." in said
        elif "novels.csv" in line:
            small, medium, _, zeroshot = tables
            assert "| dense |" in small
            assert all(table in README for table in (small, medium, zeroshot))
        else:
            losses = re.findall(r"\| (\d\.\d{4}(?: ± \d\.\d{4})?) \|", tables[0])
            assert len(losses) >= 2
            assert all(loss in README for loss in losses)


def test_every_config_is_in_the_table():
    for path in (ROOT / "recipes/gpt2").glob("*.yaml"):
        assert f"[`{path.name}`]({path.name})" in README
