"""Runs that cannot be right: schedules, optimizers, callbacks, strategies, numbers of devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from slope_pl import (
    SLoPeCallback,
    SLoPeConfig,
    SLoPeDeepSpeedStrategy,
    SLoPeLightningModule,
    SLoPeModelParallelStrategy,
    SLoPeSingleDeviceStrategy,
    densify,
    sparsify,
)
from slope_pl.baselines import FSTCallback, SRSTECallback, SRSTEConfig
from slope_pl.data.loading import EpochSampler, ResumableDataLoader
from slope_pl.lightning import FadeCallback
from slope_pl.lightning.checks import check_strategy
from slope_pl.lightning.schedule import adapter_start_step
from tests.faults.bad_inputs.case import Case
from tests.lightning.toy import CONFIG, Net, Toy, make_trainer

ADAPTERS = SLoPeConfig(adapter_rank=4)


class Sparse(SLoPeLightningModule, Toy):
    """Sparse by construction."""


def fit(
    name: str, *says: str, module: Callable[[], pl.LightningModule] = Toy, callbacks: Any = None, **settings: Any
) -> Case:
    """A run of a module with callbacks, ``SLoPeCallback`` alone by default."""

    def call(folder: Path) -> None:
        made = [SLoPeCallback(ADAPTERS)] if callbacks is None else callbacks()
        chosen = {key: value() if key == "strategy" and callable(value) else value for key, value in settings.items()}
        make_trainer(folder, *made, **({"max_steps": 4} | chosen)).fit(module())

    return Case(name, call, says)


def optimizing(choose: Callable[[pl.LightningModule], Any]) -> Callable[[], pl.LightningModule]:
    """A module with its own ``configure_optimizers``."""

    def build() -> pl.LightningModule:
        module = Toy()
        module.configure_optimizers = lambda: choose(module)
        return module

    return build


def of_the_dense_model() -> pl.LightningModule:
    module = Toy()
    optimizer = torch.optim.AdamW(module.parameters())
    module.configure_optimizers = lambda: optimizer
    return module


def densified() -> pl.LightningModule:
    module = Toy()
    sparsify(module, SLoPeConfig())
    densify(module)
    return module


def frozen_net(seed: int = 0) -> nn.Module:
    return Net(seed)


class TwoByHand(Toy):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.head.parameters(), 0.1), torch.optim.SGD(self.net.blocks.parameters(), 0.1)]


class Endless(Toy):
    """A data set without a length."""

    def train_dataloader(self) -> Any:
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield from ()

        return torch.utils.data.DataLoader(Stream())


class BatchOfParts(Toy):
    """Its forward takes two arguments; calibration gives it a batch."""

    def forward(self, x, label):
        return self.net({"x": x, "label": label})


class SetUpLate(Toy):
    """Builds in setup()."""

    def setup(self, stage):
        self.ready = True


SCHEDULE = [
    fit(
        "a wake past the end",
        "adapter_start_step=9",
        "ends after 4 steps",
        "earlier step",
        callbacks=lambda: [SLoPeCallback(SLoPeConfig(adapter_rank=4, adapter_start_step=9))],
    ),
    fit(
        "a wake at the end",
        "adapter_start_step=4",
        "ends after 4 steps",
        callbacks=lambda: [SLoPeCallback(SLoPeConfig(adapter_rank=4, adapter_start_step=4))],
    ),
    fit("endless data", "number of steps is unknown", "adapter_start_step", module=Endless, max_steps=-1, max_epochs=1),
    fit(
        "max_time alone", "number of steps is unknown", "max_steps", max_steps=-1, max_time="00:00:01:00", max_epochs=-1
    ),
    fit(
        "two optimizers by hand",
        "2 optimizers with manual",
        "adapter_start_step",
        module=TwoByHand,
        max_steps=-1,
        max_epochs=1,
    ),
    Case("a schedule of nothing", lambda folder: adapter_start_step(ADAPTERS, 0), ("unknown", "max_steps")),
    Case("a schedule of -1 steps", lambda folder: adapter_start_step(ADAPTERS, -1), ("unknown", "adapter_start_step")),
    fit("a fade longer than the run", "takes 9 steps", "after 4", callbacks=lambda: [FadeCallback(9)]),
    fit(
        "a fade that begins too late",
        "begins at step 3",
        "Choose fewer",
        callbacks=lambda: [FadeCallback(2, start_step=3)],
    ),
    fit("a fade beside sparse training", "dense stage", callbacks=lambda: [SLoPeCallback(), FadeCallback(2)]),
    fit(
        "a fade of a sparse module",
        "dense stage",
        module=lambda: Sparse(slope=CONFIG),
        callbacks=lambda: [FadeCallback(2)],
        max_steps=20,
    ),
    fit(
        "SR-STE that wakes too late",
        "adapter_start_step=9",
        "after 4",
        callbacks=lambda: [SRSTECallback(SRSTEConfig(adapter_rank=4, adapter_start_step=9))],
    ),
]
OPTIMIZERS = [
    fit(
        "only what is trainable",
        "adapter_down is in no optimizer",
        "do not filter by requires_grad",
        module=optimizing(lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1)),
    ),
    fit(
        "only the head",
        "values is in no optimizer",
        module=optimizing(lambda m: torch.optim.SGD(m.net.head.parameters(), 0.1)),
    ),
    fit("made before the conversion", "values is in no optimizer", "configure_optimizers", module=of_the_dense_model),
    fit(
        "SR-STE, only the head",
        "weight is in no optimizer",
        callbacks=lambda: [SRSTECallback()],
        module=optimizing(lambda m: torch.optim.SGD(m.net.head.parameters(), 0.1)),
    ),
]
CALLBACKS = [
    fit("two of ours", "SLoPeCallback", "one", callbacks=lambda: [SLoPeCallback(ADAPTERS), SLoPeCallback(ADAPTERS)]),
    fit(
        "two of ours that differ", "SLoPeCallback", "one", callbacks=lambda: [SLoPeCallback(ADAPTERS), SLoPeCallback()]
    ),
    fit("two methods", "SLoPe's sparse layers", "one method", callbacks=lambda: [SLoPeCallback(), SRSTECallback()]),
    fit(
        "two methods, the other order",
        "masked by SRSTEConfig",
        "one method",
        callbacks=lambda: [SRSTECallback(), SLoPeCallback()],
    ),
    fit(
        "two baselines",
        "masked already",
        "one configuration",
        callbacks=lambda: [SRSTECallback(), FSTCallback({"targets": ["*"]})],
    ),
    fit(
        "an average that stands before",
        "put SLoPeCallback before",
        callbacks=lambda: [EMAWeightAveraging(), SLoPeCallback()],
    ),
    fit(
        "SWA before a setup of its own",
        "StochasticWeightAveraging",
        "use WeightAveraging",
        module=SetUpLate,
        callbacks=lambda: [SLoPeCallback(), StochasticWeightAveraging(0.1)],
    ),
    fit(
        "SR-STE with an average",
        "EMAWeightAveraging",
        "leave it out",
        callbacks=lambda: [SRSTECallback(), EMAWeightAveraging()],
    ),
    fit("a densified model", "made dense by densify()", "sparsify(model, config)", module=densified),
    fit(
        "a module with another config",
        "sparse already",
        "adapter_start_step=12 instead of None",
        module=lambda: Sparse(slope=CONFIG),
    ),
    fit("no layer to convert", "has no linear layer", module=lambda: Toy(nn.ReLU())),
    fit(
        "calibration of another forward",
        "forward(batch)",
        "calibration_step",
        module=BatchOfParts,
        callbacks=lambda: [SLoPeCallback(SLoPeConfig(mask_calibration_batches=2))],
    ),
]


def strategy(name: str, make: Callable[[], Any], *says: str) -> Case:
    return Case(name, lambda folder: check_strategy(make()), says)


def trainer(name: str, *says: str, **settings: Any) -> Case:
    return Case(name, lambda folder: make_trainer(folder, **settings), says)


def other_ranks(settings: dict[str, int]) -> Case:
    """A loader's position, saved in the middle of an epoch, read by another world."""

    def call(folder: Path) -> None:
        data = torch.utils.data.TensorDataset(torch.zeros(24))

        def loader(ranks: int, seed: int, batch: int) -> ResumableDataLoader:
            sampler = EpochSampler(data, num_replicas=ranks, rank=0, seed=seed)
            return ResumableDataLoader(data, batch_size=batch, sampler=sampler)

        first = loader(2, 0, 4)
        next(iter(first))
        again = loader(**({"ranks": 2, "seed": 0, "batch": 4} | settings))
        again.load_state_dict(first.state_dict())
        next(iter(again))

    ((key, value),) = settings.items()
    shown = {"ranks": "ranks was 2 and is", "seed": "seed was 0 and is", "batch": "batch_size was 4 and is"}[key]
    return Case(
        f"a loader with {value} as {key}", call, ("middle of epoch 0", f"{shown} {value}", "Resume with the old")
    )


