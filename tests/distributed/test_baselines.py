"""Two processes (gloo, CPU): the baselines under DDP stay one model, and prune by random numbers of their own."""

import pytest

from tests.distributed.processes import report_of_two
from tests.lightning.toy import QUIET, assert_same

pytestmark = QUIET


@pytest.mark.distributed
def test_two_ranks_stay_one_model(tmp_path):
    zero, one = report_of_two("tests.distributed.baseline_worker", tmp_path, 240)
    for name, (history, losses, state, streams) in zero.items():
        other_history, other_losses, other_state, other_streams = one[name]
        assert len(losses) == 20
        assert not set(losses) & set(other_losses), "the ranks must see different data"
        assert_same(history, other_history)
        assert state == other_state
        assert (streams, other_streams) == ([0] * 3, [1] * 3)
        if name.startswith("srste"):
            assert history[-1]["net.blocks.1.adapter_up"].abs().max() > 1e-3, "adapters must train after the wake"
