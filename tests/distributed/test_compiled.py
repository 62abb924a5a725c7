"""Under every strategy, compiled whole or by blocks, a run is that of one device, eager; on GPUs: ../gpu/test_strategies.py."""

import pytest
import torch

from tests.distributed.compiled_worker import CASES
from tests.distributed.processes import report_of

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    (reports,) = report_of(1, "tests.distributed.compiled_worker", tmp_path_factory.mktemp("compiled"), 400, "cpu")
    return reports


def assert_as_on_one_device(runs, name, precision):
    """In float32, on the reference backend, every parameter too; in bfloat16 the losses."""
    dense, exact = name.startswith("dense"), precision == "32-true"
    report, alone = runs[name, dense, precision], runs["one device", dense, precision]
    assert not isinstance(report, str), report
    # A parameter that gets no gradient is off by the rate times the steps, some 1e-2, and the losses by as much.
    assert report["losses"] == pytest.approx(alone["losses"], abs=1e-5 if exact else 1e-3)
    if exact:
        torch.testing.assert_close(report["end"], alone["end"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_compiled_run_is_that_of_one_device(runs, name, precision):
    assert_as_on_one_device(runs, name, precision)
