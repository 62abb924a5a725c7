"""Two gloo processes, and four, under FSDP2 and DeepSpeed's ZeRO: the numbers of DDP, exact resume, and clear refusals."""

import pytest
import torch

from slope_pl import sparsify
from tests.distributed.processes import report_of, report_of_two
from tests.distributed.sharded_worker import DAMAGED, RESUME_AT, WIDE, Double, Sparse
from tests.lightning.toy import CONFIG, QUIET, Net, assert_same, make_trainer

pytestmark = [pytest.mark.distributed, *QUIET]
SHARDING = ("fsdp2", "fsdp2_full", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return report_of_two("tests.distributed.sharded_worker", tmp_path_factory.mktemp("sharded"), 600)


def assert_one_with_a_larger_batch(reports, folder, name):
    """Same initial weights, the same windows in each step; what is left is the rounding of sums in another order.

    ZeRO computes in float32 alone: measured are 2e-7 of a loss and 3e-7 in a weight; masks and columns are the same.
    """
    module = (Sparse if "zero" in name else Double)()
    module.batch_size = 8 * len(reports)
    make_trainer(folder).fit(module)
    double = "zero" not in name
    losses = [sum(step) / len(reports) for step in zip(*(report["losses"] for report in reports), strict=True)]
    assert losses == pytest.approx(module.losses, rel=1e-12 if double else 2e-6)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if double else {"rtol": 1e-5, "atol": 5e-6}
    for report in reports:
        torch.testing.assert_close(report["model"], module.state_dict(), **tolerance)
    assert all(report["callback"] == {"resetups": 3, "last_resetup_step": 15, "woke_at_step": 12} for report in reports)


def of(ranks, name):
    both = [report[name] for report in ranks]
    for report in both:
        assert not isinstance(report, str), report
    return both


@pytest.mark.parametrize("name", SHARDING)
def test_the_numbers_are_those_of_ddp(ranks, name):
    for ddp, sharded in zip(of(ranks, "ddp"), of(ranks, name), strict=True):
        whole = sharded["whole"]
        assert whole["losses"][:12] == pytest.approx(ddp["losses"][:12], rel=1e-4)  # until the wake
        assert whole["losses"] == pytest.approx(ddp["losses"], rel=2e-3)
        assert whole["callback"] == ddp["callback"]
        torch.testing.assert_close(whole["model"], ddp["model"], rtol=2e-2, atol=2e-3)
        for key, tensor in ddp["model"].items():
            if key.endswith(".indices"):
                assert torch.equal(whole["model"][key], tensor)


@pytest.mark.parametrize("name", WIDE)
def test_two_processes_are_one_with_twice_the_batch(ranks, tmp_path, name):
    assert_one_with_a_larger_batch(of(ranks, name), tmp_path, name)


@pytest.mark.parametrize("name", SHARDING)
def test_both_ranks_have_one_model(ranks, name):
    zero, one = of(ranks, name)
    assert_same(zero["whole"]["model"], one["whole"]["model"])
    assert zero["whole"]["losses"] != one["whole"]["losses"], "the ranks must see different data"


@pytest.mark.parametrize("step", RESUME_AT)
@pytest.mark.parametrize("name", SHARDING)
def test_resume_is_bit_identical(ranks, name, step):
    for runs in of(ranks, name):
        whole, resumed = runs["whole"], runs[step]
        assert resumed["losses"] == whole["losses"][step:]
        assert_same(resumed["model"], whole["model"])
        assert resumed["callback"] == whole["callback"]


def test_fsdp2_equals_ddp_bit_for_bit(ranks):
    for ddp, sharded, accumulated, ddp_accumulated in zip(
        *(of(ranks, name) for name in ("ddp", "fsdp2", "fsdp2_accumulate", "ddp_accumulate")), strict=True
    ):
        assert sharded["whole"]["losses"] == ddp["losses"]
        assert_same(sharded["whole"]["model"], ddp["model"])
        assert accumulated["losses"] == pytest.approx(ddp_accumulated["losses"], rel=1e-5)


def test_each_rank_holds_half_and_keeps_no_operands(ranks):
    for ddp, fsdp2, zero3 in zip(*(of(ranks, name) for name in ("ddp", "fsdp2", "zero3")), strict=True):
        assert fsdp2["whole"]["own"] == pytest.approx(ddp["own"] / 2, rel=0.1)
        assert zero3["whole"]["own"] == 0
        assert fsdp2["whole"]["kept"] == zero3["whole"]["kept"] == [0, 0, 0]
        assert ddp["kept"] == [1, 1, 1]


def test_a_module_that_shards_itself_and_lightnings_own_strategies(ranks):
    for ours, own in zip(of(ranks, "fsdp2"), of(ranks, "fsdp2_own"), strict=True):
        assert own["losses"] == ours["whole"]["losses"]
    for ours, plain in zip(of(ranks, "zero2"), of(ranks, "zero_plain"), strict=True):
        assert plain["losses"] == ours["whole"]["losses"]


def test_a_net_that_is_never_whole_is_converted_too(ranks):
    for ours, late in zip(of(ranks, "zero3"), of(ranks, "zero3_late"), strict=True):
        assert late["losses"] == ours["whole"]["losses"]
        assert_same(late["model"], ours["whole"]["model"])
        assert late["own"] == 0


def test_a_net_of_the_meta_device_is_drawn_layer_by_layer_alike_on_all_ranks(ranks):
    with torch.device("meta"):
        alone = Sparse(Net())
    layers = sparsify(alone, CONFIG)
    alone.to_empty(device="cpu")
    for layer in layers.values():
        layer.reset_parameters()
    zero, one = of(ranks, "fsdp2_meta")
    assert_same(zero["model"], one["model"])
    assert zero["own"] < sum(p.numel() for p in alone.parameters()) * 0.6
    for name in layers:
        for report in (zero, one):
            ours = {key: tensor for key, tensor in report["begun"].items() if key.startswith(name)}
            assert_same(ours, {key: tensor for key, tensor in alone.state_dict().items() if key.startswith(name)})
    assert zero["losses"][-1] < zero["losses"][0]


@pytest.mark.parametrize("name", SHARDING)
def test_sleeping_adapters_do_not_move(ranks, name):
    """Members of the optimizer from the start, in a group that decays later."""
    for report in of(ranks, name):
        downs = report["whole"]["downs"]
        assert torch.equal(downs[0], downs[11])
        assert not torch.equal(downs[0], downs[13])


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    names = ("wide_ddp", "wide_fsdp2", "steps_300_ddp", "steps_300_fsdp2")
    return report_of(4, "tests.distributed.sharded_worker", tmp_path_factory.mktemp("four"), 600, *names)


@pytest.mark.parametrize("name", ["wide_ddp", "wide_fsdp2"])
def test_four_processes_are_one_with_four_times_the_batch(four, tmp_path, name):
    assert_one_with_a_larger_batch(of(four, name), tmp_path, name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_four_ranks_are_one_model_after_300_steps(four, strategy):
    """Each reports what lies on it: under FSDP2 its own masks, and the weights that all gather."""
    zero, *others = of(four, f"steps_300_{strategy}")
    assert zero["callback"] == {"resetups": 3, "last_resetup_step": 225, "woke_at_step": 200}
    assert all(zero["model"][f"net.blocks.{i}.adapter_up"].abs().max() > 1e-3 for i in range(3)), "adapters must train"
    for other in others:
        assert not set(other["losses"]) & set(zero["losses"]), "the ranks must see different data"
        assert_same(other["model"], zero["model"])
        assert other["callback"] == zero["callback"]


@pytest.mark.parametrize("name", DAMAGED)
def test_all_ranks_refuse_a_damaged_checkpoint(ranks, name):
    says = "net.blocks.1.values has shape (32, 8)" if "narrowed" in name else "is damaged or no checkpoint"
    for report in ranks:
        assert report[name].startswith("CheckpointError: ")
        assert says in report[name]


def test_refusals(ranks):
    for report in ranks:
        assert "ScheduleError" in report["mixed_groups"]
        assert "group of their own" in report["mixed_groups"]
        assert "is in no optimizer" in report["forgotten"]
        assert "ScheduleError: Lamb under DeepSpeed: ZeRO flattens parameters" in report["lamb"]
        assert "ConversionError: rank 1 has other masks than rank 0, in 3 layers" in report["other_masks"]
