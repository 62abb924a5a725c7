"""The runner of strategies: its runs are the recipe's own command line, its table compares like with like."""

import argparse
import dataclasses

import pytest
import yaml

from recipes.gpt2 import strategies
from recipes.gpt2.compare import command_line
from recipes.gpt2.ledger import Curve, Result, read
from recipes.gpt2.plans import Plan
from recipes.gpt2.pretrain import main as pretrain
from recipes.gpt2.strategies import SINGLE, Setting, main, report, wanted
from recipes.launching import RunError

RESULT = Result(
    **{"run": "", "family": "strategies", "method": "", "settings": "", "rate": 1.8e-3, "seed": 0, "val_loss": 5.0},
    **{"steps": 10, "tokens": 1000, "tokens_per_second": 1000.0, "seconds": 10.0, "peak_bytes": 2**30, "resetups": 2},
    **{"switched_at_step": 7, "gpu": "G", "driver": "d", "torch": "2", "cuda": "13", "cusparselt": "none"},
    **{"slope_pl": "0", "commit": "c", "text": "t"},
)


def row(setting: Setting, **changes) -> Result:
    settings = setting.settings("tiny.yaml", 16)
    return dataclasses.replace(RESULT, method=setting.method, settings=settings, **changes)


@pytest.mark.parametrize(
    "setting",
    [
        *(Setting(name, 2 if name != SINGLE else 1) for name in strategies.STRATEGIES),
        *(Setting(name, 1, dense=True) for name in strategies.DENSE),
        Setting("ZeRO-3", 1, compiled=False),
    ],
    ids=lambda setting: setting.method,
)
@pytest.mark.parametrize("config", ["tiny.yaml", "novels_slope.yaml"])
def test_settings_are_the_recipes_own(setting, config, tmp_path, capsys):
    plan = Plan("strategies", setting.method, setting.settings(config, 16), 1e-3, 0)
    arguments = command_line(plan, [], tmp_path, checkpoints=False)
    with pytest.raises(SystemExit) as stop:
        pretrain([*arguments, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    found = yaml.safe_load("\n".join(line for line in printed if not line.startswith("[")))  # DeepSpeed's log
    assert int(found["trainer"]["devices"]) == setting.devices
    assert found["trainer"]["max_steps"] == found["trainer"]["val_check_interval"] == 16
    assert (found["model"]["slope"] is None) is setting.dense
    assert found["model"]["compile"] is setting.compiled
    if setting.strategy == strategies.UNCHECKED:
        given = found["trainer"]["strategy"]["init_args"]["deepspeed_config"]
        assert given["bf16"] == {"enabled": True, "check_grad_overflow": False}
    if not setting.dense:
        slope = found["model"]["slope"]
        assert (slope["adapter_rank"], slope["adapter_start"], slope["backward_refresh_steps"]) == (16, 0.75, 5)


def test_what_others_are_compared_with_is_run_once_and_first():
    options = argparse.Namespace(devices=[1, 2], strategies=["DDP", SINGLE], eager=["ZeRO-3"], dense=["DDP"])
    assert [(setting.method, setting.devices) for setting in wanted(options)] == [
        *((SINGLE, 1), (f"{SINGLE}, eager", 1), (f"dense, {SINGLE}", 1)),
        *(("DDP", 1), ("ZeRO-3, eager", 1), ("dense, DDP", 1)),
        *(("DDP", 2), ("ZeRO-3, eager", 2), ("dense, DDP", 2)),
    ]


def test_a_step_is_compared_with_one_of_its_kind():
    text = report(
        [
            row(Setting(SINGLE, 1)),
            row(Setting("DDP", 2), tokens=2000, tokens_per_second=1600.0),
            row(Setting(SINGLE, 1, dense=True), tokens_per_second=500.0, resetups=0, switched_at_step=-1),
            row(Setting("DDP", 2, dense=True), tokens=2000, tokens_per_second=500.0, switched_at_step=-1),
            row(Setting("ZeRO-3", 1, compiled=False)),
            row(Setting(strategies.UNCHECKED, 1)),
        ]
    )
    assert f"| {strategies.UNCHECKED} | 1 |" in text
    assert "| DDP | 2 | 125.0 | 1.250 | 1,600 | 1.00 | 5.0000 | 2, step 7 |" in text
    assert "| dense, DDP | 2 | 400.0 | 2.000 | 500 | 1.00 | 5.0000 | - |" in text
    assert "| ZeRO-3, eager | 1 | 100.0 | nan | " in text, "one device was not run eagerly"


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    made = []

    def train(plan, location, options, environment):
        if plan.method == "FSDP2" and "FSDP2" not in made:
            made.append(plan.method)
            raise RunError("status 1")
        made.append(plan.method)
        result = dataclasses.replace(RESULT, method=plan.method, settings=plan.settings, rate=plan.rate)
        return result, Curve("r", [(1, 100, 6.0, 5.0)]), tmp_path / "none"

    monkeypatch.setattr(strategies, "train", train)
    monkeypatch.delenv("SLOPE_DATA_DIR", raising=False)
    arguments = ["--csv", str(tmp_path / "my.csv"), "--strategies", "DDP", "FSDP2", "--devices", "2", "--steps", "16"]
    assert main(arguments) == 1
    assert "FSDP2, by 2 FAILED: status 1" in capsys.readouterr().out
    assert main(arguments) == 0
    assert made == [SINGLE, "DDP", "FSDP2", "FSDP2"]
    assert [result.method for result in read(tmp_path / "my.csv")] == [SINGLE, "DDP", "FSDP2"]
    assert main([*arguments[:2], "--report"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main([*arguments[:2], "--steps", "7"])
    assert "--steps 7: 8 or more are expected" in capsys.readouterr().err
