"""One of several gloo processes: runs that stop and go on under another strategy, or with another number of processes."""

import os
import pickle
import shutil
import sys
import traceback
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from slope_pl import SLoPeDDPStrategy, SLoPeModelParallelStrategy, SLoPeSingleDeviceStrategy, sparse_layers
from slope_pl.checkpoint import convert
from tests.distributed.sharded_worker import CPUZero, Late, Sparse, refused, whole_state
from tests.lightning.toy import Bomb, Net, make_trainer

TOTAL_BATCH = 16


class Steady(Sparse):
    """Large eps: Adam's first steps are no signs of gradients, so that rounding stays rounding. One parameter is frozen."""

    def __init__(self, ranks, seed=0):
        super().__init__(Net(seed))
        self.batch_size = TOTAL_BATCH // ranks
        self.net.first.bias.requires_grad_(False)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["eps"] = 1e-3
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Stop(pl.Callback):
    """Ends the run after a step that a ModelCheckpoint has saved; saves once more what was restored."""

    def __init__(self, step, start=None):
        self.step, self.start = step, start

    def on_train_start(self, trainer, pl_module):
        if self.start is not None:
            trainer.save_checkpoint(self.start)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self.step


def stretch(folder, strategy, ranks, until, ckpt_path=None, every=None, precision="32-true"):
    """Train to a step from a checkpoint; what is saved at its end is ``folder/step=N.ckpt``, at its start ``start.ckpt``."""
    # Other weights than the checkpoint's: all has to come from there.
    module = Steady(ranks, seed=0 if ckpt_path is None else 7)
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=every or until)
    stop = Stop(until, None if ckpt_path is None else folder / "start.ckpt")
    settings = {"devices": ranks, "strategy": strategy, "enable_checkpointing": True, "precision": precision}
    trainer = make_trainer(folder, saver, stop, **settings)
    trainer.fit(module, ckpt_path=ckpt_path)
    return folder / f"step={until}.ckpt"


def single():
    return SLoPeSingleDeviceStrategy("cpu")


def on_one(task):
    """Run a task on rank 0 while the others wait."""
    if os.environ["LOCAL_RANK"] == "0":
        task()
    torch.distributed.barrier()


def chain(folder):
    """From ``folder/single``, which one process wrote, through the strategies; every third step by a conversion."""
    ddp = stretch(folder / "ddp", SLoPeDDPStrategy(), 2, 8, folder / "single" / "step=4.ckpt")
    zero3 = stretch(folder / "zero3", CPUZero(stage=3), 2, 11, ddp)
    on_one(lambda: convert(zero3, folder / "zero3.ckpt"))
    full = SLoPeModelParallelStrategy(save_distributed_checkpoint=False)
    fsdp2 = stretch(folder / "fsdp2_full", full, 2, 13, folder / "zero3.ckpt")
    on_one(lambda: convert(fsdp2, folder / "sharded.ckpt", to="sharded"))
    fsdp2 = stretch(folder / "fsdp2", SLoPeModelParallelStrategy(), 2, 14, folder / "sharded.ckpt")
    zero2 = stretch(folder / "zero2", CPUZero(stage=2), 2, 16, fsdp2)
    zero1 = stretch(folder / "zero1", CPUZero(stage=1), 2, 17, zero2)
    on_one(lambda: convert(zero1, folder / "zero1.ckpt"))


def halves(folder):
    """ZeRO computes in bf16 and keeps fp32 weights beside: those are the ones to take along."""
    zero2 = stretch(
        folder / "bf16_2", CPUZero(stage=2), 2, 6, folder / "single" / "step=4.ckpt", precision="bf16-mixed"
    )
    zero3 = stretch(folder / "bf16_3", CPUZero(stage=3), 2, 7, zero2, precision="bf16-mixed")
    stretch(folder / "bf16_ddp", SLoPeDDPStrategy(), 2, 8, zero3, precision="bf16-mixed")


