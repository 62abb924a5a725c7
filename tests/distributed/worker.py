"""One of two gloo processes: ``python -m tests.distributed.worker FOLDER``, with the rank in LOCAL_RANK.

Trains every scenario, and writes what this rank has seen to ``FOLDER/rank{rank}.pt``. Initial weights and data differ
between the ranks: only what is synchronised on purpose can come out alike.
"""

import hashlib
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from slope_pl import SLoPeCallback, SLoPeConfig, SLoPeDDPStrategy, ops
from tests.lightning.toy import CONFIG, WIDTH, Net, Toy, hf_bert, hf_gpt2, make_trainer, snapshot

RANK = int(os.environ.get("LOCAL_RANK", "0"))
LONG = SLoPeConfig(backward_refresh_steps=20, adapter_rank=4, adapter_start=0.7)
RESUME_AT = (3, 5, 8, 11, 12, 13, 15)


class Manual(Toy):
    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Fingerprints(pl.Callback):
    """A hash of the state before and after every batch: before is after the schedule acted."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.note(trainer, pl_module, "start")

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.note(trainer, pl_module, "end")

    def note(self, trainer, pl_module, when):
        digest = hashlib.sha256()
        for name, tensor in sorted(pl_module.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.seen.append((trainer.global_step, when, digest.hexdigest()))


def train(folder, *callbacks, module=None, config=CONFIG, strategy="ddp", ckpt_path=None, **settings):
    module = Toy(Net(seed=RANK)) if module is None else module
    slope = SLoPeCallback(config)
    first = [] if strategy == "slope_ddp" else [slope]
    strategy = SLoPeDDPStrategy(config=config) if strategy == "slope_ddp" else strategy
    fingerprints = Fingerprints()
    trainer = make_trainer(folder, *first, *callbacks, fingerprints, devices=2, strategy=strategy, **settings)
    trainer.fit(module, ckpt_path=ckpt_path)
    slope = next(c for c in trainer.callbacks if isinstance(c, SLoPeCallback))
    return {
        "model": snapshot(module),
        "optimizer": trainer.optimizers[0].state_dict(),
        "callback": slope.state_dict(),
        "losses": module.losses,
        "fingerprints": fingerprints.seen,
    }


def long(folder, **settings):
    return train(folder, config=LONG, max_steps=100, **settings)


def resume(folder):
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    runs = {"whole": train(folder, saver, enable_checkpointing=True)}
    for step in RESUME_AT:
        module = Toy(Net(seed=7 + RANK))
        runs[step] = train(folder, module=module, ckpt_path=folder / f"step={step}.ckpt")
    return runs


class Normed(Net):
    """With buffers of its own, which each rank moves by its own data, and what they are when a forward begins."""

    def __init__(self, seed):
        super().__init__(seed)
        self.norm, self.begun_with = torch.nn.BatchNorm1d(WIDTH), []

    def forward(self, batch):
        self.begun_with.append(self.norm.running_mean.clone())
        return super().forward({"x": self.norm(batch["x"])})


def batch_norm(folder, strategy):
    module = Toy(Normed(RANK))
    return train(folder, module=module, strategy=strategy) | {"begun_with": module.net.begun_with}


class Intruder(pl.Callback):
    """Before a step, changes a mask on one rank alone: a row becomes another one's."""

    def __init__(self, step, buffer):
        self.step, self.buffer = step, buffer

    def on_train_batch_start(self, trainer, pl_module, *args):
        if RANK == 1 and trainer.global_step == self.step:
            rows = getattr(pl_module.net.blocks[1], self.buffer)
            rows[0].copy_(next(row for row in rows[1:] if not torch.equal(row, rows[0])))


class Compressed(DDPStrategy):
    """Lightning registers communication hooks on GPUs alone; this one runs anywhere."""

    def _register_ddp_hooks(self):
        self.model.register_comm_hook(self._ddp_comm_state, self._ddp_comm_hook)


def power_sgd():
    return PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=3, min_compression_rate=0.5)


def count_operands(folder):
    """Forward operands made in 6 steps of 4 micro-batches, in a precision where they are copies."""
    made, reference = [], ops.get_backend("reference")
    ops.register_backend(replace(reference, refresh=lambda *args: made.append(1) or reference.refresh(*args)))
    result = train(folder, config=SLoPeConfig(), precision="bf16-mixed", accumulate_grad_batches=4, max_steps=6)
    ops.register_backend(reference)
    return result | {"made": len(made)}


# Plain DDP and the same under options: every one must give the plain result.
OPTIONS = {
    "slope_ddp": lambda f: long(f, strategy="slope_ddp"),
    "static_graph": lambda f: long(f, strategy=DDPStrategy(static_graph=True)),
    "bucket_view": lambda f: long(f, strategy=DDPStrategy(gradient_as_bucket_view=True)),
    # Then DDP does not align masks at its start: both ranks have to convert the same weights.
    "masks_not_aligned": lambda f: long(f, module=Toy(Net(0)), strategy=DDPStrategy(broadcast_buffers=False)),
    "find_unused": lambda f: long(f, strategy=DDPStrategy(find_unused_parameters=True)),
    "small_buckets": lambda f: long(f, strategy=DDPStrategy(bucket_cap_mb=0.001)),
    "manual": lambda f: long(f, module=Manual(Net(seed=RANK))),
}
# Runs of another kind: ranks must agree, that is all.
OTHERS = {
    "transposable": lambda f: train(f, config=SLoPeConfig(mask="transposable", adapter_rank=4, adapter_start_step=12)),
    "random": lambda f: train(f, config=SLoPeConfig(mask="random", backward_refresh_steps=1)),
    "accumulate": lambda f: train(f, accumulate_grad_batches=2),
    "bf16_clip": lambda f: train(f, precision="bf16-mixed", gradient_clip_val=0.1),
    "hf_bert": lambda f: train(f, module=Toy(hf_bert())),
    "hf_gpt2": lambda f: train(f, module=Toy(hf_gpt2()), strategy="slope_ddp"),
    "power_sgd": lambda f: train(f, strategy=Compressed(ddp_comm_state=power_sgd(), ddp_comm_hook=powerSGD_hook)),
    "ema": lambda f: train(f, EMAWeightAveraging(decay=0.9)),
}
# Masks that differ: re-setups are at 5, 10 and 15, the wake is at 12.
REFUSED = {
    "differ at the start": lambda f: train(f, strategy=DDPStrategy(broadcast_buffers=False)),
    "differ at a re-setup": lambda f: train(f, Intruder(8, "indices")),
    "columns differ at a re-setup": lambda f: train(f, Intruder(5, "backward_indices"), strategy="slope_ddp"),
    "differ at the wake": lambda f: train(f, Intruder(10, "backward_indices")),
}
SCENARIOS = {
    "plain": long,
    **OPTIONS,
    **OTHERS,
    "float64": lambda f: train(f, precision="64-true"),
    "float64_accumulate": lambda f: train(f, precision="64-true", accumulate_grad_batches=2),
    "resume": resume,
    "operands": count_operands,
    "batch_norm, ddp": lambda f: batch_norm(f, "ddp"),
    "batch_norm, slope_ddp": lambda f: batch_norm(f, "slope_ddp"),
    **REFUSED,
}


def main(folder: Path) -> None:
    """Run all scenarios in turn; an error is a result too, and both ranks meet the same one."""
    results = {}
    for name, scenario in SCENARIOS.items():
        try:
            results[name] = scenario(folder / name)
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
