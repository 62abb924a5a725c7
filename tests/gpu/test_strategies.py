"""Under every strategy, compiled, a run on a GPU is the run on one device: what CPU tests with gloo cannot promise."""

import pytest
import torch

from tests.distributed.processes import report_of
from tests.gpu.compiled_cases import require_extension
from tests.gpu.strategies_worker import RUNS

pytestmark = pytest.mark.gpu
CASES = [(name, "32-true") for name in RUNS] + [(name, "bf16-mixed") for name in RUNS if "dense" not in name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    require_extension()
    (reports,) = report_of(1, "tests.gpu.strategies_worker", tmp_path_factory.mktemp("strategies"), 300)
    return reports


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_compiled_run_is_that_of_one_device(runs, name, precision):
    """In float32, on the reference backend, every parameter too; in bfloat16, by the compiled kernels, the losses."""
    dense, exact = name.startswith("dense"), precision == "32-true"
    report, alone = runs[name, dense, precision], runs["one device", dense, precision]
    assert not isinstance(report, str), report
    # A parameter that gets no gradient is off by the rate times the steps, some 1e-2, and the losses by as much.
    assert report["losses"] == pytest.approx(alone["losses"], abs=1e-5 if exact else 1e-3)
    if exact:
        torch.testing.assert_close(report["end"], alone["end"], rtol=0, atol=1e-5)
