"""The cuSPARSELt backend: kept plans, verified algorithms, operands made by our own kernels (``extensions/``).

An operand is one buffer of the compute dtype, ``9 / 16 d_out d_in`` elements: the kept values ``(d_out, d_in / 2)``, then
the hardware's metadata. A weight of that dtype lives inside its own forward operand, so that no second copy of it exists.

On Hopper, narrow layers are multiplied by CUTLASS kernels instead where the extension has them: they are faster there
(``extensions/cutlass/README.md``). Their metadata lie in another order, so a weight's shape alone decides.
"""

import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from slope_pl.ops.algorithm_cache import SM90, After, Order
from slope_pl.ops.algorithms import DEFAULT, Launch, candidates, choose_launch, encode
from slope_pl.ops.backends import Backend, Place, register_backend
from slope_pl.ops.extension import extension
from slope_pl.ops.operands import Change, Pair
from slope_pl.ops.reference import in_the_given_dtype
from slope_pl.sparsity import pack_indices
from slope_pl.sparsity.masks import keep_two_of_four

DTYPES = (torch.bfloat16, torch.float16)
log = logging.getLogger(__name__)
_FLOATS = (torch.float32, *DTYPES)
# A weight whose shorter side lies between these goes to the CUTLASS kernels: on an H100 they were faster at 768, 1024 and 1536
# and slower from 4096 on; below 512 the host's time decides, of which they take some microseconds more.
NARROW = 512, 1536
_Key = tuple[int, int, int, torch.dtype, int, bool, After]
_LAUNCHES: dict[_Key, Launch] = {}
_MAX_LAUNCHES = 1 << 14  # distinct token counts of a long run; beyond, they are looked up in the cache again


