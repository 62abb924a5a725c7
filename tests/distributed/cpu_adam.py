"""DeepSpeed's DeepSpeedCPUAdam against torch's AdamW, under ZeRO 1 to 3, with the optimizer offloaded and without.

    python -m tests.distributed.cpu_adam          # half a minute, and as much at first, while DeepSpeed compiles its operation

No test: it needs a C++ compiler. Two gloo processes, 20 steps, the wake at 12. Exit status 1 if a run failed, or if
the adapters' steps were not counted from their wake.
"""

import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch

from slope_pl import SLoPeDDPStrategy
from tests.distributed.processes import report_of_two
from tests.distributed.sharded_worker import CPUZero, Sparse, grouped, whole_state
from tests.lightning.toy import make_trainer

WAKE, STEPS = 12, 20


class OnHost(Sparse):
    """The same groups, another optimizer."""

    def configure_optimizers(self):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in grouped(self).param_groups]
        return DeepSpeedCPUAdam(groups, lr=self.lr, adamw_mode=True)


class Counts(pl.Callback):
    """The steps that the optimizer has counted for its tensors, at the end."""

    def on_train_end(self, trainer, pl_module):
        outer = trainer.strategy.optimizers[0]
        self.counts = sorted({int(state["step"]) for state in getattr(outer, "optimizer", outer).state.values()})


RUNS = {
    "AdamW, `slope_ddp`": (Sparse, SLoPeDDPStrategy),
    **{
        f"DeepSpeedCPUAdam, ZeRO {stage}{', offloaded' if offload else ''}": (
            OnHost,
            lambda stage=stage, offload=offload: CPUZero(stage=stage, offload_optimizer=offload),
        )
        for stage in (1, 2, 3)
        for offload in (False, True)
    },
}


def work(folder: Path) -> None:
    """One of the two processes."""
    warnings.simplefilter("ignore")
    report = {}
    for name, (make, strategy) in RUNS.items():
        try:
            module, counts = make(), Counts()
            make_trainer(folder, counts, devices=2, strategy=strategy(), max_steps=STEPS).fit(module)
            report[name] = module.losses, whole_state(module), counts.counts
        except Exception:
            report[name] = traceback.format_exc()
    torch.save(report, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


def main() -> int:
    """Start both, print the table."""
    with tempfile.TemporaryDirectory() as folder:
        report = report_of_two("tests.distributed.cpu_adam", Path(folder), 900)[0]
    failures = [row for row in report.values() if isinstance(row, str)]
    if failures:
        print(failures[0], file=sys.stderr)
        return 1
    losses, state, _ = next(iter(report.values()))
    print("| | largest difference of a loss | of a weight | steps counted |\n|---|---|---|---|")
    for name, (own_losses, own_state, counts) in report.items():
        loss = max(abs(a - b) for a, b in zip(losses, own_losses, strict=True))
        weight = max(float((state[key].double() - own_state[key].double()).abs().max()) for key in state)
        print(f"| {name} | {loss:.1e} | {weight:.1e} | {', '.join(map(str, counts))} |")
    return int(any(counts != [STEPS - WAKE, STEPS] for _, _, counts in report.values()))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(Path(sys.argv[1]))
    else:
        sys.exit(main())
