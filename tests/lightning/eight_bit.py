"""8-bit optimizers on sparse layers, by hand (neither package is a dependency): python -m tests.lightning.eight_bit

For each optimizer that is installed (bitsandbytes, torchao): the loss after 40 steps beside AdamW's, whether sleeping adapters
moved before their wake at step 20, the bytes of the optimizer's state, and the largest difference of the later losses when the
run is resumed at step 30.
"""

import importlib
import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

from slope_pl import SLoPeCallback, SLoPeConfig, sparse_layers

CONFIG = SLoPeConfig(adapter_rank=4, adapter_start_step=20, backward_refresh_steps=10)
WAKE, CUT, STEPS = 20, 30, 40
KNOWN = {
    "torch.optim": ("AdamW",),
    "bitsandbytes.optim": ("AdamW8bit", "PagedAdamW8bit", "Lion8bit"),
    "torchao.optim": ("AdamW8bit", "AdamW4bit", "AdamWFp8"),
}


class Copying(pl.LightningModule):
    """Learns to copy one batch: the same at every step, so that a resumed run needs no place in the data."""

    def __init__(self, optimizer):
        super().__init__()
        self.layers, self.optimizer = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4))), optimizer
        self.losses, self.moved_asleep = [], False

    def training_step(self, batch, batch_idx):
        adapters = [p for layer in sparse_layers(self).values() for p in (layer.adapter_up,)]
        self.moved_asleep |= self.global_step < WAKE and any(p.abs().sum() > 0 for p in adapters)
        loss = (self.layers(batch) - batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        rows = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(rows.repeat(100, 1), batch_size=8)


def train(optimizer, steps, start=None, save=None):
    """A run from a fixed seed, or on from a checkpoint; its module and trainer."""
    torch.manual_seed(0)
    module = Copying(optimizer)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    trainer = pl.Trainer(max_steps=steps, callbacks=[SLoPeCallback(CONFIG)], accelerator="cpu", **quiet)
    trainer.fit(module, ckpt_path=start)
    if save:
        trainer.save_checkpoint(save)
    return module, trainer


def resumed(optimizer, folder):
    """The largest difference of the losses after a resume, or why there is none."""
    file = Path(folder) / "cut.ckpt"
    whole, _ = train(optimizer, STEPS)
    train(optimizer, CUT, save=file)
    try:
        rest, _ = train(optimizer, STEPS, start=file)
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return f"{max(abs(a - b) for a, b in zip(whole.losses[CUT:], rest.losses, strict=True)):g}"


def main():
    """Print a table."""
    print(
        "| optimizer | loss | adapters moved asleep | bytes of state | difference after a resume |\n|---|---|---|---|---|"
    )
    for package, names in KNOWN.items():
        try:
            found = importlib.import_module(package)
        except ImportError:
            print(f"{package} is not installed", file=sys.stderr)
            continue
        for name in names:
            optimizer = getattr(found, name)
            module, trainer = train(optimizer, STEPS)
            states = [x for state in trainer.optimizers[0].state.values() for x in state.values() if torch.is_tensor(x)]
            size = sum(_bytes(x) for x in states)
            with tempfile.TemporaryDirectory() as folder:
                back = resumed(optimizer, folder)
            print(
                f"| {package}.{name} | {module.losses[-1]:.4f} | {module.moved_asleep} | {size:,} | {back} |",
                flush=True,
            )


def _bytes(tensor):
    """Of a subclass, those of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


if __name__ == "__main__":
    main()
