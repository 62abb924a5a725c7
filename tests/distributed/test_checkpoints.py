"""Checkpoints between strategies and numbers of processes: nothing is lost on the way, and nothing in them is run."""

import itertools

import pytest
import torch

from slope_pl import CheckpointError
from slope_pl.checkpoint import convert, read_checkpoint
from slope_pl.checkpoint.mark import named_states
from slope_pl.checkpoint.trusted import load_trusted
from slope_pl.checkpoint.whole import damage
from slope_pl.checkpoint.zero import describe_zero
from tests.distributed.checkpoint_worker import single, stretch
from tests.distributed.processes import report_of
from tests.lightning.toy import QUIET, assert_same

pytestmark = [pytest.mark.distributed, *QUIET]
WORKER = "tests.distributed.checkpoint_worker"
# Who saved, and who went on from it.
STEPS = (
    ("single/step=4.ckpt", "ddp"),
    ("ddp/step=8.ckpt", "zero3"),
    ("zero3/step=11.ckpt", "fsdp2_full"),
    ("fsdp2_full/step=13.ckpt", "fsdp2"),
    ("fsdp2/step=14.ckpt", "zero2"),
    ("zero2/step=16.ckpt", "zero1"),
    ("zero1/step=17.ckpt", "end"),
    ("bf16_2/step=6.ckpt", "bf16_3"),
    ("bf16_3/step=7.ckpt", "bf16_ddp"),
    ("fsdp2/step=14.ckpt", "fsdp2_4"),
    ("zero3/step=11.ckpt", "zero3_4"),
    ("zero2/step=16.ckpt", "zero2_4"),
    ("fsdp2_4/step=16.ckpt", "end_fsdp2_4"),
    ("zero3_4/step=13.ckpt", "end_zero3_4"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, and what the two processes report."""
    folder = tmp_path_factory.mktemp("checkpoints")
    stretch(folder / "whole", single(), 1, 20, every=1)
    stretch(folder / "single", single(), 1, 4)
    reports = [*report_of(2, WORKER, folder, 300), *report_of(4, WORKER, folder, 300)]
    for name, report in itertools.chain.from_iterable(report.items() for report in reports):
        assert name in ("armed", "built_in_parts", "evaluate") or report is None, report
    stretch(folder / "end", single(), 1, 20, folder / "zero1.ckpt")
    stretch(folder / "end_fsdp2_4", single(), 1, 20, folder / "fsdp2_4" / "step=16.ckpt")
    stretch(folder / "end_zero3_4", single(), 1, 20, folder / "zero3_4" / "step=13.ckpt")
    return folder, reports[:2]


def _without_layout(progress):
    """The position in the data without the batch of one rank and the number of ranks, which differ."""
    if "combined_loader" not in progress:
        return progress
    (position,) = progress["combined_loader"]
    return {key: value for key, value in position.items() if key not in ("batch_size", "ranks")}


def optimizer_of(content):
    (named,) = named_states(content, "")
    groups = [{key: list(v) if isinstance(v, tuple) else v for key, v in g.items()} for g in named["param_groups"]]
    return {"state": named["state"], "param_groups": groups}


@pytest.mark.parametrize(("source", "target"), STEPS)
def test_what_a_run_begins_with_is_what_the_other_ended_with(runs, source, target):
    """Bit for bit, whatever the strategy, the number of processes and the way."""
    folder, _ = runs
    before, after = read_checkpoint(folder / source), read_checkpoint(folder / target / "start.ckpt")
    # Of what ZeRO does not train it has no fp32 weights: in bf16, a frozen parameter comes back as bf16.
    own = {name: tensor.to(after["state_dict"][name].dtype) for name, tensor in before["state_dict"].items()}
    assert_same(dict(after["state_dict"]), own)
    assert_same(optimizer_of(after)["state"], optimizer_of(before)["state"])
    assert optimizer_of(after)["param_groups"] == optimizer_of(before)["param_groups"]
    assert optimizer_of(before)["param_groups"][1]["weight_decay"] == 0.05, "ZeRO has none while the adapters sleep"
    awake = before["global_step"] >= 13
    assert any("adapter" in name for name in optimizer_of(before)["state"]) == awake
    for key in ("global_step", "lr_schedulers"):
        assert after[key] == before[key]
    assert after["callbacks"]["SLoPeCallback"] == before["callbacks"]["SLoPeCallback"]


@pytest.mark.parametrize(
    ("end", "step"),
    [
        *[("ddp", 8), ("zero3", 11), ("fsdp2_full", 13), ("fsdp2", 14), ("zero2", 16), ("zero1", 17), ("end", 20)],
        *[("fsdp2_4", 16), ("zero3_4", 13), ("zero2_4", 17), ("end_fsdp2_4", 20), ("end_zero3_4", 20)],
    ],
)
def test_the_runs_are_parts_of_the_one_that_never_stopped(runs, end, step):
    folder, _ = runs
    whole, part = (read_checkpoint(folder / name / f"step={step}.ckpt") for name in ("whole", end))
    torch.testing.assert_close(part["state_dict"], whole["state_dict"], rtol=1e-5, atol=1e-6)
    for name, tensor in whole["state_dict"].items():
        if tensor.dtype is torch.uint8:
            assert torch.equal(part["state_dict"][name], tensor), name
    torch.testing.assert_close(optimizer_of(part)["state"], optimizer_of(whole)["state"], rtol=1e-4, atol=1e-6)
    assert part["callbacks"]["SLoPeCallback"] == whole["callbacks"]["SLoPeCallback"]
    # Not epoch_progress: Lightning itself counts an epoch twice that a run was resumed at the end of.
    for progress in ("state_dict", "epoch_loop.batch_progress", "epoch_loop.automatic_optimization.optim_progress"):
        own, want = (_without_layout(run["loops"]["fit_loop"][progress]) for run in (part, whole))
        assert own == want


@pytest.mark.parametrize(("end", "step"), [("zero3", 11), ("zero2", 16), ("zero1", 17), ("zero3_4", 13)])
def test_deepspeeds_own_counters_go_on(runs, end, step):
    folder, _ = runs
    own = load_trusted(describe_zero(folder / end / f"step={step}.ckpt").models[0])
    assert own["global_steps"] == step
    assert own["global_samples"] == 16 * step


@pytest.mark.parametrize("case", ["zero3 by zero3", "zero2 by zero3", "zero3 by zero2", "zero2 by fsdp2"])
def test_validation_restores_the_weights_and_the_phase(runs, case):
    folder, reports = runs
    source = "zero3/step=11.ckpt" if case.startswith("zero3") else "zero2/step=16.ckpt"
    want = read_checkpoint(folder / source, optimizer=False)["state_dict"]
    for report in reports:
        state, awake = report["evaluate"][case]
        assert_same(state, want)
        assert awake == [source.startswith("zero2")] * 3


def test_folders_that_would_run_code_are_refused(runs):
    folder, reports = runs
    for report in reports:
        assert len(report["armed"]) == 4
        for said in report["armed"].values():
            assert said.startswith("CheckpointError: "), said
            assert "mkdir" in said
    armed = list(folder.glob("armed *"))
    assert len(armed) == 4
    for path in armed:
        with pytest.raises(CheckpointError, match="mkdir"):
            convert(path, folder / "never.ckpt")
    assert not (folder / "executed").exists()
    torch.load(next(folder.rglob("armed meta.pt x/meta.pt")), weights_only=False)
    assert (folder / "executed").exists(), "the test's own bomb works"


def test_under_zero_3_the_new_layers_lie_in_parts_as_soon_as_they_are_made(runs):
    _, reports = runs
    for report in reports:
        assert report["built_in_parts"] == [0] * 9


def test_a_folder_with_missing_parts_is_refused(runs):
    folder, _ = runs
    assert damage(folder / "zero3_4" / "step=13.ckpt") is None
    (folder / "zero3_4" / "step=13.ckpt" / "checkpoint" / "zero_pp_rank_3_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="written by 4 processes, but has 4 files of model states and 3 of optim"):
        read_checkpoint(folder / "zero3_4" / "step=13.ckpt")
    assert "3 of optimizer states: its save was not finished" in damage(folder / "zero3_4" / "step=13.ckpt")
