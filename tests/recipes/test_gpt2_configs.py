"""Every GPT-2 config parses, says what it is, and its header's command is one that runs."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from recipes.cli import lay_over
from recipes.gpt2.pretrain import main
from slope_pl import ConfigError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "gpt2"
CONFIGS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
# Those for many devices are tested in test_multi_gpu.py.
RUNS = [name for name in CONFIGS if name != "base" and not name.endswith(("multi_gpu", "deepspeed"))]
METHOD_OF = {"dense": None, "slope": "slope", "transposable": "slope", "srste": "srste", "fst": "fst"}


def resolved(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def header(name: str) -> dict[str, str]:
    lines = [line.removeprefix("#").rstrip() for line in CONFIGS[name].read_text().splitlines() if line.startswith("#")]
    return {m[1]: m[2] for line in lines if (m := re.match(r" (\w+)\s{2,}(\S.*)", line))}


def test_no_config_is_overlooked():
    novels = {f"novels_{method}" for method in METHOD_OF}
    tiny = {"tiny_dense", "tiny_transposable", "tiny_srste", "tiny_fst"}
    assert (
        set(RUNS) | {"base"}
        == {"base", "small", "small_dense", "large", "large_dense", "novels", "tiny"} | novels | tiny
    )


@pytest.mark.parametrize("name", RUNS)
def test_config_parses_and_says_what_it_is(name, capsys, monkeypatch):
    assert header(name).keys() >= {"Reproduces", "Hardware", "Hours", "Metric", "Command"}
    command = shlex.split(header(name)["Command"])
    assert command[:4] == ["python", "-m", "recipes.gpt2.pretrain", "fit"]
    assert command[5] == f"recipes/gpt2/{name}.yaml"
    monkeypatch.chdir(ROOT)
    config = resolved(capsys, *command[4:])
    family, _, method = name.partition("_")
    if method:
        used = {key for key in ("slope", "srste", "fst") if config["model"][key] is not None}
        assert used == {METHOD_OF[method]} - {None}
        assert len([line for line in CONFIGS[name].read_text().splitlines() if line and line[0] != "#"]) <= 6
    batches = config["trainer"]["max_steps"] * config["trainer"]["accumulate_grad_batches"]
    assert batches % config["trainer"]["val_check_interval"] == 0
    if family in ("small", "large"):
        per_step = config["data"]["batch_size"] * config["trainer"]["accumulate_grad_batches"]
        assert (per_step, config["data"]["context"], config["trainer"]["max_steps"]) == (512, 1024, 400_000)


@pytest.mark.parametrize("family", ["small", "large", "novels", "tiny"])
def test_siblings_differ_in_the_method_alone(family, capsys):
    configs = [resolved(capsys, "--config", str(CONFIGS[name])) for name in RUNS if name.partition("_")[0] == family]
    assert len(configs) > 1
    for config in configs:
        for key in ("slope", "srste", "fst", "learning_rate"):
            del config["model"][key]
    assert all(config == configs[0] for config in configs)


def test_a_sibling_lies_over_its_family(tmp_path):
    novels, sibling = str(CONFIGS["novels"]), str(CONFIGS["novels_slope"])
    assert lay_over(["fit", "--config", sibling]) == ["fit", "--config", novels, "--config", sibling]
    assert lay_over(["fit", "-c", sibling, "--x", "1"]) == ["fit", "--config", novels, "-c", sibling, "--x", "1"]
    assert lay_over(["fit", f"--config={sibling}"]) == ["fit", "--config", novels, f"--config={sibling}"]
    given = ["fit", "--config", novels, "--config", sibling]
    assert lay_over(given) == given
    alone = str(tmp_path / "my_own.yaml")
    assert lay_over(["fit", "--config", alone]) == ["fit", "--config", alone]


@pytest.mark.parametrize("rank", [0, 4, 16])
@pytest.mark.parametrize("mask", ["magnitude", "random"])
def test_overrides_set_mask_and_rank(capsys, rank, mask):
    arguments = ["--model.slope.mask", mask, "--model.slope.adapter_rank", str(rank)]
    config = resolved(capsys, "--config", str(CONFIGS["novels_slope"]), *arguments)
    assert (config["model"]["slope"]["mask"], config["model"]["slope"]["adapter_rank"]) == (mask, rank)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.slope.mask", "banana"], "magnitude"),
        (["--model.slope.adaptor_rank", "4"], "adaptor_rank"),
        (["--model.srste.decai", "1e-6"], "decai"),
        (["--model.learning_rat", "1e-4"], "learning_rat"),
        (["--model.size", "tiny"], "small"),
        (["--model.gpt2.n_layers", "3"], "n_layers"),
        (["--data.context", "three"], "context"),
        (["--trainer.max_step", "3"], "max_step"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
    ],
)
def test_wrong_settings_are_named(capsys, arguments, message):
    with pytest.raises((SystemExit, ValueError)) as stop:
        main(["fit", "--config", str(CONFIGS["tiny"]), *arguments, "--print_config"])
    assert message in capsys.readouterr().err + str(stop.value)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in ("peak of the schedule", "how the model is made sparse", "Tokens a window", "--model.slope.help"):
        assert words in " ".join(text.split()), words


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--model.slope.adapter_rank", "0"], ConfigError, "^adapter_start=0.9, .* no effect without adapters"),
        (
            ["--model.gpt2.initializer_range", "-1"],
            ValueError,
            "^GPT2Config: initializer_range=-1.0, expected a positive",
        ),
        (
            ["--model.slope.layer_masks", '{"": "random"}'],
            ConfigError,
            "^layer_masks={'': 'random'}: a mapping of patterns",
        ),
    ],
)
def test_a_refused_setting_is_its_own_error(arguments, kind, message, monkeypatch, tmp_path):
    """And not the parser's, which lists every type that it has tried for the setting."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(kind, match=message) as caught:
        main(["fit", "--config", "recipes/gpt2/tiny.yaml", "--trainer.default_root_dir", str(tmp_path), *arguments])
    assert caught.value.__suppress_context__
