"""Two processes (gloo, CPU): what happens to one rank is acted on by both, in the same step."""

import pytest

from tests.distributed.processes import report_of_two
from tests.lightning.toy import assert_same

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return report_of_two("tests.distributed.faults_worker", tmp_path_factory.mktemp("faults"), 240)


def test_watching_changes_nothing(ranks):
    for report in ranks:
        assert_same(report["watched"], report["whole"])
        assert report["whole"]["error"] is None


def test_a_bad_loss_of_one_rank_stops_both_and_is_in_no_file(ranks):
    for report in ranks:
        found = report["stop"]
        assert "optimizer step 9 (epoch 2) is not finite. rank 1: loss nan in batch 1. Nothing" in found["error"]
        assert "rank 0" not in found["error"]
        assert found["files"] == sorted(f"step={step}.ckpt" for step in range(1, 10))


def test_both_ranks_leave_out_the_step(ranks):
    zero, one = (report["skip"] for report in ranks)
    for found in (zero, one):
        assert (found["skipped"], found["error"], found["steps"]) == (1, None, 20)
    assert_same(zero["model"], one["model"])
    assert all(tensor.isfinite().all() for tensor in zero["model"].values())


def test_a_signal_to_one_rank_stops_both_after_the_same_step(ranks):
    for report in ranks:
        found = report["signalled"]
        assert (found["first"]["error"], found["second"]["error"]) == (143, None)
        assert found["first"]["steps"] == 11, "sent in step 10, agreed on in the step after"
        assert found["file"] == "stopped-step11.ckpt"
        assert found["first"]["losses"] + found["second"]["losses"] == report["whole"]["losses"]
        assert_same(found["second"]["model"], report["whole"]["model"])
