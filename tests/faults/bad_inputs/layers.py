"""Shapes, dtypes and kinds of tensors: of the layer, its inputs, the operations and the mask maths."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slope_pl import SLoPeConfig, SparseLinear, ops
from slope_pl.nn import sparse_mlp
from slope_pl.ops import resolve_backend
from slope_pl.sparsity import (
    backward_values,
    choose_backward_indices,
    compress,
    decompress,
    make_mask,
    pack_indices,
    random_mask,
    transposable_mask,
)
from tests.faults.bad_inputs.case import Case

UINT8 = torch.uint8


def case(name: str, call: Callable[[], object], *says: str) -> Case:
    return Case(name, lambda folder: call(), says)


def dense(d_out: int, d_in: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    """A dense layer with a weight of any dtype, integers included."""
    linear = nn.Linear(8, 8, bias)
    linear.weight = nn.Parameter(torch.ones(d_out, d_in, dtype=dtype), requires_grad=False)
    return linear


def converted(linear: Any, **options: Any) -> Callable[[], object]:
    return lambda: SparseLinear.from_linear(linear, **options)


def fed(x: Any, **options: Any) -> Callable[[], object]:
    return lambda: SparseLinear(16, 8, **options)(x)


MAKING = [
    case("zero features", lambda: SparseLinear(0, 16), "in_features=0", "a positive multiple of 8"),
    case("negative features", lambda: SparseLinear(16, -8), "out_features=-8", "a positive multiple of 8"),
    case("features of 12", lambda: SparseLinear(12, 16), "in_features=12", "multiple of 8"),
    case("features as text", lambda: SparseLinear("16", 16), "in_features='16'", "multiple of 8"),
    case("features as float", lambda: SparseLinear(16, 16.0), "out_features=16.0", "multiple of 8"),
    case("features as bool", lambda: SparseLinear(True, 16), "in_features=True", "multiple of 8"),
    case("integer parameters", lambda: SparseLinear(16, 16, dtype=torch.int8), "torch.int8", "float32"),
    case("complex parameters", lambda: SparseLinear(16, 16, dtype=torch.complex64), "torch.complex64", "float32"),
    case("dtype as text", lambda: SparseLinear(16, 16, dtype="float32"), "'float32'", "torch.float32"),
    case("a config that is none", lambda: SparseLinear(16, 16, config="random"), "str", "a mapping"),
    case("a config with a typo", lambda: SparseLinear(16, 16, config={"maks": "random"}), "'maks'", "known are mask"),
    case(
        "a rank above the sides", lambda: SparseLinear(16, 8, config=SLoPeConfig(adapter_rank=9)), "adapter_rank=9", "8"
    ),
    case("a seed of text", lambda: SparseLinear(16, 16, seed="0"), "seed='0'", "an integer"),
    case("a negative seed", lambda: SparseLinear(16, 16, seed=-1), "seed=-1", "an integer of at least 0"),
    case("a convolution", converted(nn.Conv1d(8, 8, 1)), "Conv1d", "nn.Linear"),
    case("an embedding", converted(nn.Embedding(8, 8)), "Embedding", "nn.Linear"),
    case("a norm", converted(nn.LayerNorm(8)), "LayerNorm", "nn.Linear"),
    case("a bilinear layer", converted(nn.Bilinear(8, 8, 8)), "Bilinear", "nn.Linear"),
    case("a tensor", converted(torch.ones(8, 8)), "Tensor", "nn.Linear"),
    case("nothing", converted(None), "NoneType", "nn.Linear"),
    case("a lazy layer", converted(nn.LazyLinear(8)), "LazyLinear", "initialise"),
    case("a sparse layer", converted(SparseLinear(16, 16)), "SparseLinear", "nn.Linear"),
    case("int8 weights", converted(dense(16, 16, torch.int8)), "torch.int8", "float64, float32, bfloat16, float16"),
    case("fp8 weights", converted(dense(16, 16, torch.float8_e4m3fn)), "float8_e4m3fn", "bfloat16, float16"),
    case("boolean weights", converted(dense(16, 16, torch.bool)), "torch.bool", "bfloat16, float16"),
    case("empty weights", converted(dense(0, 16, torch.float32)), "empty", "before it is sharded"),
    case("norms of another length", converted(nn.Linear(16, 8), scale=torch.ones(8)), "(8,)", "(16,)"),
    case("norms of integers", converted(nn.Linear(16, 8), scale=torch.ones(16).int()), "torch.int32", "floating"),
    case("norms that are negative", converted(nn.Linear(16, 8), scale=-torch.ones(16)), "at least 0"),
    case("norms of zero", converted(nn.Linear(16, 8), scale=torch.zeros(16)), "not all 0"),
    case("norms of NaN", converted(nn.Linear(16, 8), scale=torch.full((16,), float("nan"))), "finite"),
]
INPUTS = [
    case("None", fed(None), "NoneType", "a tensor"),
    case("a list", fed([[0.0] * 16]), "list", "a tensor"),
    case("an array", fed(np.zeros((2, 16), np.float32)), "ndarray", "a tensor"),
    case("a tuple of tensors", fed((torch.zeros(2, 16),)), "tuple", "a tensor"),
    case("too narrow", fed(torch.zeros(3, 15)), "(3, 15)", "in_features = 16"),
    case("transposed", fed(torch.zeros(16, 3)), "(16, 3)", "in_features = 16"),
    case("no features", fed(torch.zeros(3, 0)), "(3, 0)", "in_features = 16"),
    case("float16", fed(torch.zeros(3, 16).half()), "torch.float16", "cast one of them"),
    case("bfloat16 for float64", fed(torch.zeros(3, 16).bfloat16(), dtype=torch.float64), "bfloat16", "float64"),
    case("booleans", fed(torch.zeros(3, 16).bool()), "torch.bool", "cast one of them"),
    case("complex", fed(torch.zeros(3, 16, dtype=torch.complex64)), "complex64", "cast one of them"),
    case("meta", fed(torch.zeros(3, 16, device="meta")), "meta", "'cpu'"),
    case("a meta layer", lambda: SparseLinear(16, 8).to("meta")(torch.zeros(3, 16)), "meta", "'cpu'"),
    case("mlp: nothing", lambda: mlp(None), "NoneType", "a tensor"),
    case("mlp: too narrow", lambda: mlp(torch.zeros(2, 8)), "(2, 8)", "in_features = 16"),
    case("twice differentiated", lambda: twice(), "cannot be differentiated twice"),
]


def mlp(x: Any) -> Tensor:
    return sparse_mlp(x, SparseLinear(16, 32), nn.GELU(), SparseLinear(32, 16))


def twice() -> Tensor:
    x = torch.ones(2, 16, requires_grad=True)
    (dx,) = torch.autograd.grad(SparseLinear(16, 8)(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(dx.sum(), x)[0]


def product(**changes: Any) -> Callable[[], object]:
    """``ops.sparse_linear`` of an 8x16 weight, with one tensor replaced."""

    def call() -> object:
        layer = SparseLinear(16, 8)
        arguments = {
            "x": torch.zeros(2, 16),
            "values": layer.values.detach(),
            "indices": layer.indices,
            "backward_indices": layer.backward_indices,
            "bias": torch.zeros(8),
            "backend": "reference",
        }
        return ops.sparse_linear(**(arguments | changes))

    return call


OPERATIONS = [
    case("op: x too narrow", product(x=torch.zeros(2, 8)), "x of shape (2, 8)", "d_in = 16"),
    case("op: x of another dtype", product(x=torch.zeros(2, 16).long()), "torch.int64", "floating"),
    case("op: values of dense size", product(values=torch.zeros(8, 16)), "values of shape (8, 16)", "(8, 8)"),
    case("op: values of one row", product(values=torch.zeros(8)), "values of shape (8,)", "(8, 8)"),
    case("op: integer values", product(values=torch.zeros(8, 8).int()), "torch.int32", "floating"),
    case("op: int64 indices", product(indices=torch.zeros(8, 2).long()), "indices", "torch.int64", "torch.uint8"),
    case("op: indices of a half", product(indices=torch.zeros(8, 1, dtype=UINT8)), "values of shape (8, 8)", "(8, 4)"),
    case("op: columns of W", product(backward_indices=torch.zeros(8, 2, dtype=UINT8)), "backward_indices", "(16, 1)"),
    case("op: int64 columns", product(backward_indices=torch.zeros(16, 1).long()), "backward_indices", "torch.uint8"),
    case("op: bias of d_in", product(bias=torch.zeros(16)), "bias of shape (16,)", "(8,)"),
    case("op: unknown backend", product(backend="fast"), "no backend 'fast'", "reference"),
    case("op: auto", product(backend="auto"), "no backend 'auto'", "resolve"),
    case("a backend without its GPU", lambda: resolve_backend("cusparselt", "cpu"), "cusparselt", "Use backend='auto'"),
    case("columns: other shapes", lambda: columns(torch.zeros(8, 4)), "(8, 4)", "(8, 2)"),
    case("columns: 12 rows", lambda: choose_backward_indices(torch.zeros(12, 8), index(12, 2)), "12 columns"),
]


def index(rows: int, columns: int) -> Tensor:
    return torch.full((rows, columns), 0x44, dtype=UINT8)


def columns(values: Tensor) -> Tensor:
    return choose_backward_indices(values, index(8, 2))


MATHS = [
    case("mask: unknown kind", lambda: make_mask("best", torch.zeros(4, 8)), "'best'", "choose one of"),
    case("mask: no kind", lambda: make_mask(None, torch.zeros(4, 8)), "None", "choose one of"),
    case("mask: 10 columns", lambda: make_mask("magnitude", torch.zeros(4, 10)), "(4, 10)", "multiple of 4"),
    case("mask: integers", lambda: make_mask("magnitude", torch.zeros(4, 8).int()), "torch.int32", "floating"),
    case("mask: a vector", lambda: make_mask("transposable", torch.zeros(8)), "(8,)", "(d_out, d_in)"),
    case(
        "mask: three dimensions", lambda: make_mask("transposable", torch.zeros(2, 4, 4)), "(2, 4, 4)", "(d_out, d_in)"
    ),
    case("mask: random of a cube", lambda: random_mask((2, 4, 4), 0), "(2, 4, 4)", "(d_out, d_in)"),
    case("mask: a scale for random", lambda: make_mask("random", torch.zeros(4, 8), 0, torch.ones(8)), "leave it out"),
    case("mask: 10 rows", lambda: transposable_mask(torch.zeros(10, 8)), "10x8", "4x4 tiles"),
    case("pack: 3 of 4", lambda: pack_indices(torch.tensor([[1, 1, 1, 0] * 2]).bool()), "keep 3 of four", "exactly 2"),
    case("pack: 1 of 4", lambda: pack_indices(torch.tensor([[1, 1, 0, 0, 1, 0, 0, 0]]).bool()), "columns 4 to 7", "1"),
    case("pack: a vector", lambda: pack_indices(torch.ones(8).bool()), "(8,)", "a matrix"),
    case("pack: floats", lambda: pack_indices(torch.tensor([[0.5, 0.5, 0, 0] * 2])), "torch.float32", "bool"),
    case("compress: wider", lambda: compress(torch.zeros(8, 24), index(8, 2)), "(8, 24)", "(8, 16)"),
    case("compress: int64 indices", lambda: compress(torch.zeros(8, 16), index(8, 2).long()), "torch.int64", "uint8"),
    case("decompress: dense", lambda: decompress(torch.zeros(8, 16), index(8, 2)), "(8, 16)", "(8, 2)"),
    case("transpose: columns of W", lambda: backward_values(torch.zeros(8, 8), index(8, 2), index(8, 2)), "(16, 8)"),
]
CASES = [*MAKING, *INPUTS, *OPERATIONS, *MATHS]
