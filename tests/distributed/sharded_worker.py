"""One of several gloo processes: FSDP2 and ZeRO; like ``tests.distributed.worker``, which has the plain strategies."""

import argparse
import os
import sys
import time
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
    SLoPeConfig,
    SLoPeDDPStrategy,
    SLoPeDeepSpeedStrategy,
    SLoPeLightningModule,
    SLoPeModelParallelStrategy,
    sparse_layers,
    sparsify,
)
from slope_pl.nn import gathered
from slope_pl.optim import Lamb
from tests.lightning.toy import CONFIG, Net, Toy, make_trainer

RESUME_AT = (5, 11, 12, 13)
PROCESSES = int(os.environ.get("WORLD_SIZE", "2"))  # Lightning removes it after a fit


class Sparse(SLoPeLightningModule, Toy):
    """Adapters in a group of their own, as ZeRO needs it."""

    def __init__(self, net=None, config=CONFIG):
        super().__init__(Net() if net is None else net, slope=config)

    def configure_optimizers(self):
        return grouped(self)


class Late(Sparse):
    """Builds its net in configure_model, within ``deepspeed.zero.Init``, which spreads each layer at once."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        import deepspeed

        if self.net is None:
            with deepspeed.zero.Init(config_dict_or_path=self.trainer.strategy.config):
                self.net = Net()
        super().configure_model()


class Meta(Sparse):
    """Builds its net in configure_model without memory; Lightning draws it layer by layer once it is sharded."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            with torch.device("meta"):
                self.net = Net()
        super().configure_model()

    def on_train_start(self):
        self.begun = whole_state(self)


def meta(folder):
    module = Meta()
    return {**train(folder, SLoPeModelParallelStrategy(), module), "begun": module.begun}


class Double(Sparse):
    """In float64, whatever the strategy says about precision; rounding then is all that an order of sums can change."""

    def __init__(self, batch_size=8):
        super().__init__(Net().double())
        self.batch_size = batch_size

    def training_step(self, batch, batch_idx):
        return super().training_step({**batch, "x": batch["x"].double()}, batch_idx)


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
        devices=PROCESSES,
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


class OverEpochs(Sparse):
    """Asks how many steps there are, for which Lightning makes the loader before a checkpoint gives it its place."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 20
        return super().configure_optimizers()


def resumes(folder, make_strategy):
    """20 steps in 5 epochs of 4 batches."""
    epochs = {"max_steps": -1, "max_epochs": 5}
    runs = {"whole": train(folder, make_strategy(), OverEpochs(), save=True, **epochs)}
    for step in RESUME_AT:
        file = folder / f"step={step}.ckpt"
        runs[step] = train(folder, make_strategy(), OverEpochs(Net(seed=7)), ckpt_path=file, **epochs)
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


def lamb(folder):
    module = Sparse()
    module.configure_optimizers = lambda: Lamb(grouped(module).param_groups[0]["params"])
    return refused(lambda: train(folder, CPUZero(stage=1), module))


def other_masks(folder):
    rank = int(os.environ["LOCAL_RANK"])
    return refused(lambda: train(folder, SLoPeModelParallelStrategy(), Sparse(Net(seed=rank))))


# What two processes, or four, compute is what one computes with as many times the batch.
WIDE = {
    "wide_ddp": lambda f: train(f, SLoPeDDPStrategy(), Double()),
    "wide_fsdp2": lambda f: train(f, SLoPeModelParallelStrategy(), Double()),
    **{f"wide_zero{stage}": lambda f, stage=stage: train(f, CPUZero(stage=stage)) for stage in (1, 2, 3)},
}
LONG = SLoPeConfig(backward_refresh_steps=75, adapter_rank=4, adapter_start_step=200)


def long(folder, strategy, **settings):
    """300 steps: re-setups at 75, 150 and 225, the wake at 200."""
    return train(folder, strategy, Sparse(config=LONG), max_steps=300, **settings)


def damaged(folder, make_strategy, change):
    """What is said about a run's last checkpoint, a file or a folder, once ``change`` has been at it."""
    early = SLoPeConfig(adapter_rank=4, adapter_start_step=1)
    train(folder, make_strategy(), Sparse(config=early), save=True, max_steps=2)
    path, rank = folder / "step=2.ckpt", int(os.environ["LOCAL_RANK"])
    if rank == 0:
        change(path)
        (folder / "done").touch()
    while not (folder / "done").exists():
        time.sleep(0.01)
    return refused(lambda: train(folder, make_strategy(), Sparse(config=early), ckpt_path=path, max_steps=3))


def cut(path):
    file = path if path.is_file() else path / "meta.pt"
    file.write_bytes(file.read_bytes()[:-300])


def narrowed(path):
    content = torch.load(path, weights_only=True)
    name = "net.blocks.1.values"
    content["state_dict"][name] = content["state_dict"][name][:, ::2].clone()
    torch.save(content, path)


def one_file():
    return SLoPeModelParallelStrategy(save_distributed_checkpoint=False)


# What is read by both ranks, of which one looks at it.
DAMAGED = {
    "damaged_ddp": lambda f: damaged(f, SLoPeDDPStrategy, cut),
    "damaged_fsdp2": lambda f: damaged(f, SLoPeModelParallelStrategy, cut),
    "damaged_fsdp2_full": lambda f: damaged(f, one_file, cut),
    "narrowed_ddp": lambda f: damaged(f, SLoPeDDPStrategy, narrowed),
    "narrowed_fsdp2_full": lambda f: damaged(f, one_file, narrowed),
}
SCENARIOS = {
    **WIDE,
    **DAMAGED,
    "steps_300_ddp": lambda f: long(f, SLoPeDDPStrategy()),
    "steps_300_fsdp2": lambda f: long(f, SLoPeModelParallelStrategy()),
    "ddp": lambda f: train(f, SLoPeDDPStrategy()),
    "fsdp2": lambda f: resumes(f, SLoPeModelParallelStrategy),
    "fsdp2_full": lambda f: resumes(f, one_file),
    "fsdp2_own": lambda f: train(
        f, st.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), OwnSharding(), SLoPeCallback(CONFIG)
    ),
    "fsdp2_meta": meta,
    "fsdp2_accumulate": lambda f: train(f, SLoPeModelParallelStrategy(), accumulate_grad_batches=2, max_steps=14),
    "ddp_accumulate": lambda f: train(f, SLoPeDDPStrategy(), accumulate_grad_batches=2, max_steps=14),
    **{f"zero{stage}": lambda f, stage=stage: resumes(f, lambda: CPUZero(stage=stage)) for stage in (1, 2, 3)},
    "zero3_late": lambda f: train(f, CPUZero(stage=3), Late()),
    "zero_plain": lambda f: train(f, PlainCPUZero(stage=2), Sparse(), SLoPeCallback(CONFIG)),
    "mixed_groups": mixed_groups,
    "forgotten": forgotten,
    "lamb": lamb,
    "other_masks": other_masks,
}


def main(folder, names):
    warnings.simplefilter("ignore")
    rank, reports = int(os.environ["LOCAL_RANK"]), {}
    for name in names or SCENARIOS:
        scenario = SCENARIOS[name]
        (folder / name).mkdir(exist_ok=True)
        try:
            reports[name] = scenario(folder / name)
        except Exception:
            reports[name] = traceback.format_exc()
    torch.save(reports, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
