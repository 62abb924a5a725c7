"""``python -m slope_pl.info``: versions, GPU, which backend each product would use and why not, known algorithms.

A bug report starts with it. It builds nothing and, on a machine without a GPU, creates no CUDA context.
"""

import argparse
import json
import platform
import subprocess
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import slope_pl
from slope_pl import ops
from slope_pl.ops import algorithm_cache
from slope_pl.ops.extension import LIBRARY, cusparselt_paths, extension

PACKAGES = (
    "torch",
    "lightning",
    "triton",
    "transformers",
    "deepspeed",
    "nvidia-cusparselt-cu13",
    "nvidia-cusparselt-cu12",
)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def _cutlass() -> str:
    count = torch.ops.slope_cuda.sm90_configs()
    return f"{count} configurations (Hopper)" if count else "not built in (pip install nvidia-cutlass, make extension)"


def collect(d_out: int = 1024, d_in: int = 1024) -> dict[str, Any]:
    """Everything that the command prints, as plain data.

    Args:
        d_out: rows of the weight that backends are asked about.
        d_in: its columns.
    """
    built = extension()
    gpus = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            gpus.append(f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    products = {}
    for device in ("cuda", "cpu"):
        for dtype in _DTYPES:
            place = ops.Place(device, dtype, d_out, d_in)
            reasons = ops.reasons_against(place)
            name = str(dtype).removeprefix("torch.")
            products[f"{device} {name} {d_out}x{d_in}"] = ops.resolve_backend("auto", *place) + (
                f" ({reasons})" if reasons else ""
            )
    entries = algorithm_cache.load()
    return {
        "slope_pl": slope_pl.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": {name: found for name in PACKAGES if (found := _package(name)) is not None},
        "torch CUDA": torch.version.cuda or "none (a CPU build)",
        "driver": _driver() or "none found",
        "GPUs": gpus or ["none"],
        "extension": {
            "library": str(LIBRARY) if LIBRARY.exists() else "not built",
            "usable": built.problem or "yes",
            "cuSPARSELt it was built with": built.built_with or "unknown",
            "cuSPARSELt that runs": built.running or "none",
            "CUTLASS kernels for narrow layers": "unknown" if built.problem else _cutlass(),
            "cuSPARSELt packages": [str(path) for path in cusparselt_paths()] or ["none"],
        },
        "backend='auto' takes": products,
        "algorithms": {
            "file": str(algorithm_cache.path()),
            "known": dict(Counter(name.rsplit(" | ", 1)[0] for name in entries)) or "none yet",
        },
    }


def _lines(data: Any, indent: int = 0) -> list[str]:
    pad = "  " * indent
    if isinstance(data, dict):
        width = max((len(str(key)) for key in data), default=0)
        lines = []
        for key, value in data.items():
            if isinstance(value, dict):
                lines += [f"{pad}{key}:", *_lines(value, indent + 1)]
            else:
                text = "; ".join(value) if isinstance(value, list) else str(value)
                lines.append(f"{pad}{key:<{width}}  {text}")
        return lines
    return [f"{pad}{data}"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m slope_pl.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("D_OUT", "D_IN"),
        default=(1024, 1024),
        help="weight that backends are asked about (default: 1024 1024)",
    )
    args = parser.parse_args(arguments)
    data = collect(*args.shape)
    print(json.dumps(data, indent=1) if args.json else "\n".join(_lines(data)))


if __name__ == "__main__":
    main()
