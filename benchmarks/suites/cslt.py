"""PyTorch's own cuSPARSELt product, as it comes and with its best algorithm: the yardstick of the SpMM kernels."""

import functools

import torch
from torch import Tensor

from benchmarks.graphs import record, replay_time
from benchmarks.session import Session
from benchmarks.suites.linear import Bench
from benchmarks.timing import Run
from benchmarks.variants import pruned

DEFAULT, BEST = "torch_sparse_cusparselt", "torch_sparse_best"
MAX_IDS = 64  # beyond what any release of cuSPARSELt has; the library refuses the rest
CALLS = 5  # in one replay
TOLERANCE = 1e-2  # of the norm: bf16 rounds to 2e-3, a wrong result is off by far more


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    """``x W^T + b`` for a compressed W; rows of x and of the result lie one after the other."""
    return torch._cslt_sparse_mm(packed, x.t(), bias=bias, transpose_result=True, alg_id=algorithm)


def candidates(session: Session, bench: Bench, measure: str, dgrad: bool) -> tuple[dict[str, Run], str]:
    """Calls of the default and of the fastest right algorithm, and a note that names it; rows where there are none.

    The input gradient multiplies by a 2:4 matrix ``(d_in, d_out)``; any one has the speed of the double-pruned weight.
    """
    wanted = [name for name in (DEFAULT, BEST) if session.options.wants_variant(name)]
    if not wanted:
        return {}, ""
    if session.device.type != "cuda":
        for name in wanted:
            session.skip(bench.point, name, measure, "cuSPARSELt needs a GPU")
        return {}, ""
    found = session.attempt(bench.point, BEST, measure, functools.partial(_prepare, session, bench, dgrad))
    if found is None:
        return {}, ""
    runs, note = found
    return {name: run for name, run in runs.items() if name in wanted}, note


@torch.no_grad()
def _prepare(session: Session, bench: Bench, dgrad: bool) -> tuple[dict[str, Run], str]:
    inputs = bench.dy if dgrad else bench.x
    weight = pruned(bench.dense.weight.t().contiguous() if dgrad else bench.dense.weight)
    bias = None if dgrad else bench.dense.bias.detach()
    packed = torch._cslt_compress(weight)

    def run(i: int, algorithm: int) -> Tensor:
        return multiply(inputs[i % len(inputs)], packed, bias, algorithm)

    expected = torch.nn.functional.linear(inputs[0], weight, bias).float()
    times: dict[int, float] = {}
    pool = torch.cuda.graph_pool_handle()
    for algorithm in range(MAX_IDS):
        try:
            result = run(0, algorithm).float()
            if not (result - expected).norm() <= TOLERANCE * expected.norm():
                continue
            # Recorded: a plain call takes the host half a millisecond, longer than most products take the GPU.
            replay = record(functools.partial(run, algorithm=algorithm), CALLS, session.device, pool)
            times[algorithm] = replay_time(replay, 3)
        except RuntimeError:  # no such id, or not for this shape
            continue
    if not times:
        raise RuntimeError(f"none of the ids below {MAX_IDS} gives the right result")
    best = min(times, key=lambda algorithm: times[algorithm])
    made: dict[str, Run] = {DEFAULT: functools.partial(run, algorithm=0), BEST: functools.partial(run, algorithm=best)}
    return made, f"best of {len(times)} right cuSPARSELt ids: {best}"
