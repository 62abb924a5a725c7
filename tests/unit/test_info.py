"""``python -m slope_pl.info``, and what the extension's loader says where something is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slope_pl import info
from slope_pl.ops import extension as loader
from slope_pl.ops.extension import extension


def test_the_command_runs_and_names_what_matters():
    done = subprocess.run([sys.executable, "-m", "slope_pl.info"], capture_output=True, text=True, check=True)
    for word in (
        "slope_pl",
        "torch",
        "GPUs",
        "cuSPARSELt that runs",
        "CUTLASS kernels",
        "backend='auto' takes",
        "algorithms.json",
    ):
        assert word in done.stdout


def test_json_says_which_backend_and_why_not(capsys):
    info.main(["--json", "--shape", "24", "40"])
    data = json.loads(capsys.readouterr().out)
    assert data["backend='auto' takes"]["cpu float32 24x40"].startswith(
        "reference (cusparselt: it runs on CUDA GPUs only"
    )
    if not torch.cuda.is_available():
        assert data["GPUs"] == ["none"]


def test_neither_import_nor_info_creates_a_cuda_context():
    code = "import slope_pl, torch; slope_pl.ops.extension.extension(); print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture
def fresh():
    extension.cache_clear()
    yield
    extension.cache_clear()


def test_a_missing_library_says_how_to_build_it(monkeypatch, tmp_path, fresh):
    monkeypatch.setattr(loader, "LIBRARY", tmp_path / "slope_cuda.so")
    assert extension().problem == "the extension is not built (slope_cuda.so is missing): run `make extension`"


def test_a_damaged_library_is_named(monkeypatch, tmp_path, fresh):
    (tmp_path / "slope_cuda.so").write_bytes(b"not a library")
    monkeypatch.setattr(loader, "LIBRARY", tmp_path / "slope_cuda.so")
    monkeypatch.setattr(loader, "_load_cusparselt", lambda: None)
    assert "slope_cuda.so does not load" in extension().problem


def test_a_missing_cusparselt_says_which_package(monkeypatch, fresh, tmp_path):
    (tmp_path / "slope_cuda.so").write_bytes(b"")
    monkeypatch.setattr(loader, "LIBRARY", tmp_path / "slope_cuda.so")
    monkeypatch.setattr(loader, "_CUSPARSELT", "libnothing.so.0")
    assert "pip install nvidia-cusparselt-cu13" in extension().problem


@pytest.mark.parametrize("layout", ["nvidia/cu13", "nvidia/cusparselt"])
def test_both_layouts_of_the_package_are_searched(monkeypatch, tmp_path, layout):
    library = tmp_path / layout / "lib" / "libcusparseLt.so.0"
    library.parent.mkdir(parents=True)
    library.touch()

    class Spec:
        submodule_search_locations = (str(tmp_path / "nvidia"),)

    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: Spec)
    assert list(loader.cusparselt_paths()) == [Path(library)]
