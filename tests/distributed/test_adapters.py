"""Two processes (gloo, CPU): the adapters' trace is whole whatever is sharded, and rank zero alone writes it."""

from dataclasses import astuple

import pytest

from recipes import convergence
from tests.distributed.adapters_worker import STRATEGIES
from tests.distributed.processes import report_of_two
from tests.lightning.toy import QUIET

pytestmark = [pytest.mark.distributed, *QUIET]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return folder, *report_of_two("tests.distributed.adapters_worker", folder, 300)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_trace_is_that_of_ddp(ranks, name):
    folder, zero, one = ranks
    assert not isinstance(zero[name], str), zero[name]
    assert one[name] == []
    (file,) = (folder / name).glob("**/adapters.csv")
    assert len(convergence.read(file)) == len(zero[name]) == 9 * 3
    for ddp, own in zip(zero["ddp"], zero[name], strict=True):
        assert astuple(own)[:4] == astuple(ddp)[:4]
        assert astuple(own)[4:] == pytest.approx(astuple(ddp)[4:], abs=2e-2, nan_ok=True)
    assert zero[name][4].cosine_up < 0.95, "the adapters must move, or the test shows nothing"
