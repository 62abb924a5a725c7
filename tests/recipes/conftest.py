"""Third-party warnings that Lightning's own calls raise; anything else is an error (pyproject.toml)."""

import pytest

FILTERS = [
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # how lightning 2.6 calls jsonargparse 4.53
    "ignore:.*`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",  # lightning 2.6 on torch 2.13
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*smaller than the logging interval:UserWarning",
    "ignore:.*args parameter is intended to run from within Python:UserWarning",  # pytest's own command line
    "ignore:The dirpath has changed from:UserWarning",
    "ignore:.*exists and is not empty:UserWarning",
    "ignore:.*is not supported by the model summary:UserWarning",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of this folder the filters."""
    for item in items:
        if "tests/recipes" in str(item.path):
            for line in FILTERS:
                item.add_marker(pytest.mark.filterwarnings(line))
