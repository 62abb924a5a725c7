"""One linear layer in several variants, with inputs to rotate over: what the layer suites share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.recorder import Point
from benchmarks.session import Session
from benchmarks.shapes import LinearShape
from benchmarks.timing import Run, copies_beyond_l2
from benchmarks.variants import slope_linear
from slope_pl import SparseLinear


class Bench:
    """A dense layer, its 2:4 sparse counterpart and random data; bf16 throughout.

    Args:
        session: device and seed.
        shape: of the layer and its input.
        suite: of the rows.
        dtype: of the stored weights; products are bf16.
        rank: of the sparse layer's adapters, awake.
    """

    def __init__(
        self,
        session: Session,
        shape: LinearShape,
        suite: str,
        *,
        dtype: torch.dtype = torch.bfloat16,
        rank: int = 0,
    ) -> None:
        self.session, self.shape = session, shape
        precision = "bf16-true" if dtype is torch.bfloat16 else "bf16-mixed"
        self.point = Point(suite, shape.name, shape.d_in, shape.d_out, shape.tokens, precision)
        torch.manual_seed(session.options.seed)
        device = session.device
        self.dense = nn.Linear(shape.d_in, shape.d_out, device=device, dtype=dtype)
        self.slope: SparseLinear = slope_linear(self.dense, session.options.backend, rank)
        # The layers share the bias: only one of them may train it, and gradients are asked for by name here.
        self.count = copies_beyond_l2(2 * shape.tokens * (shape.d_in + shape.d_out), device, most=4)
        self.x = [self._random(shape.d_in) for _ in range(self.count)]
        self.dy = [self._random(shape.d_out) for _ in range(self.count)]

    def _random(self, width: int) -> Tensor:
        return torch.randn(self.shape.tokens, width, device=self.session.device, dtype=torch.bfloat16)

    def layers(self) -> dict[str, nn.Module]:
        """By variant."""
        return {"dense": self.dense, "slope": self.slope}

    def forward(self, layer: Callable[[Tensor], Tensor]) -> Run:
        """Inference: no graph recorded."""

        def run(i: int) -> Tensor:
            with torch.no_grad():
                return layer(self.x[i % self.count])

        return run

    def dgrad(self, layer: nn.Module) -> Run:
        """The gradient of the input alone: the weights are frozen while the graph is made, which is made once."""
        weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        x = [part.detach().requires_grad_() for part in self.x]
        for weight in weights:
            weight.requires_grad_(False)
        y = [layer(part) for part in x]
        for weight in weights:
            weight.requires_grad_(True)

        def run(i: int) -> object:
            k = i % self.count
            return torch.autograd.grad(y[k], x[k], self.dy[k], retain_graph=True)

        return run

    def training(self, layer: nn.Module) -> Run:
        """Forward, and the gradients of input, weight and bias."""
        weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        x = [part.detach().requires_grad_() for part in self.x]

        def run(i: int) -> object:
            k = i % self.count
            return torch.autograd.grad(layer(x[k]), [x[k], *weights], self.dy[k])

        return run
