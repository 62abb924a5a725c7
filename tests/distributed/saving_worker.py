"""One of two gloo processes: folders of FSDP2 and DeepSpeed that take the place of older ones."""

import os
import resource
import shutil
import sys
import traceback
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch

from slope_pl import SLoPeDDPStrategy, SLoPeModelParallelStrategy
from slope_pl.checkpoint.whole import damage
from tests.distributed.checkpoint_worker import Steady, on_one, stretch
from tests.distributed.sharded_worker import CPUZero, PlainCPUZero, refused
from tests.lightning.toy import make_trainer


class Watched:
    """Notes what is in the final folder once the strategy has written everything and before anybody has renamed anything."""

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        super().save_checkpoint(checkpoint, filepath, storage_options)
        torch.distributed.barrier()  # of one file, rank 0 alone knows when it is written
        self.seen.append(step_in(self.final))


class WatchedFSDP2(Watched, SLoPeModelParallelStrategy):
    pass


class WatchedZero(Watched, CPUZero):
    pass


class WatchedPlainZero(Watched, PlainCPUZero):
    pass


def step_in(path):
    """The step that a whole checkpoint is of; None where there is none."""
    if not path.exists():
        return None
    assert damage(path) is None, damage(path)
    place = path / "meta.pt" if path.is_dir() else path
    place = place if place.exists() else next((path / "checkpoint").glob("*model_states.pt"))
    return torch.load(place, weights_only=False)["global_step"]


class Saves(pl.Callback):
    """Saves at steps 2 and 4 under one name, and ends the run."""

    def __init__(self, final, second=None):
        self.final, self.second = final, second

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.final)
        if trainer.global_step == 4:
            self.second(trainer) if self.second is not None else trainer.save_checkpoint(self.final)
            trainer.should_stop = True


def run(folder, strategy, second=None):
    make_trainer(folder, Saves(folder / "last.ckpt", second), devices=2, strategy=strategy).fit(Steady(2))
    torch.distributed.barrier()
    return sorted(str(path.relative_to(folder)) for path in folder.iterdir())


def twice(folder, strategy):
    strategy.seen, strategy.final = [], folder / "last.ckpt"
    left = run(folder, strategy)
    return strategy.seen, step_in(strategy.final), left


def after(folder, first, strategy):
    """What another strategy has saved under that name lies there."""
    folder.mkdir(exist_ok=True)
    saved = stretch(folder / "first", first, 2, 1)
    on_one(lambda: saved.rename(folder / "last.ckpt"))
    on_one(lambda: shutil.rmtree(folder / "first"))
    return twice(folder, strategy)


def after_a_file(folder):
    return after(folder, SLoPeDDPStrategy(), WatchedZero(stage=1))


def after_a_folder(folder):
    return after(folder, SLoPeModelParallelStrategy(), WatchedFSDP2(save_distributed_checkpoint=False))


def too_large(folder):
    """The disk is full at the second save: both ranks say so."""
    said = []

    def second(trainer):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        said.append(refused(lambda: trainer.save_checkpoint(folder / "last.ckpt")))
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    left = run(folder, SLoPeModelParallelStrategy(), second)
    return *said, step_in(folder / "last.ckpt"), left


def not_ours(folder):
    """Something else has that name."""
    (folder / "last.ckpt").mkdir(parents=True, exist_ok=True)
    (folder / "last.ckpt" / "thesis.tex").touch()
    said = refused(lambda: run(folder, CPUZero(stage=2)))
    return said, sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def weights_alone(folder):
    """What a fit says of checkpoints without the state of a run."""
    folder.mkdir(exist_ok=True)
    kinds = {
        "fsdp2": SLoPeModelParallelStrategy,
        "fsdp2, one file": lambda: SLoPeModelParallelStrategy(save_distributed_checkpoint=False),
        "zero2": lambda: CPUZero(stage=2),
    }
    said = {}
    for kind, make in kinds.items():
        file = folder / f"{kind}.ckpt"
        run(folder, make(), lambda trainer, file=file: trainer.save_checkpoint(file, weights_only=True))
        for other, make_other in kinds.items():
            trainer = make_trainer(folder, devices=2, strategy=make_other())
            said[kind, other] = refused(lambda trainer=trainer, file=file: trainer.fit(Steady(2), ckpt_path=file))
    return said


class Larger(Steady):
    """Its checkpoint's module has no such layer."""

    def __init__(self):
        super().__init__(2)
        self.net.extra = torch.nn.Linear(4, 4)


def another_model(folder):
    folder.mkdir(exist_ok=True)
    run(folder, SLoPeModelParallelStrategy())
    trainer = make_trainer(folder, devices=2, strategy=SLoPeModelParallelStrategy())
    return refused(lambda: trainer.fit(Larger(), ckpt_path=folder / "last.ckpt"))


def main(folder):
    warnings.simplefilter("ignore")
    reports = {}
    scenarios = {
        "fsdp2": lambda: twice(folder / "fsdp2", WatchedFSDP2()),
        "zero2": lambda: twice(folder / "zero2", WatchedZero(stage=2)),
        "zero3": lambda: twice(folder / "zero3", WatchedZero(stage=3)),
        "plain zero1": lambda: twice(folder / "zero1", WatchedPlainZero(stage=1)),
        "after_a_file": lambda: after_a_file(folder / "after_a_file"),
        "after_a_folder": lambda: after_a_folder(folder / "after_a_folder"),
        "too_large": lambda: too_large(folder / "too_large"),
        "weights_alone": lambda: weights_alone(folder / "weights_alone"),
        "another_model": lambda: another_model(folder / "another_model"),
        "not_ours": lambda: not_ours(folder / "not_ours"),
    }
    for name, scenario in scenarios.items():
        try:
            reports[name] = scenario()
        except BaseException:
            reports[name] = traceback.format_exc()
            break  # the other rank is elsewhere by now
    torch.save(reports, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
