"""Where a training step's time goes, dense beside sparse: ``python -m benchmarks.profile bert-large``.

Kernels of one compiled step by name, summed over a few steps by torch's profiler. It finds what to work on; numbers to
quote come from ``benchmarks.run``, which the profiler does not slow down.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.options import Options
from benchmarks.session import Session
from benchmarks.shapes import blocks
from benchmarks.training import Side

STEPS = 5
WIDTH = 78


def kernels(side: Side, steps: int, device: torch.device) -> dict[str, tuple[float, int]]:
    """Name of a kernel (on the CPU: of an operator) -> milliseconds and launches a step."""
    for _ in range(3):
        side.step()
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            side.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in recorded.key_averages():
        time = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if time:
            before, count = found[event.key]
            found[event.key] = before + time / 1e3 / steps, count + event.count // steps
    return found


def table(found: dict[str, tuple[float, int]], rows: int) -> list[str]:
    """The longest first, and the sum of all."""
    ranked = sorted(found.items(), key=lambda item: -item[1][0])
    total = sum(time for time, _ in found.values())
    lines = [f"{time:9.4f} ms {time / total:6.1%} {count:4d}x  {name[:WIDTH]}" for name, (time, count) in ranked[:rows]]
    return [*lines, f"{total:9.4f} ms in all, {len(found)} kernels"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="names of benchmarks/shapes.py, e.g. gpt2-small bert-large")
    parser.add_argument("--rows", type=int, default=20, help="kernels to show (default: 20)")
    parser.add_argument("--precision", default="bf16-true", choices=("bf16-true", "bf16-mixed"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager", "none"))
    given = parser.parse_args(arguments)
    known = {shape.name: shape for shape in blocks(given.quick)}
    unknown = [name for name in given.models if name not in known]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; there are {', '.join(known)}")
    session = Session(Options(device=given.device, compiler=given.compiler, quick=given.quick), None)
    for name in given.models:
        for variant in ("dense", "slope"):
            side = Side(session, known[name], variant, given.precision)
            print(f"\n{name}, {variant}, {given.precision}, a step", flush=True)
            print("\n".join(table(kernels(side, STEPS, session.device), given.rows)), flush=True)
            del side


if __name__ == "__main__":
    main()
