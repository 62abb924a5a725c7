"""The table of docs: how far a resumed run is from the one that never stopped, under every strategy and precision.

    python -m tests.distributed.table            # one and a half minutes on two cores; exit status 1 if a number is not 0

Two gloo processes, 20 steps with re-setups at 5, 10, 15 and the adapters' wake at 12, dropout in the net.
Compared are all weights, masks and buffers, and every loss after the resume.
"""

import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from slope_pl import SLoPeDDPStrategy, SLoPeModelParallelStrategy
from tests.distributed.processes import report_of_two
from tests.distributed.sharded_worker import CPUZero, Sparse, whole_state
from tests.lightning.toy import Net, make_trainer

STRATEGIES = {
    "slope_ddp": SLoPeDDPStrategy,
    "slope_fsdp2": SLoPeModelParallelStrategy,
    "slope_fsdp2, one file": lambda: SLoPeModelParallelStrategy(save_distributed_checkpoint=False),
    **{f"slope_deepspeed_stage_{stage}": lambda stage=stage: CPUZero(stage=stage) for stage in (1, 2, 3)},
}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
# Heading -> the step it resumes at, and how many micro-batches a step has.
MOMENTS = {"before": (7, 1), "at the wake": (12, 1), "after": (14, 1), "accumulating": (13, 2)}


def net(seed):
    made = Net(seed)
    made.blocks[0] = torch.nn.Sequential(made.blocks[0], torch.nn.Dropout(0.2))
    return made


def run(folder, strategy, precision, accumulate, ckpt_path=None, seed=0):
    """Losses and the whole state at the end."""
    torch.manual_seed(seed)
    module = Sparse(net(0 if ckpt_path is None else 7))
    savers = (
        [ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)]
        if ckpt_path is None
        else []
    )
    trainer = make_trainer(
        folder, *savers, devices=2, strategy=strategy, precision=precision, accumulate_grad_batches=accumulate,
        enable_checkpointing=bool(savers),
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    return module.losses, whole_state(module)


def differences(folder, make_strategy, precision):
    """Heading -> largest difference."""
    found = {}
    for accumulate in (1, 2):
        place = folder / str(accumulate)
        losses, state = run(place, make_strategy(), precision, accumulate)
        for heading, (step, per_step) in MOMENTS.items():
            if per_step != accumulate:
                continue
            again, resumed = run(place, make_strategy(), precision, accumulate, place / f"step={step}.ckpt", seed=5)
            pairs = [(state[name].double(), resumed[name].double()) for name in state]
            pairs.append((torch.tensor(losses[step * accumulate :]), torch.tensor(again)))
            found[heading] = max((a - b).abs().max().item() for a, b in pairs)
    return found


def work(folder):
    """One of the two processes."""
    warnings.simplefilter("ignore")
    report = {}
    for name, make_strategy in STRATEGIES.items():
        for precision in PRECISIONS:
            try:
                report[name, precision] = differences(folder / f"{name} {precision}", make_strategy, precision)
            except Exception:
                report[name, precision] = traceback.format_exc(limit=-1).strip().splitlines()[-1]
    torch.save(report, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


def main():
    """Start both, print the table."""
    with tempfile.TemporaryDirectory() as name:
        ranks = report_of_two("tests.distributed.table", Path(name), 1800)
    print(f"| strategy | precision | {' | '.join(MOMENTS)} |")
    print(f"|---|---|{'---|' * len(MOMENTS)}")
    failed = False
    for key in ranks[0]:
        rows = [report[key] for report in ranks]
        if any(isinstance(row, str) for row in rows):
            print(f"| `{key[0]}` | {key[1]} | {next(row for row in rows if isinstance(row, str))} |")
            failed = True
            continue
        worst = {heading: max(row[heading] for row in rows) for heading in MOMENTS}
        failed = failed or any(worst.values())
        print(f"| `{key[0]}` | {key[1]} | {' | '.join(f'{value:g}' for value in worst.values())} |")
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(Path(sys.argv[1]))
    else:
        sys.exit(main())
