"""One run: what suites use to compare candidates, and the models they share."""

import functools
import gc
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from benchmarks import graphs, timing
from benchmarks.options import Options
from benchmarks.recorder import Point, Recorder
from benchmarks.timing import Run, Stats

T = TypeVar("T")
Clock = Literal["eager", "graph", "host"]


class Session(Recorder):
    """A run in which candidates are compared and compiled models are shared."""

    def __init__(self, options: Options, out: Path | None) -> None:
        super().__init__(options, out)
        self._shared: dict[Any, Any] = {}
        _fix_global_state(self.device)

    def compare(
        self,
        point: Point,
        measure: str,
        runs: Mapping[str, Run],
        clock: Clock = "eager",
        *,
        rotate: int = 1,
        seconds: float | None = None,
        note: str = "",
    ) -> dict[str, Stats]:
        """Time candidates in turns and keep a row each; a candidate that fails gets a row with its error.

        Args:
            point: of the rows.
            measure: of the rows; the clock is named in it by the caller where it matters.
            runs: candidates; ``dense`` is what the others are compared with.
            clock: ``eager`` and ``graph`` in milliseconds of the GPU, ``host`` in microseconds.
            rotate: inputs that a graph has to take turns over.
            seconds: other than the options'.
            note: of the rows.

        Returns:
            of the candidates that ran.
        """
        if not self.options.wants(measure):
            return {}
        runs = {name: run for name, run in runs.items() if self.options.wants_variant(name)}
        if clock == "graph" and self.device.type != "cuda":
            for name in runs:
                self.skip(point, name, measure, "CUDA graphs need a GPU")
            return {}
        ready: dict[str, tuple[Run, int]] = {}
        for name, run in runs.items():
            made = self.attempt(point, name, measure, lambda run=run: self._warm(run, clock, rotate))  # type: ignore[misc]
            if made is not None:
                ready[name] = made
        if self.options.compile_only:
            return {}
        stats = self._time({name: run for name, (run, _) in ready.items()}, clock, seconds or self.options.seconds)
        stats = {name: value.over(ready[name][1]) for name, value in stats.items()}
        for name, value in stats.items():
            self.keep(
                point, name, measure, value, stats.get("dense"), metric="us" if clock == "host" else "ms", note=note
            )
        return stats

    def _warm(self, run: Run, clock: Clock, rotate: int) -> tuple[Run, int]:
        for i in range(1 if self.options.compile_only else max(2, rotate)):
            run(i)
        timing.synchronize(self.device)
        if self.options.compile_only:
            return run, 1
        return graphs.graphed(run, self.device, rotate) if clock == "graph" else (run, 1)

    def _time(self, runs: Mapping[str, Run], clock: Clock, seconds: float) -> dict[str, Stats]:
        quick = self.options.quick
        if clock == "host":
            calls, rounds = (5, 3) if quick else (100, 30)
            return timing.interleave_host(runs, self.device, calls=calls, rounds=rounds)
        return timing.interleave(runs, self.device, seconds=0.01 if quick else seconds, least=2 if quick else 7)

    @functools.cached_property
    def copy_rate(self) -> float:
        """GB/s of a copy on this device, measured once a run; bytes read and written both counted."""
        return timing.copy_bandwidth(self.device, 1 << 20 if self.options.quick else 1 << 30).median

    def compile(self, model: nn.Module) -> Callable[..., Any]:
        """The whole model as one graph for fixed shapes; a graph break is an error, not a silent slowdown."""
        if self.options.compiler == "none":
            return model
        return torch.compile(model, fullgraph=True, dynamic=False, backend=self.options.compiler)

    def shared(self, key: Any, make: Callable[[], T]) -> T:
        """One object for all suites that look at the same model; made once, kept until :meth:`release`."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def release(self) -> None:
        """Forget what was made, compiled functions included, and give the memory back."""
        self._shared.clear()
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def autocast(device: torch.device, precision: str) -> Any:
    """As Lightning does for ``bf16-mixed``; nothing for ``bf16-true``."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


def _fix_global_state(device: torch.device) -> None:
    # Compiled variants of one block share its code: the default of 8 would leave the ninth eager, in silence.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device.type == "cuda":
        # Flash attention on all sides; without this SDPA may choose another kernel for one shape and not for the next.
        torch.backends.cuda.enable_math_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
