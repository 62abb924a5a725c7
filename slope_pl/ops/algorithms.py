"""Which of cuSPARSELt's algorithms multiplies: searched once per shape, verified, remembered on disk.

Algorithms differ in time by up to two, and some ids have returned wrong numbers on some chips (pytorch/pytorch#155333). So
every id is timed on random data, and the fastest is taken only if its error against float64 is at most twice that of the
dense product of the same dtype, over the whole result, and if it repeats itself bit for bit. An id that comes from the cache
file is checked once more, on a sample of rows, before it is used in a process.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from slope_pl.ops import algorithm_cache as cache
from slope_pl.ops.algorithm_cache import SM90, After, Algorithm, Order
from slope_pl.sparsity import decompress

log = logging.getLogger(__name__)

DEFAULT = Algorithm(-1)
# With cuSPARSELt 0.8.0 on an H100, ids 36 to 51 (fp16 has them, bf16 does not) end in an illegal instruction, which is the
# end of the process. Nothing but ids that were run one by one in processes of their own is tried in anybody's training.
VETTED_IDS = tuple(range(21))
_VERIFIED: dict[str, Algorithm] = {}
_TOLERANCE = 2.0
_FINALISTS = 4
_QUEUE_CYCLES = 1_000_000  # about half a millisecond
_BLOCK = 4096  # rows and columns of the float64 product that is in memory at a time


class Launch(NamedTuple):
    """Arguments of ``slope_cuda::spmm`` that say how, encoded: for the rows in whole eights, and for the rest."""

    how: int
    tail_how: int


def encode(algorithm: Algorithm) -> int:
    """An algorithm as the one number that ``slope_cuda::spmm`` takes."""
    if not (-1 <= algorithm.id < 0xFFFF and 1 <= algorithm.split_k <= 0xFF and 0 <= algorithm.split_k_mode <= 0xFF):
        raise RuntimeError(f"{algorithm} is out of range")
    return algorithm.id + 1 | algorithm.split_k << 16 | algorithm.split_k_mode << 24


class Problem(NamedTuple):
    """One product to find an algorithm for.

    Attributes:
        x: ``(n, d_in)``, n a multiple of 8.
        operand: the compressed W.
        indices: of W, uint8 ``(d_out, d_in / 8)``.
        bias: ``(d_out,)`` or None.
        order: of the operand's metadata.
        after: what the kernel does with the product.
        pre: ``(n, d_out)``, what an activation was taken of, where ``after`` is its gradient.
    """

    x: Tensor
    operand: Tensor
    indices: Tensor
    bias: Tensor | None
    order: Order
    after: After = After.NOTHING
    pre: Tensor | None = None

    def run(self, algorithm: Algorithm) -> tuple[Tensor, ...]:
        """The results of a given algorithm, ``(n, d_out)`` each; raises RuntimeError where the library refuses it."""
        d_out, ops, tanh = self.indices.shape[0], torch.ops.slope_cuda, self.after.approximate == "tanh"
        config = algorithm.id - SM90
        if self.after.is_gradient:
            return (ops.spmm_gelu_gradient.default(self.x, self.operand, self.pre, d_out, config, tanh),)
        if self.after:
            return ops.spmm_gelu.default(self.x, self.operand, self.bias, d_out, config, tanh, True)
        how = encode(algorithm)
        return (ops.spmm.default(self.x, self.operand, self.bias, d_out, how, how),)

    def results_of(self, product: Tensor, pre: Tensor | None) -> tuple[Tensor, ...]:
        """What :meth:`run` gives, of a part of the product with its bias that was made in another way."""
        if self.after.is_gradient:
            assert pre is not None
            return (torch.ops.aten.gelu_backward(product, pre.to(product), approximate=self.after.approximate),)
        if self.after:
            return torch.nn.functional.gelu(product, approximate=self.after.approximate), product
        return (product,)

    def weight(self) -> Tensor:
        """W, dense."""
        d_out, kept = self.indices.shape[0], self.indices.shape[1] * 4
        return decompress(self.operand[: d_out * kept].view(d_out, kept), self.indices)


def choose_launch(
    x: Tensor,
    operand: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    order: Order,
    after: After = After.NOTHING,
) -> Launch:
    """How to multiply an input of this shape; searches where neither this process nor the cache file knows.

    Args:
        x: ``(..., d_in)`` on a CUDA device; only its shape, dtype and device matter.
        operand: the compressed W.
        indices: of W, uint8 ``(d_out, d_in / 8)``.
        bias: ``(d_out,)`` or None.
        order: of the operand's metadata, which says whose algorithms there are to choose from.
        after: what follows the product in the same kernel.
    """
    n = x.numel() // x.shape[-1] if x.numel() else 0
    if order is Order.CUTLASS:  # takes any number of rows
        how = encode(_algorithm(x, n, operand, indices, bias, order, after))
        return Launch(how, how)
    whole, tail = n - n % 8, n % 8
    best = _algorithm(x, whole, operand, indices, bias, order) if whole else DEFAULT
    rest = _algorithm(x, 8, operand, indices, bias, order) if tail else DEFAULT
    if not whole:
        best = rest
    return Launch(encode(best), encode(rest))


def _algorithm(
    x: Tensor,
    n: int,
    operand: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    order: Order,
    after: After = After.NOTHING,
) -> Algorithm:
    fallback = candidates(0, order, after)[0]
    if n == 0:
        return fallback
    d_out, d_in = indices.shape[0], indices.shape[1] * 8
    key = cache.key(x.device, x.dtype, n, d_out, d_in, bias is not None, order, after)
    found = _VERIFIED.get(key)
    if found is not None:
        return found
    if os.environ.get("SLOPE_SEARCH") == "0":
        return fallback
    if torch.cuda.is_current_stream_capturing():
        log.warning(
            "slope_pl: no algorithm is known for %s and none can be searched while a CUDA graph is recorded: the library's "
            "default is used; run the step once before recording",
            key,
        )
        return fallback
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        try:
            problem = _random_problem(x, n, operand, indices, bias, order, after)
            chosen = _from_cache(key, problem) or _searched(key, problem)
        except torch.OutOfMemoryError:
            log.warning("slope_pl: no memory to search an algorithm for %s; the library's default is used", key)
            return fallback
    _VERIFIED[key] = chosen
    return chosen


def _random_problem(
    x: Tensor, n: int, operand: Tensor, indices: Tensor, bias: Tensor | None, order: Order, after: After
) -> Problem:
    """Data of its own: what is being trained may be zero, infinite or NaN, and its random numbers are not touched."""
    generator = torch.Generator(x.device).manual_seed(0)
    d_out, d_in = indices.shape[0], indices.shape[1] * 8
    values, weights = torch.empty(n, d_in, dtype=x.dtype, device=x.device), operand.clone()
    values.normal_(generator=generator)
    weights[: d_out * d_in // 2].normal_(generator=generator)
    bias = None if bias is None else torch.empty_like(bias).normal_(generator=generator)
    pre = values.new_empty(n, d_out).normal_(generator=generator) if after.is_gradient else None
    return Problem(values, weights, indices, bias, order, after, pre)


def _from_cache(key: str, problem: Problem) -> Algorithm | None:
    known = cache.load().get(key)
    if known is None:
        return None
    reason = refusal(problem.run, known, problem, sample=256)
    if reason is not None:
        log.warning("slope_pl: the cached algorithm %s for %s %s; searching again", known, key, reason)
        return None
    return known


def _searched(key: str, problem: Problem) -> Algorithm:
    ours = problem.order is Order.CUTLASS
    count = 0 if ours else torch.ops.slope_cuda.max_algorithm(problem.x, problem.indices.shape[0])
    timed = fastest_first(candidates(count, problem.order, problem.after), problem.run, _milliseconds)
    for time, algorithm in timed:
        reason = refusal(problem.run, algorithm, problem)
        if reason is None:
            log.info("slope_pl: %s: algorithm %s, %.4f ms", key, algorithm, time)
            cache.store(key, algorithm)
            return algorithm
        log.warning("slope_pl: algorithm %s for %s %s; not used", algorithm, key, reason)
    raise RuntimeError(
        f"there is no algorithm for {key} whose result is right (tried {len(timed)}); use backend='reference'"
    )


def candidates(count: int, order: Order, after: After = After.NOTHING) -> list[Algorithm]:
    """What can be tried, the one to fall back on first.

    Args:
        count: how many ids cuSPARSELt has; only vetted ones are tried.
        order: of the operand's metadata: the CUTLASS kernels have configurations of their own.
        after: what follows the product in the same kernel: not all of those kernels can do that.
    """
    if order is Order.CUTLASS:
        ops = torch.ops.slope_cuda
        return [Algorithm(SM90 + i) for i in range(ops.sm90_configs()) if not after or ops.sm90_is_fused(i)]
    return [DEFAULT, *(Algorithm(i) for i in VETTED_IDS if i < count)]


def fastest_first(
    algorithms: Iterable[Algorithm],
    run: Callable[[Algorithm], object],
    milliseconds: Callable[[Callable[[], object], int], float],
) -> list[tuple[float, Algorithm]]:
    """Time algorithms, the promising ones again and in turn; those that cannot run are left out.

    Args:
        algorithms: to try.
        run: the product by an algorithm.
        milliseconds: ``(product, repeats) -> time`` of one product.

    Returns:
        ``(milliseconds, algorithm)``, the fastest first.
    """
    rough: list[tuple[float, Algorithm]] = []
    for algorithm in algorithms:
        try:
            run(algorithm)
        except RuntimeError:
            continue
        rough.append((milliseconds(functools.partial(run, algorithm), 3), algorithm))
    rough.sort()
    finalists, rest = rough[:_FINALISTS], rough[_FINALISTS:]
    # In turn, so that a clock that drifts meets all of them; the least time, because noise only ever adds.
    rounds = [[milliseconds(functools.partial(run, a), 6) for _, a in finalists] for _ in range(5)]
    best = [min(times) for times in zip(*rounds, strict=True)]
    return sorted((time, algorithm) for time, (_, algorithm) in zip(best, finalists, strict=True)) + rest


def _milliseconds(product: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The GPU waits while the host queues everything, or small products would be timed by the host's pace.
    torch.cuda._sleep(_QUEUE_CYCLES)
    start.record()
    for _ in range(repeats):
        product()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def refusal(
    run: Callable[[Algorithm], tuple[Tensor, ...]], algorithm: Algorithm, problem: Problem, sample: int | None = None
) -> str | None:
    """Why an algorithm's result is not to be trusted, or None.

    Args:
        run: the results of an algorithm, ``(n, d_out)`` each.
        algorithm: the one in question.
        problem: what is multiplied.
        sample: compare only so many rows, spread over all; None for the whole result.
    """
    try:
        results, again = run(algorithm), run(algorithm)
    except RuntimeError as error:
        return f"cannot run ({str(error).splitlines()[0]})"
    if not all(torch.equal(*pair) for pair in zip(results, again, strict=True)):
        return "gives other bits each time"
    x, pre, weight = problem.x, problem.pre, problem.weight()
    if sample is not None and x.shape[0] > sample:
        rows = torch.linspace(0, x.shape[0] - 1, sample, device=x.device).long()
        x, pre, results = x[rows], None if pre is None else pre[rows], tuple(result[rows] for result in results)
    ours, theirs = [0.0] * len(results), [0.0] * len(results)
    for i in range(0, x.shape[0], _BLOCK):
        for j in range(0, weight.shape[0], _BLOCK):
            x_part, w_part = x[i : i + _BLOCK], weight[j : j + _BLOCK]
            bias = None if problem.bias is None else problem.bias[j : j + _BLOCK]
            part = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            before = None if pre is None else pre[part]
            dense = problem.results_of(torch.nn.functional.linear(x_part, w_part, bias), before)
            exact = problem.results_of(
                torch.nn.functional.linear(x_part.double(), w_part.double(), None if bias is None else bias.double()),
                before,
            )
            for k, result in enumerate(results):
                ours[k] = max(ours[k], _error(result[part].double(), exact[k]))
                theirs[k] = max(theirs[k], _error(dense[k].double(), exact[k]))
    floor = torch.finfo(x.dtype).eps * 0.5
    for mine, allowed in zip(ours, theirs, strict=True):
        if not mine <= _TOLERANCE * allowed + floor:
            return f"is wrong (largest error {mine:.3g} of the largest result, the dense product's is {allowed:.3g})"
    return None


def _error(result: Tensor, exact: Tensor) -> float:
    """Largest error over the largest exact entry; NaN and infinity stay what they are."""
    return float((result - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