def whole_fsdp2() -> ModelParallelStrategy:
    """Lightning's own, which adds no callback."""
    return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)


STRATEGIES = [
    strategy("FSDP1", lambda: FSDPStrategy.__new__(FSDPStrategy), "FSDPStrategy is not supported", "slope_fsdp2"),
    strategy("no strategy", lambda: None, "NoneType is not supported", "slope_ddp"),
    strategy("a name", lambda: "ddp", "str is not supported", "slope_ddp"),
    strategy(
        "tensor parallel", lambda: SLoPeModelParallelStrategy(tensor_parallel_size=2), "tensor_parallel_size=2", "set 1"
    ),
    strategy("tensor parallel, Lightning's", lambda: ModelParallelStrategy(tensor_parallel_size=4), "=4", "set 1"),
    trainer("slope on two devices", "devices=2", "slope_ddp", strategy="slope", devices=2),
    trainer("a name with a typo", "slope_dpp", strategy="slope_dpp"),
    trainer("a stage that is not there", "slope_deepspeed_stage_4", strategy="slope_deepspeed_stage_4"),
    trainer("no devices", "0", "devices", strategy="slope_ddp", devices=0),
    trainer("minus two devices", "`devices`", "an int > 0", strategy="slope_ddp", devices=-2),
    trainer("no nodes", "num_nodes", strategy="slope_ddp", num_nodes=0),
    Case("ZeRO stage 7", lambda folder: check_strategy(SLoPeDeepSpeedStrategy(stage=7)), ("stage=7", "1, 2 or 3")),
    Case("ZeRO stage 0", lambda folder: check_strategy(SLoPeDeepSpeedStrategy(stage=0)), ("stage=0", "1, 2 or 3")),
    Case("ZeRO by text", lambda folder: check_strategy(SLoPeDeepSpeedStrategy(stage="2")), ("stage='2'", "1, 2 or 3")),
    fit("ZeRO on a CPU", "DeepSpeed", "CUDA", strategy="slope_deepspeed_stage_2", callbacks=list),
    fit(
        "more shards than processes",
        "data_parallel_size=3",
        "1",
        strategy=lambda: SLoPeModelParallelStrategy(data_parallel_size=3),
        callbacks=list,
        module=lambda: Sparse(slope=CONFIG),
    ),
    fit(
        "shards of 0",
        "data_parallel_size=0",
        strategy=lambda: SLoPeModelParallelStrategy(data_parallel_size=0),
        callbacks=list,
        module=lambda: Sparse(slope=CONFIG),
    ),
    fit("FSDP2 of a plain module", "configure_model", strategy="slope_fsdp2", callbacks=list),
    fit("two configs", "differ", "set one of them", strategy=lambda: SLoPeSingleDeviceStrategy(config=CONFIG)),
    fit(
        "SR-STE under FSDP2",
        "not supported by SRSTECallback",
        "'ddp'",
        strategy=whole_fsdp2,
        callbacks=lambda: [SRSTECallback()],
        module=lambda: Sparse(slope=None),
    ),
    fit(
        "a fade under FSDP2",
        "FadeCallback under",
        "single device",
        strategy=whole_fsdp2,
        callbacks=lambda: [FadeCallback(2)],
        module=lambda: Sparse(slope=None),
    ),
    other_ranks({"ranks": 1}),
    other_ranks({"ranks": 4}),
    other_ranks({"seed": 3}),
    other_ranks({"batch": 2}),
]
CASES = [*SCHEDULE, *OPTIMIZERS, *CALLBACKS, *STRATEGIES]
