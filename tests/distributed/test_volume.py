"""What a step sends, in bytes: counts, so they are compared exactly."""

import pytest

from tests.distributed.processes import report_of
from tests.distributed.volume import ASLEEP, AWAKE, BLOCKS, HIDDEN, RANK, WIDTH
from tests.lightning.toy import QUIET

pytestmark = [pytest.mark.distributed, *QUIET]

FLOAT = 4
WEIGHTS = FLOAT * BLOCKS * HIDDEN * HIDDEN  # of the layers that become sparse
BIASES = FLOAT * BLOCKS * HIDDEN
OTHERS = FLOAT * ((WIDTH + 1) * HIDDEN + (HIDDEN + 1) * 4)  # the dense first layer and head
ADAPTERS = FLOAT * BLOCKS * 2 * RANK * HIDDEN

DENSE, SPARSE, WITH_ADAPTERS = "dense", "2:4, r = 0", f"2:4, r = {RANK}"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    names = ("ddp", "slope_ddp", "slope_fsdp2")
    ranks = report_of(2, "tests.distributed.volume", tmp_path_factory.mktemp("volume"), 240, *names)
    assert ranks[0] == ranks[1], "what goes through a collective operation is the same on every rank"
    return ranks[0]


@pytest.mark.parametrize("name", ["ddp", "slope_ddp"])
def test_ddp_reduces_half_and_sends_no_masks(report, name):
    """Nor after the wake, for which the model is wrapped anew. There are no other buffers: nothing is broadcast."""
    dense, half = WEIGHTS + BIASES + OTHERS, WEIGHTS // 2 + BIASES + OTHERS
    assert report[name, DENSE] == {ASLEEP: {"all-reduce": dense}, AWAKE: {"all-reduce": dense}}
    assert report[name, SPARSE] == {step: {"all-reduce": half} for step in (ASLEEP, AWAKE)}
    assert report[name, WITH_ADAPTERS] == {ASLEEP: {"all-reduce": half}, AWAKE: {"all-reduce": half + ADAPTERS}}


def test_fsdp2_gathers_and_scatters_half(report):
    """Blocks are gathered twice, for forward and backward; sleeping adapters with them, but no gradient of theirs is sent."""

    def step(weights, adapters=0, awake=True):
        gathered = 2 * (weights + BIASES + adapters) + OTHERS
        return {"all-gather": gathered, "reduce-scatter": weights + BIASES + OTHERS + (adapters if awake else 0)}

    assert report["slope_fsdp2", DENSE] == dict.fromkeys((ASLEEP, AWAKE), step(WEIGHTS))
    assert report["slope_fsdp2", SPARSE] == dict.fromkeys((ASLEEP, AWAKE), step(WEIGHTS // 2))
    assert report["slope_fsdp2", WITH_ADAPTERS] == {
        ASLEEP: step(WEIGHTS // 2, ADAPTERS, awake=False),
        AWAKE: step(WEIGHTS // 2, ADAPTERS),
    }