def _device_problem() -> str | None:
    """Why no GPU of this process can run it. Creates no context: the GPU is asked once something else has made one."""
    if not torch.cuda.is_available():
        return "this machine has no usable CUDA GPU"
    if torch.cuda.is_initialized() and (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"sparse tensor cores need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


def why_not(place: Place) -> str | None:
    """The first condition that a place does not meet."""
    if place.device_type != "cuda":
        return "it runs on CUDA GPUs only"
    problem = extension().problem or _device_problem()
    if problem is not None:
        return problem
    if place.dtype is not None and place.dtype not in DTYPES:
        name = str(place.dtype).removeprefix("torch.")
        return f"it multiplies bfloat16 and float16, the input is {name} (train with precision bf16-mixed or bf16-true)"
    if place.d_out is not None and place.d_in is not None and (place.d_out % 16 or place.d_in % 16):
        return f"{place.d_out}x{place.d_in}: both sides must be multiples of 16"
    return None


def refresh(
    pair: Pair, values: Tensor, indices: Tensor, backward_indices: Tensor, bias: Tensor | None, change: Change
) -> None:
    """Metadata where a mask changed, then both operands' values in one pass."""
    ops = torch.ops.slope_cuda
    d_out, d_in = values.shape[0], values.shape[1] * 2
    values = values.contiguous()
    if change.needs_forward:
        if pair.forward is None:
            pair.forward, change.pattern = _new_operand(values, d_out, d_in, pair), True
        if change.pattern:
            ops.write_metadata(indices, pair.forward, order_of(d_out, d_in, values.device))
    if change.needs_backward:
        if pair.backward is None:
            pair.backward, change.columns = _new_operand(values, d_in, d_out, pair), True
        if change.columns:
            ops.write_metadata(backward_indices, pair.backward, order_of(d_in, d_out, values.device))
    forward = pair.forward if change.needs_forward and not pair.forward_is_values else None
    backward = pair.backward if change.needs_backward else None
    if forward is not None or backward is not None:
        ops.refresh(values, indices, backward_indices, forward, backward)
    if bias is not None:
        _refresh_bias(pair, bias)


def _refresh_bias(pair: Pair, bias: Tensor) -> None:
    """The bias in the compute dtype: its address is part of every plan, so a copy keeps its place.

    The layer's own serves where it stays; one that is gathered for a product lies elsewhere each time.
    """
    if pair.lasting and bias.dtype == pair.dtype and bias.is_contiguous() and bias.data_ptr() % 16 == 0:
        pair.bias = None
        return
    if pair.bias is None or pair.bias.shape != bias.shape or pair.bias.device != bias.device:
        pair.bias = _lasting(tuple(bias.shape), pair.dtype, bias.device)
    pair.bias.copy_(bias)


@functools.cache
def order_of(d_out: int, d_in: int, device: torch.device) -> Order:
    """In which order the metadata of a weight lie, and so which library multiplies it."""
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    if hopper and NARROW[0] <= min(d_out, d_in) <= NARROW[1] and torch.ops.slope_cuda.sm90_configs() > 0:
        return Order.CUTLASS
    return Order.DIRECT if hopper and _direct_order_is_right(device) else Order.LIBRARY


@functools.cache
def _direct_order_is_right(device: torch.device) -> bool:
    """Whether metadata written by our kernel multiply like those that cuSPARSELt makes itself: asked once a process.

    The order is not documented, and a new version of the library may change it.
    """
    ops, dtype = torch.ops.slope_cuda, torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for rows, columns in ((80, 272), (256, 512)):
            key = torch.rand(rows, columns, device=device, generator=generator)
            indices = pack_indices(keep_two_of_four(key))
            size = ops.operand_bytes(indices, rows, columns, dtype, Order.LIBRARY) // 2
            x = torch.empty(64, columns, device=device, dtype=dtype).normal_(generator=generator)
            operand = torch.empty(size, device=device, dtype=dtype).normal_(generator=generator)
            results = []
            for order in (Order.LIBRARY, Order.DIRECT):
                ops.write_metadata(indices, operand, order)
                results.append(ops.spmm(x, operand, None, rows, encode(DEFAULT), encode(DEFAULT)))
            if not torch.equal(*results):
                log.warning(
                    "slope_pl: cuSPARSELt %s orders its metadata in a way that is not known here; they are made by the "
                    "library itself, which costs up to milliseconds a layer at each re-setup",
                    extension().running,
                )
                return False
    return True


def _new_operand(like: Tensor, rows: int, columns: int, pair: Pair) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "SparseLinear: operands cannot be allocated while a CUDA graph is recorded, run one training step (or "
            "layer.refresh_operands(dtype)) before"
        )
    order = order_of(rows, columns, like.device)
    size = torch.ops.slope_cuda.operand_bytes(like, rows, columns, pair.dtype, order)
    if not pair.lasting:
        return torch.empty(size // 2, dtype=pair.dtype, device=like.device)
    return _lasting((size // 2,), pair.dtype, like.device)


def _lasting(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a tensor that outlives the step in which it is first needed.

    ``torch.compile(mode="reduce-overhead")`` sends what its thread allocates in a first step to the pool of its CUDA graphs,
    and fails if anything of that is still alive afterwards. So another thread allocates; this happens once a weight.
    """
    stream = torch.cuda.current_stream(device)

    def allocate() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.empty(shape, dtype=dtype, device=device)

    with ThreadPoolExecutor(1) as other:
        return other.submit(allocate).result()


def own_values(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor] | None:
    """Move a weight into its own forward operand.

    Only where nobody else has a share in its storage: ZeRO's flat buffers, say, must go on being what the weight is.
    """
    d_out, d_in = values.shape[0], values.shape[1] * 2
    alone = values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes
    if not alone or why_not(Place(values.device.type, values.dtype, d_out, d_in)) is not None:
        return None
    operand = _new_operand(values, d_out, d_in, Pair(values.dtype, "cusparselt"))
    head = operand[: values.numel()].view(values.shape)
    head.copy_(values)
    # Through DLPack the weight gets a storage of its own size at the operand's address: saved and copied, it is itself and
    # nothing more, while it keeps the whole buffer alive.
    return torch.from_dlpack(head), operand


def _launch_for(
    x: Tensor, operand: Tensor, indices: Tensor, bias: Tensor | None, after: After = After.NOTHING
) -> Launch:
    d_out, eighths = indices.shape
    key = (x.numel(), d_out, eighths, x.dtype, x.get_device(), bias is None, after)
    launch = _LAUNCHES.get(key)
    if launch is None:
        d_in = eighths * 8
        launch = choose_launch(x, operand, indices, bias, order_of(d_out, d_in, x.device), after)
        if not torch.cuda.is_current_stream_capturing():  # where nothing could be searched
            if len(_LAUNCHES) >= _MAX_LAUNCHES:
                _LAUNCHES.clear()
            _LAUNCHES[key] = launch
    return launch


def forward(x: Tensor, forward_operand: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``: ``(..., d_in) -> (..., d_out)``; any number of rows."""
    launch = _launch_for(x, forward_operand, indices, bias)
    return torch.ops.slope_cuda.spmm.default(x, forward_operand, bias, indices.shape[0], *launch)


def dgrad(dy: Tensor, backward_operand: Tensor, backward_indices: Tensor) -> Tensor:
    """``dy W_RC``: ``(..., d_out) -> (..., d_in)``."""
    return forward(dy, backward_operand, backward_indices, None)


def fuses_gelu(place: Place) -> bool:
    """Whether a kernel of the extension takes GELU into the epilogue of a product: the CUTLASS kernels, on Hopper."""
    if why_not(place) is not None or place.d_out is None or place.d_in is None:
        return False
    return _has_gelu(order_of(place.d_out, place.d_in, torch.device("cuda", torch.cuda.current_device())))


@functools.cache
def _has_gelu(order: Order) -> bool:
    return order is Order.CUTLASS and bool(candidates(0, order, After.GELU))


def forward_gelu(
    x: Tensor, forward_operand: Tensor, indices: Tensor, bias: Tensor | None, approximate: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """``gelu(pre), pre`` with ``pre = x W^T + b``, in one kernel where there is one."""
    if bias is None or not _has_gelu(order_of(indices.shape[0], indices.shape[1] * 8, x.device)):
        pre = forward(x, forward_operand, indices, bias)
        return torch.nn.functional.gelu(pre, approximate=approximate), pre if keep else pre.new_empty(0)
    tanh = approximate == "tanh"
    launch = _launch_for(x, forward_operand, indices, bias, After.GELU_TANH if tanh else After.GELU)
    return torch.ops.slope_cuda.spmm_gelu.default(
        x, forward_operand, bias, indices.shape[0], _config(launch), tanh, keep
    )


def dgrad_gelu(dy: Tensor, backward_operand: Tensor, backward_indices: Tensor, pre: Tensor, approximate: str) -> Tensor:
    """``(dy W_RC) gelu'(pre)``, in one kernel where there is one."""
    if not _has_gelu(order_of(backward_indices.shape[0], backward_indices.shape[1] * 8, dy.device)):
        dx = dgrad(dy, backward_operand, backward_indices)
        return torch.ops.aten.gelu_backward(dx, pre, approximate=approximate)
    tanh = approximate == "tanh"
    after = After.GELU_GRADIENT_TANH if tanh else After.GELU_GRADIENT
    launch = _launch_for(dy, backward_operand, backward_indices, None, after)
    return torch.ops.slope_cuda.spmm_gelu_gradient.default(
        dy, backward_operand, pre, backward_indices.shape[0], _config(launch), tanh
    )


def _config(launch: Launch) -> int:
    """Number of a CUTLASS configuration."""
    return (launch.how & 0xFFFF) - 1 - SM90


@in_the_given_dtype
def wgrad(dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """``(dy^T x)`` at the kept entries: a dense GEMM, then one pass that selects and casts."""
    dense = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    if dtype not in _FLOATS:
        return torch.ops.slope_cuda.select.default(dense, indices, torch.float32).to(dtype)
    return torch.ops.slope_cuda.select.default(dense, indices, dtype)


def choose_columns(values: Tensor, indices: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """The re-setup in one kernel, churn included."""
    chosen, counts = torch.ops.slope_cuda.choose_columns(values.detach().contiguous(), indices, previous)
    return chosen, counts[0].to(torch.float32) / counts[1].to(torch.float32)


register_backend(
    Backend(
        name="cusparselt",
        why_not=why_not,
        refresh=refresh,
        forward=forward,
        dgrad=dgrad,
        wgrad=wgrad,
        choose_columns=choose_columns,
        fuses_gelu=fuses_gelu,
        forward_gelu=forward_gelu,
        dgrad_gelu=dgrad_gelu,
        own_values=own_values,
    )
)