def evaluate(folder):
    """What validation under a sharding strategy restores, from what others wrote, and from its own."""
    zero3, zero2 = folder / "zero3" / "step=11.ckpt", folder / "zero2" / "step=16.ckpt"
    cases = {
        "zero3 by zero3": (CPUZero(stage=3), zero3),
        "zero2 by zero3": (CPUZero(stage=3), zero2),
        "zero3 by zero2": (CPUZero(stage=2), zero3),
        "zero2 by fsdp2": (SLoPeModelParallelStrategy(), zero2),
    }
    restored = {}
    for case, (strategy, path) in cases.items():
        module = Steady(2, seed=7)
        make_trainer(folder, devices=2, strategy=strategy, limit_val_batches=1).validate(module, ckpt_path=path)
        restored[case] = whole_state(module), [layer.adapters_awake for layer in sparse_layers(module).values()]
    return restored


def widen(folder):
    """Four processes go on from what two wrote."""
    stretch(folder / "fsdp2_4", SLoPeModelParallelStrategy(), 4, 16, folder / "fsdp2" / "step=14.ckpt")
    stretch(folder / "zero3_4", CPUZero(stage=3), 4, 13, folder / "zero3" / "step=11.ckpt")
    stretch(folder / "zero2_4", CPUZero(stage=2), 4, 17, folder / "zero2" / "step=16.ckpt")


def arm(folder, source, name, key):
    """A copy of a checkpoint's folder with one file that does something when it is unpickled."""
    armed = folder / f"armed {name} {key}"
    shutil.copytree(source, armed)
    (file,) = armed.rglob(name)
    if name == ".metadata":
        content = pickle.loads(file.read_bytes())
        content.storage_meta = Bomb(folder / "executed")
        file.write_bytes(pickle.dumps(content))
    else:
        content = torch.load(file, weights_only=False)
        content[key] = Bomb(folder / "executed")
        torch.save(content, file)
    return armed


def armed(folder):
    """What a fit says of folders that would run code."""
    fsdp2, zero3 = folder / "fsdp2" / "step=14.ckpt", folder / "zero3" / "step=11.ckpt"
    cases = {
        "fsdp2 index": (SLoPeModelParallelStrategy(), fsdp2, ".metadata", "x"),
        "fsdp2 rest": (SLoPeModelParallelStrategy(), fsdp2, "meta.pt", "x"),
        "zero model": (CPUZero(stage=3), zero3, "zero_pp_rank_0_mp_rank_00_model_states.pt", "x"),
        "zero optimizer": (CPUZero(stage=3), zero3, "zero_pp_rank_1_mp_rank_00_optim_states.pt", "x"),
    }
    said = {}
    for case, (strategy, source, name, key) in cases.items():
        path = folder / f"armed {name} {key}"
        on_one(lambda source=source, name=name, key=key: arm(folder, source, name, key))
        said[case] = refused(lambda path=path, strategy=strategy: stretch(folder / "never", strategy, 2, 20, path))
    return said


class Seen(Late):
    """What a rank has of each layer's parameters right after the conversion."""

    def configure_model(self):
        super().configure_model()
        self.sizes = [
            p.numel()
            for layer in sparse_layers(self).values()
            for p in (layer.values, layer.adapter_down, layer.adapter_up)
        ]


def built_in_parts(folder):
    module = Seen()
    make_trainer(folder, devices=2, strategy=CPUZero(stage=3), max_steps=13).fit(module)
    return module.sizes


SCENARIOS = {
    "2": {"chain": chain, "halves": halves, "evaluate": evaluate, "armed": armed, "built_in_parts": built_in_parts},
    "4": {"widen": widen},
}


def main(folder):
    warnings.simplefilter("ignore")
    reports = {}
    for name, scenario in SCENARIOS[os.environ["WORLD_SIZE"]].items():
        try:
            reports[name] = scenario(folder)
        except Exception:
            reports[name] = traceback.format_exc()
            break  # the other ranks are elsewhere by now
    torch.save(reports, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
