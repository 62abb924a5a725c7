"""What the GPT-2 README tells a user to do works."""

import math
import re
import shlex
import shutil
import statistics
from pathlib import Path

import pytest
import yaml

from recipes.gpt2 import compare, plans
from recipes.gpt2.ledger import Curve, read, read_curves
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


def mean_drift(first: Curve, second: Curve, low: int, high: int) -> float:
    """By how much the second training loss is above the first, over the steps that both have."""
    losses = [{step: loss for step, _, loss, _ in curve.points if not math.isnan(loss)} for curve in (first, second)]
    return statistics.mean(losses[1][s] - losses[0][s] for s in losses[0].keys() & losses[1].keys() if low <= s <= high)


def test_the_drift_of_kernels_and_emulation_is_that_of_the_curves():
    ranges = [
        tuple(map(int, words))
        for words in re.findall(r" (\d+) to (\d+) ", README.split("mean of steps")[1].split("\n")[0])
    ]
    lines = re.findall(r"^\| (?:emulation minus kernels, )?seed (\d) ((?:\| \S+ )+)\|$", README, re.M)
    assert (len(ranges), [seed for seed, _ in lines]) == (4, ["0", "1", "2"])
    file = ROOT / "recipes/gpt2/results/kernels.csv"
    runs, curves = {(r.method, r.seed): r for r in read(file)}, read_curves(file)
    for seed, cells in lines:
        kernels, emulated = (runs[method, int(seed)] for method in ("slope r=0", "emulated r=0"))
        found = [mean_drift(curves[kernels.run], curves[emulated.run], *steps) for steps in ranges]
        found.append(emulated.val_loss - kernels.val_loss)
        assert [float(cell) for cell in cells.split() if cell != "|"] == pytest.approx(found, abs=6e-5)
    file = ROOT / "recipes/gpt2/results/novels.csv"
    own, curves = [r for r in read(file) if r.rate == 1.8e-3 and "size" not in r.settings], read_curves(file)
    pairs = [[r.run for r in own if r.seed == s and r.method in ("slope r=0", "slope r=16")] for s in range(5)]
    largest = [max(abs(mean_drift(curves[a], curves[b], *steps)) for a, b in pairs) for steps in ranges]
    row = re.search(r"^\| kernels minus the same kernels, largest of five pairs \| (.*) \| \|$", README, re.M)
    assert row is not None
    assert [float(cell) for cell in row[1].split(" | ")] == pytest.approx(largest, abs=6e-5)


def test_a_lever_s_difference_is_that_of_its_row():
    results = {round(r.val_loss, 4): r.val_loss for r in read(ROOT / "recipes/gpt2/results/levers.csv")}
    without = next(r.val_loss for r in read(ROOT / "recipes/gpt2/results/levers.csv") if r.method == "transposable r=0")
    lines = re.findall(r"\| (\d\.\d{4}) \| ([+-]\d\.\d{4}) \|$", README, re.M)
    assert len(lines) == len(results) - 1
    for loss, difference in lines:
        assert float(difference) == pytest.approx(results[float(loss)] - without, abs=6e-5)
