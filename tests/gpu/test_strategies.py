"""Under every strategy, compiled, a run on a GPU is the run on one device: what CPU tests with gloo cannot promise."""

import pytest

from tests.distributed.compiled_worker import CASES
from tests.distributed.processes import report_of
from tests.distributed.test_compiled import assert_as_on_one_device
from tests.gpu.compiled_cases import require_extension

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    require_extension()
    (reports,) = report_of(1, "tests.distributed.compiled_worker", tmp_path_factory.mktemp("compiled"), 400, "cuda")
    return reports


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_compiled_run_is_that_of_one_device(runs, name, precision):
    """In bfloat16 by the compiled kernels."""
    assert_as_on_one_device(runs, name, precision)
