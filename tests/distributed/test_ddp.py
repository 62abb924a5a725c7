"""Two processes (gloo, CPU): ranks that see different data, and begin with different weights, stay one model."""

import pytest
import torch

from slope_pl import SLoPeCallback
from tests.distributed.processes import report_of_two
from tests.distributed.worker import OPTIONS, OTHERS, RESUME_AT
from tests.lightning.toy import CONFIG, QUIET, Toy, assert_same, make_trainer

pytestmark = [pytest.mark.distributed, *QUIET]

TIMEOUT_S = 240


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks report of every scenario; one start of the processes serves all tests."""
    return report_of_two("tests.distributed.worker", tmp_path_factory.mktemp("ddp"), TIMEOUT_S)


def of(ranks, name):
    """Both ranks' reports of a scenario; a scenario that raised fails the test with its traceback."""
    both = [report[name] for report in ranks]
    for report in both:
        assert not isinstance(report, str), report
    return both


def assert_one_model(zero, one):
    """Bit-identical at the beginning and the end of every batch, although every loss was another."""
    assert not set(zero["losses"]) & set(one["losses"]), "the ranks must see different data"
    for at_zero, at_one in zip(zero["fingerprints"], one["fingerprints"], strict=True):
        assert at_zero == at_one, f"ranks differ at step {at_zero[0]}, {at_zero[1]} of the batch"
    for part in ("model", "optimizer", "callback"):
        assert_same(zero[part], one[part])


def test_ranks_stay_identical_for_100_steps(ranks):
    zero, one = of(ranks, "plain")
    assert_one_model(zero, one)
    assert len(zero["fingerprints"]) == 200
    assert zero["callback"] == {"resetups": 4, "last_resetup_step": 80, "woke_at_step": 70}
    assert all(zero["model"][f"net.blocks.{i}.adapter_up"].abs().max() > 1e-3 for i in range(3)), "adapters must train"


@pytest.mark.parametrize("option", OPTIONS)
def test_ddp_options_give_the_plain_result(ranks, option):
    """Frozen adapters are no unused parameters, whatever the reducer is told."""
    zero, one = of(ranks, option)
    assert_one_model(zero, one)
    assert_same(zero["model"], of(ranks, "plain")[0]["model"])


@pytest.mark.parametrize("scenario", OTHERS)
def test_ranks_stay_identical(ranks, scenario):
    assert_one_model(*of(ranks, scenario))


@pytest.mark.parametrize(("scenario", "accumulate"), [("float64", 1), ("float64_accumulate", 2)])
def test_two_processes_are_one_with_twice_the_batch(ranks, tmp_path, scenario, accumulate):
    """Rank 0's weights, the same windows in each step; sums of float64 in another order."""
    zero, one = of(ranks, scenario)
    module = Toy(batch_size=16)
    make_trainer(tmp_path, SLoPeCallback(CONFIG), precision="64-true", accumulate_grad_batches=accumulate).fit(module)
    mean = [(a + b) / 2 for a, b in zip(zero["losses"], one["losses"], strict=True)]
    assert mean == pytest.approx(module.losses, rel=1e-9)
    torch.testing.assert_close(zero["model"], module.state_dict(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("step", RESUME_AT)
def test_resume_is_bit_identical_on_both_ranks(ranks, step):
    for runs in of(ranks, "resume"):
        whole, resumed = runs["whole"], runs[step]
        assert resumed["losses"] == whole["losses"][step:]
        assert resumed["fingerprints"] == whole["fingerprints"][2 * step :]
        for part in ("model", "optimizer", "callback"):
            assert_same(resumed[part], whole[part])
    assert_one_model(*(runs[step] for runs in of(ranks, "resume")))


def test_operands_are_made_once_an_optimizer_step(ranks):
    """Four micro-batches share them."""
    for report in of(ranks, "operands"):
        assert report["made"] == 6 * 3


@pytest.mark.parametrize("strategy", ["ddp", "slope_ddp"])
def test_other_buffers_are_sent_as_ever(ranks, strategy):
    """Those of a batch norm are rank 0's when a forward begins, after the wake too; in between each rank moves its own."""
    zero, one = of(ranks, f"batch_norm, {strategy}")
    assert len(zero["begun_with"]) == 20
    assert_same(zero["begun_with"], one["begun_with"])
    own = "net.norm.running_mean"
    assert not torch.equal(zero["model"].pop(own), one["model"].pop(own)), "the ranks must see different data"
    del zero["model"]["net.norm.running_var"], one["model"]["net.norm.running_var"]
    assert_same(zero["model"], one["model"])


@pytest.mark.parametrize(
    ("scenario", "says"),
    [
        ("differ at the start", "in 3 layers (net.blocks.0, ...): all ranks have to convert the same weights"),
        ("differ at a re-setup", "in 1 layers (net.blocks.1, ...): they were alike before, and something changed"),
        ("differ at a re-setup", "on one rank before step 10."),
        ("columns differ at a re-setup", "on one rank before step 10."),
        ("differ at the wake", "on one rank before step 12."),
    ],
)
def test_a_rank_with_other_masks_is_an_error_on_all(ranks, scenario, says):
    """At the start where DDP is told not to align buffers; later wherever they would be chosen or aligned anew."""
    for report in ranks:
        assert "ConversionError: rank 1 has other masks than rank 0" in report[scenario]
        assert says in report[scenario]
