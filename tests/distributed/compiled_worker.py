"""One process alone, on a CPU or a GPU: GPT-2 under every strategy, compiled, beside the same run on one device, eager."""

import sys
import traceback
import warnings
from operator import itemgetter
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch import strategies as st
from torch.utils.data import DataLoader

from recipes.gpt2.module import GPT2Pretraining
from slope_pl import SLoPeConfig, SLoPeDDPStrategy, SLoPeDeepSpeedStrategy, SLoPeModelParallelStrategy
from slope_pl.models import GPT2Config
from tests.distributed.sharded_worker import CPUZero, PlainCPUZero, whole_state
from tests.lightning.toy import make_trainer

STEPS, WORDS, LENGTH = 6, 256, 32
GPT = GPT2Config(WORDS, LENGTH, 64, 2, 2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SLOPE = SLoPeConfig(adapter_rank=4, adapter_start_step=4, backward_refresh_steps=2)
# In float32 those whose weights are gathered: it tells a lost gradient from rounding, and each compilation takes its time.
CASES = [
    *((name, "32-true") for name in ("FSDP2", "ZeRO-3", "dense ZeRO-3")),
    *((name, "bf16-mixed") for name in ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")),
]


def strategy_of(name, device):
    if name == "DDP":
        return SLoPeDDPStrategy()
    if name == "FSDP2":
        return SLoPeModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    ours, plain = (CPUZero, PlainCPUZero) if device == "cpu" else (SLoPeDeepSpeedStrategy, st.DeepSpeedStrategy)
    return (plain if name.startswith("dense") else ours)(stage=int(name[-1]))


class Model(GPT2Pretraining):
    """Keeps its losses; in the compiled runs, compiled on the CPU as well."""

    def __init__(self, dense, compiled):
        # A bias of keys has gradients of rounding alone, which a small epsilon would turn into steps.
        super().__init__(
            3e-3, gpt2=GPT, slope=None if dense else SLOPE, warmup=0.3, epsilon=1e-4, compile=compiled, sample_tokens=0
        )
        self.losses = []

    def _compiles(self):
        return self.wants_compile

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def on_train_end(self):
        super().on_train_end()
        self.end = {name: tensor.float().cpu() for name, tensor in whole_state(self).items()}


class Data(pl.LightningDataModule):
    """Random tokens, each followed by one that depends on it."""

    vocab_size, context = WORDS, LENGTH

    def train_dataloader(self):
        draw = torch.Generator().manual_seed(1)
        tokens = [torch.randint(WORDS, (16, LENGTH), generator=draw) for _ in range(STEPS)]
        batches = [{"input_ids": t, "targets": (3 * t + 1) % WORDS} for t in tokens]
        return DataLoader(batches, batch_size=1, collate_fn=itemgetter(0))


def run(folder, device, strategy, dense, compiled, precision):
    pl.seed_everything(0)
    torch.compiler.reset()  # after eight nets of one class it would go on eager
    model = Model(dense, compiled)
    settings = {"strategy": strategy, "max_steps": STEPS, "precision": precision, "gradient_clip_val": 1.0}
    make_trainer(folder, accelerator=device, **settings).fit(model, Data())
    return {"losses": model.losses, "end": model.end}


def main(folder, device):
    warnings.simplefilter("ignore")
    reports = {}
    for name, precision in CASES:
        dense = name.startswith("dense")
        if ("one device", dense, precision) not in reports:
            reports["one device", dense, precision] = run(folder, device, "auto", dense, False, precision)
        try:
            reports[name, dense, precision] = run(folder, device, strategy_of(name, device), dense, True, precision)
        except Exception:
            reports[name, dense, precision] = traceback.format_exc()
    torch.save(reports, folder / "rank0.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
