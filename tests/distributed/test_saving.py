"""Two processes (gloo, CPU): a folder that takes the place of an older one does so at once, or not at all."""

import pytest

from tests.distributed.processes import report_of_two

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return report_of_two("tests.distributed.saving_worker", tmp_path_factory.mktemp("saving"), 240)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3", "plain zero1"])
def test_the_old_one_is_whole_until_the_new_one_is(ranks, strategy):
    for report in ranks:
        seen, after, left = report[strategy]
        assert seen == [None, 2], "nothing is written into the final folder"
        assert after == 4
        assert left == ["last.ckpt"]


def test_a_run_that_changes_its_strategy_may_save_under_the_old_name(ranks):
    """Lightning removes what is there before it writes. Of two files the second takes the place of the first by itself."""
    for report in ranks:
        assert report["after_a_file"] == ([1, 2], 4, ["last.ckpt"])
        assert report["after_a_folder"] == ([1, 4], 4, ["last.ckpt"])


def test_a_full_disk_is_an_error_of_all_ranks_and_costs_nothing(ranks):
    for report in ranks:
        said, step, left = report["too_large"]
        assert "last.ckpt could not be written: File too large. " in said
        assert "bytes are free there. What was there before is whole" in said
        assert said.startswith("OSError: ")
        assert step == 2
        assert left == ["last.ckpt"]


def test_a_folder_that_is_no_checkpoint_stays(ranks):
    for report in ranks:
        said, left = report["not_ours"]
        assert "last.ckpt is a folder that holds thesis.tex, and no checkpoint: it stays" in said
        assert left == ["last.ckpt", "last.ckpt/thesis.tex"]


def test_no_run_goes_on_from_weights_alone(ranks):
    """It would begin at step 0, without a word."""
    for report in ranks:
        assert len(report["weights_alone"]) == 9
        for case, said in report["weights_alone"].items():
            assert said.startswith("CheckpointError: "), (case, said)
            assert "it holds weights alone (save_weights_only=True), or is damaged. Training cannot go on" in said, case


def test_a_folder_of_another_model_is_one_line_and_not_the_stacks_of_all_ranks(ranks):
    for report in ranks:
        said = report["another_model"]
        assert said.startswith("CheckpointError: ")
        assert "cannot be loaded: Missing key in checkpoint state_dict: state_dict.net.extra." in said
        assert said.endswith("It is damaged, or of another model or optimizer")
