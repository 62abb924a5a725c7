"""One of two gloo processes: FSDP2 and ZeRO on the CPU; like ``tests.distributed.worker``, which has the plain strategies."""

import argparse
import os
import sys
import traceback
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.fsdp import fully_shard

from slope_pl import (
    SLoPeCallback,
    SLoPeDDPStrategy,
    SLoPeDeepSpeedStrategy,
    SLoPeLightningModule,
    SLoPeModelParallelStrategy,
    sparse_layers,
    sparsify,
)
from slope_pl.nn import gathered
from tests.lightning.toy import CONFIG, Net, Toy, make_trainer

RESUME_AT = (5, 11, 12, 13)


class Sparse(SLoPeLightningModule, Toy):
    """Adapters in a group of their own, as ZeRO needs it."""

    def __init__(self, net=None):
        super().__init__(Net() if net is None else net, slope=CONFIG)

    def configure_optimizers(self):
        return grouped(self)


class Late(Sparse):
    """Builds its net in configure_model: under ZeRO-3 within ``deepspeed.zero.Init``, which spreads each layer at once."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Net()
        super().configure_model()


class OwnSharding(Toy):
    """A module that knows nothing of this package but converts and shards itself."""

    def configure_model(self):
        if not sparse_layers(self):
            sparsify(self, CONFIG)
            for block in self.net.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return grouped(self)


def grouped(module):
    adapters = [p for name, p in module.named_parameters() if "adapter_" in name]
    others = [p for name, p in module.named_parameters() if "adapter_" not in name]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": adapters, "weight_decay": 0.05}]
    return torch.optim.AdamW(groups, lr=module.lr)


class OnCPU:
    """DeepSpeedStrategy insists on CUDA devices; the engine itself runs on gloo."""

    def setup_environment(self):
        st.DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        return deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            model=model,
            optimizer=optimizer,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            lr_scheduler=lr_scheduler,
            config=self.config,
            dist_init_required=False,
        )[:2]

    def _initialize_deepspeed_inference(self, model):
        import deepspeed

        def initialize(args, **settings):
            return original(args=argparse.Namespace(device_rank=self.local_rank), **settings)

        original, deepspeed.initialize = deepspeed.initialize, initialize
        try:
            super()._initialize_deepspeed_inference(model)
        finally:
            deepspeed.initialize = original


class CPUZero(OnCPU, SLoPeDeepSpeedStrategy):
    pass


class PlainCPUZero(OnCPU, st.DeepSpeedStrategy):
    pass


def whole_state(module):
    """The state of all ranks' parts, on every rank."""
    names, tensors = zip(*module.state_dict(keep_vars=True).items(), strict=True)
    with gathered(tensors) as whole:
        return {name: tensor.clone() for name, tensor in zip(names, whole, strict=True)}


class Downs(pl.Callback):
    """The first layer's adapter before some steps: the first, the last that it sleeps through, and a later one."""

    def __init__(self):
        self.at = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in (0, 11, 13):
            layer = next(iter(sparse_layers(pl_module).values()))
            with gathered([layer.adapter_down]) as (down,):
                self.at[trainer.global_step] = down.clone()


def train(folder, strategy, module=None, *callbacks, ckpt_path=None, save=False, **settings):
    module = Sparse() if module is None else module
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = make_trainer(
        folder,
        *callbacks,
        downs := Downs(),
        *([saver] if save else []),
        devices=2,
        strategy=strategy,
        enable_checkpointing=save,
        **settings,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    slope = next(c for c in trainer.callbacks if isinstance(c, SLoPeCallback))
    report = {"losses": module.losses, "model": whole_state(module), "callback": slope.state_dict()}
    report["downs"] = downs.at
    report["own"] = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in module.parameters())
    report["kept"] = [len(layer._operands._pairs) for layer in sparse_layers(module).values()]
    return report


def resumes(folder, make_strategy):
    runs = {"whole": train(folder, make_strategy(), save=True)}
    for step in RESUME_AT:
        runs[step] = train(folder, make_strategy(), Sparse(Net(seed=7)), ckpt_path=folder / f"step={step}.ckpt")
    return runs


def refused(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def mixed_groups(folder):
    module = Sparse()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-2)
    return refused(lambda: train(folder, CPUZero(stage=2), module))


def forgotten(folder):
    module = Sparse()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.net.head.parameters(), lr=1e-2)
    return refused(lambda: train(folder, CPUZero(stage=2), module))


def other_masks(folder):
    rank = int(os.environ["LOCAL_RANK"])
    return refused(lambda: train(folder, SLoPeModelParallelStrategy(), Sparse(Net(seed=rank))))


SCENARIOS = {
    "ddp": lambda f: train(f, SLoPeDDPStrategy()),
    "fsdp2": lambda f: resumes(f, SLoPeModelParallelStrategy),
    "fsdp2_full": lambda f: resumes(f, lambda: SLoPeModelParallelStrategy(save_distributed_checkpoint=False)),
    "fsdp2_own": lambda f: train(
        f, st.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), OwnSharding(), SLoPeCallback(CONFIG)
    ),
    "fsdp2_accumulate": lambda f: train(f, SLoPeModelParallelStrategy(), accumulate_grad_batches=2, max_steps=14),
    "ddp_accumulate": lambda f: train(f, SLoPeDDPStrategy(), accumulate_grad_batches=2, max_steps=14),
    **{f"zero{stage}": lambda f, stage=stage: resumes(f, lambda: CPUZero(stage=stage)) for stage in (1, 2, 3)},
    "zero3_late": lambda f: train(f, CPUZero(stage=3), Late()),
    "zero_plain": lambda f: train(f, PlainCPUZero(stage=2), Sparse(), SLoPeCallback(CONFIG)),
    "mixed_groups": mixed_groups,
    "forgotten": forgotten,
    "other_masks": other_masks,
}


def main(folder):
    warnings.simplefilter("ignore")
    rank, reports = int(os.environ["LOCAL_RANK"]), {}
    for name, scenario in SCENARIOS.items():
        (folder / name).mkdir(exist_ok=True)
        try:
            reports[name] = scenario(folder / name)
        except Exception:
            reports[name] = traceback.format_exc()
    torch.save(reports, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
