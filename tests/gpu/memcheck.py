"""Every kernel of the extension on odd and even shapes, for ``compute-sanitizer``: ``make memcheck``. Checks no numbers.

Not a pytest module: under the sanitizer each launch costs milliseconds, and what it should look at is launched here alone.
"""

import sys

import torch

from slope_pl.ops.algorithm_cache import Order
from slope_pl.ops.algorithms import candidates, encode
from slope_pl.ops.extension import extension
from slope_pl.sparsity import make_mask, pack_indices

SHAPES = ((16, 16), (80, 144), (208, 336), (2064, 2576))
KERNEL_SHAPES = ((8, 8), (72, 136), *SHAPES)
HALVES, FLOATS = (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16, torch.float16)


def indices_of(rows: int, columns: int) -> torch.Tensor:
    """A random 2:4 mask, packed."""
    return pack_indices(make_mask("random", torch.empty(rows, columns), seed=0)).cuda()


def run_kernels(d_out: int, d_in: int) -> None:
    """Refresh, choice of columns and selection, in all dtypes."""
    ops, indices, columns = torch.ops.slope_cuda, indices_of(d_out, d_in), indices_of(d_in, d_out)
    for source in FLOATS:
        values = torch.randn(d_out, d_in // 2, device="cuda").to(source)
        for target in HALVES:
            forward, backward = (torch.empty(values.numel(), dtype=target, device="cuda") for _ in range(2))
            ops.refresh(values, indices, columns, forward, backward)
            ops.refresh(values, indices, columns, None, backward)
            ops.refresh(values, indices, None, forward, None)
        for target in FLOATS:
            ops.select(torch.randn(d_out, d_in, device="cuda").to(source), indices, target)
        ops.choose_columns(values, indices, columns)
        ops.choose_columns(values, indices, None)


def run_products(d_out: int, d_in: int) -> None:
    """Metadata in every order, and a product with and without whole eights of rows."""
    ops, indices = torch.ops.slope_cuda, indices_of(d_out, d_in)
    for dtype in HALVES:
        for order in Order:
            if order is Order.CUTLASS and not ops.sm90_configs():
                continue
            size = ops.operand_bytes(indices, d_out, d_in, dtype, order) // 2
            operand = torch.randn(size, device="cuda").to(dtype)
            ops.write_metadata(indices, operand, order)
            how = encode(candidates(1, order)[0])
            for n in (8, 13, 1):
                x, bias = torch.randn(n, d_in, device="cuda").to(dtype), torch.randn(d_out, device="cuda").to(dtype)
                ops.spmm(x, operand, bias, d_out, how, how)
                ops.spmm(x, operand, None, d_out, how, how)


def run_fused(d_out: int, d_in: int) -> None:
    """Every product with an activation, at odd and even numbers of rows."""
    ops = torch.ops.slope_cuda
    configs = [config for config in range(ops.sm90_configs()) if ops.sm90_is_fused(config)]
    for dtype in HALVES:
        operand = torch.empty(
            ops.operand_bytes(torch.empty(0).cuda(), d_out, d_in, dtype, Order.CUTLASS) // 2, dtype=dtype
        )
        operand = operand.normal_().cuda()
        ops.write_metadata(indices_of(d_out, d_in), operand, Order.CUTLASS)
        bias = torch.randn(d_out, device="cuda").to(dtype)
        for n in (1, 133):
            x, pre = (torch.randn(n, width, device="cuda").to(dtype) for width in (d_in, d_out))
            for config in configs:
                for tanh in (False, True):
                    ops.spmm_gelu(x, operand, bias, d_out, config, tanh, True)
                    ops.spmm_gelu(x, operand, bias, d_out, config, tanh, False)
                    ops.spmm_gelu_gradient(x, operand, pre, d_out, config, tanh)


def main() -> int:
    """Run everything; the sanitizer's exit status is the result."""
    if extension().problem is not None or not torch.cuda.is_available():
        print(extension().problem or "no GPU")
        return 1
    for shape in KERNEL_SHAPES:
        run_kernels(*shape)
    for shape in SHAPES:
        run_products(*shape)
        run_fused(*shape)
    torch.cuda.synchronize()
    print("every kernel was launched")
    return 0


if __name__ == "__main__":
    sys.exit(main())
