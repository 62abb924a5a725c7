"""The built extension on a machine without a GPU: it loads, has the schemas and fakes that Python counts on, refuses CPUs."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from slope_pl.ops.extension import LIBRARY, extension

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def built():
    if not LIBRARY.exists() and os.environ.get("SLOPE_REQUIRE_EXTENSION") != "1":
        pytest.skip("the extension is not built here (make extension builds it where nvcc is)")
    assert extension().problem is None, extension().problem


def test_schemas():
    schemas = {name: str(getattr(torch.ops.slope_cuda, name).default._schema) for name in ("spmm", "refresh", "select")}
    assert schemas["spmm"].endswith(
        "(Tensor x, Tensor operand, Tensor? bias, int d_out, int how, int tail_how) -> Tensor"
    )
    assert "Tensor(a!)? forward_operand, Tensor(b!)? backward_operand) -> ()" in schemas["refresh"]


def test_versions():
    assert extension().running.startswith("0.")
    assert torch.ops.slope_cuda.library_version() >= 8_000  # 0.8.0


def test_the_cutlass_kernels_are_in_it_where_their_headers_are():
    if importlib.util.find_spec("cutlass_library") is None and os.environ.get("SLOPE_REQUIRE_EXTENSION") != "1":
        pytest.skip("no nvidia-cutlass here: the extension is built without the kernels for narrow layers")
    assert torch.ops.slope_cuda.sm90_configs() > 0


def test_fakes():
    ops = torch.ops.slope_cuda
    with FakeTensorMode():
        x, operand = torch.empty(2, 5, 64, dtype=torch.bfloat16), torch.empty(64 * 96 * 9 // 16, dtype=torch.bfloat16)
        y = ops.spmm(x, operand, None, 96, 0, 0)
        assert (y.shape, y.dtype) == ((2, 5, 96), torch.bfloat16)
        indices = torch.empty(96, 8, dtype=torch.uint8)
        assert ops.select(torch.empty(96, 64), indices, torch.float16).shape == (96, 32)
        chosen, counts = ops.choose_columns(torch.empty(96, 32), indices, None)
        assert (chosen.shape, counts.dtype) == ((64, 12), torch.int64)


def test_a_cpu_tensor_is_refused():
    with pytest.raises(NotImplementedError, match="slope_cuda::spmm"):
        torch.ops.slope_cuda.spmm(torch.zeros(8, 64), torch.zeros(10), None, 96, 0, 0)


def build_module():
    spec = importlib.util.spec_from_file_location("slope_build", ROOT / "extensions" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_build_says_what_is_missing(monkeypatch, tmp_path):
    build = build_module()
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(build.Path, "exists", lambda self: False)
    with pytest.raises(build.BuildError, match="no nvcc: install the CUDA toolkit"):
        build.find_nvcc()
    monkeypatch.setattr(build, "package_dirs", lambda: iter(()))
    monkeypatch.delenv("CUSPARSELT_HOME", raising=False)
    with pytest.raises(build.BuildError, match="pip install nvidia-cusparselt-cu13"):
        build.find_cusparselt()


@pytest.mark.parametrize("layout", ["nvidia/cu13", "nvidia/cusparselt"])
def test_headers_are_found_in_both_layouts(monkeypatch, tmp_path, layout):
    build = build_module()
    home = tmp_path / layout
    for name in ("include/cusparseLt.h", "lib/libcusparseLt.so.0"):
        (home / name).parent.mkdir(parents=True)
        (home / name).touch()
    monkeypatch.setattr(build, "package_dirs", lambda: iter([tmp_path / "nvidia"]))
    assert build.find_cusparselt() == (home / "include", home / "lib")


def test_a_compiler_error_is_shown(tmp_path):
    build = build_module()
    with pytest.raises(build.BuildError, match="failed: g\\+\\+"):
        build.run(["g++", "-c", str(tmp_path / "missing.cpp"), "-o", str(tmp_path / "out.o")])
