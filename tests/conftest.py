"""Fixtures of all tests: seeds, process groups, and what a test may need from the machine."""

import os
from collections.abc import Iterator

import pytest
import torch

# Lightning leaves these in the environment after a fit by DDP; a process started later would take itself for a rank of it.
_LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "GLOBAL_RANK", "RANK", "WORLD_SIZE")
GPU_REQUIRED = os.environ.get("SLOPE_REQUIRE_GPU") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave GPU tests out where there is none, unless they were asked for: then they run, and fail."""
    if torch.cuda.is_available() or GPU_REQUIRED:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here (make test-gpu runs these where there is one)"))


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """The same seed for every test, and nothing left for the next one."""
    torch.manual_seed(0)
    before = {name: os.environ.get(name) for name in _LAUNCH}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    torch.set_default_dtype(torch.float32)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
