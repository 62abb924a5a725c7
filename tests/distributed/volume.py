"""How many bytes a step of training sends, dense and sparse, under every strategy.

    python -m tests.distributed.volume            # a minute on two cores; exit status 1 if a run failed

Two gloo processes train a net whose weight lies in its sparse layers, in fp32. Counted, on rank 0, are the bytes of the
tensors that collective operations of one step are called with (of an all-gather what comes out, of a reduce-scatter what goes
in): what the wire carries is a fixed multiple of that for each operation and number of ranks.
"""

import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slope_pl import (
    SLoPeCallback,
    SLoPeConfig,
    SLoPeDDPStrategy,
    SLoPeLightningModule,
    SLoPeModelParallelStrategy,
)
from tests.distributed.processes import report_of_two
from tests.distributed.sharded_worker import CPUZero, PlainCPUZero, grouped
from tests.lightning.toy import Toy, make_trainer

WIDTH, HIDDEN, BLOCKS, RANK = 16, 128, 4, 4
ASLEEP, AWAKE, STEPS = 3, 8, 9  # steps that are measured, between the wake at 6 and re-setups at 5 and 10


def fsdp2() -> st.ModelParallelStrategy:
    """Lightning's own over both processes; under ours a dense module would be made sparse."""
    return st.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


# Name -> strategy of a dense run, strategy of a sparse one.
STRATEGIES: dict[str, tuple[Any, Any]] = {
    "ddp": (st.DDPStrategy, st.DDPStrategy),
    "slope_ddp": (st.DDPStrategy, SLoPeDDPStrategy),
    "slope_fsdp2": (fsdp2, SLoPeModelParallelStrategy),
    **{f"slope_deepspeed_stage_{n}": (partial(PlainCPUZero, stage=n), partial(CPUZero, stage=n)) for n in (1, 2, 3)},
}
CONFIGS = {
    "dense": None,
    "2:4, r = 0": SLoPeConfig(backward_refresh_steps=5),
    f"2:4, r = {RANK}": SLoPeConfig(backward_refresh_steps=5, adapter_rank=RANK, adapter_start_step=6),
}
# Operation of c10d -> what it is, and which of its arguments holds the whole tensors.
OPERATIONS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
}


KINDS = ("all-reduce", "reduce-scatter", "all-gather", "broadcast")


class Net(nn.Module):
    """Square layers between a dense first and a dense last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.blocks = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(BLOCKS))
        self.head = nn.Linear(HIDDEN, 4)

    def forward(self, batch):
        x = self.first(batch["x"])
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


class Measured(SLoPeLightningModule, Toy):
    """Dense or sparse; adapters in a group of their own, as ZeRO needs it."""

    def __init__(self, config: SLoPeConfig | None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(Net(), slope=config)

    def configure_optimizers(self):
        if self.slope_config is None or not self.slope_config.has_adapters:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)
        return grouped(self)


class Collectives(TorchDispatchMode):
    """Counts bytes by operation; DDP's reducer comes by here too, on a CPU, where backward runs in the caller's thread."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and func._opname != "barrier":
            kind, place = OPERATIONS[func._opname]  # an unknown one is an error, not a gap in the table
            self.bytes[kind] += nbytes(args[place])
        return func(*args, **(kwargs or {}))


def nbytes(tensors: Any) -> int:
    """Of a tensor, or a list of them, or lists in a list."""
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(map(nbytes, tensors))


class Meter(pl.Callback):
    """Measures two steps, from the first forward to the end of the optimizer's step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, int]] = {}
        self.mode: Collectives | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in (ASLEEP, AWAKE):
            self.at, self.mode = trainer.global_step, Collectives()
            self.mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.seen[self.at], self.mode = dict(self.mode.bytes), None


def measure(folder: Path, strategy: Any, config: SLoPeConfig | None) -> dict[int, dict[str, int]]:
    """Step -> operation -> bytes."""
    meter = Meter()
    slope = [] if config is None else [SLoPeCallback()]
    trainer = make_trainer(folder, *slope, meter, devices=2, strategy=strategy, max_steps=STEPS)
    trainer.fit(Measured(config))
    return meter.seen


def work(folder: Path, names: list[str]) -> None:
    """One of the two processes."""
    warnings.simplefilter("ignore")
    report: dict[Any, Any] = {}
    for name in names or STRATEGIES:
        for label, config in CONFIGS.items():
            dense, sparse = STRATEGIES[name]
            try:
                report[name, label] = measure(folder, (dense if config is None else sparse)(), config)
            except Exception:
                report[name, label] = traceback.format_exc()
    torch.save(report, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


def rows(report: dict[Any, Any]) -> Iterator[list[str]]:
    """Of the table: strategy, model, bytes by operation, all of them, and that as a share of the dense run's."""
    for name in dict.fromkeys(name for name, _ in report):
        dense = sum(report[name, "dense"][ASLEEP].values())
        for label, config in CONFIGS.items():
            phases = (
                {", asleep": ASLEEP, ", awake": AWAKE} if config is not None and config.has_adapters else {"": ASLEEP}
            )
            for phase, step in phases.items():
                seen = report[name, label][step]
                total = sum(seen.values())
                yield [f"`{name}`", label + phase, *(f"{seen.get(kind, 0):,}" for kind in KINDS), f"{total:,}",
                       f"{total / dense:.3f}"]  # fmt: skip


def main() -> int:
    """Start both, print the table."""
    with tempfile.TemporaryDirectory() as folder:
        report = report_of_two("tests.distributed.volume", Path(folder), 600)[0]
    for failure in (row for row in report.values() if isinstance(row, str)):
        print(failure, file=sys.stderr)
        return 1
    print(f"| strategy | model | {' | '.join(KINDS)} | together | of dense |")
    print(f"|---|---|{'---|' * (len(KINDS) + 2)}")
    for row in rows(report):
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(Path(sys.argv[1]), sys.argv[2:])
    else:
        sys.exit(main())
