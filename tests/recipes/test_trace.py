"""The callback that says where a run's time goes."""

import gzip
import json

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from recipes.trace import Trace, busy


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 8)

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(trace, steps, folder, accumulate=1):
    trainer = pl.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[trace],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Net(), DataLoader(torch.randn(64, 8), batch_size=2))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_some_steps_are_recorded_once_and_written(tmp_path, accumulate):
    fit(Trace(first=4, steps=3), 12, tmp_path, accumulate)
    text = (tmp_path / "trace.txt").read_text()
    assert "ms a step" in text.splitlines()[0]
    (products,) = (line for line in text.splitlines() if line.endswith("  aten::addmm"))
    assert products.split()[1] == f"{accumulate}.0x"
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sum(name == "aten::addmm" for name in names) == 3 * accumulate


def test_a_folder_and_the_number_of_rows_are_given(tmp_path):
    fit(Trace(first=1, steps=1, folder=str(tmp_path / "mine"), rows=2), 3, tmp_path)
    assert not (tmp_path / "trace.txt").exists()
    lines = (tmp_path / "mine" / "trace.txt").read_text().splitlines()
    assert len(lines[lines.index("host, itself: ms a step, times a step") + 1 :]) == 2


def test_a_run_too_short_to_be_recorded_is_an_error_at_its_start(tmp_path):
    with pytest.raises(ValueError, match=r"23 steps or more are expected, the run has 10"):
        fit(Trace(), 10, tmp_path)
    with pytest.raises(ValueError, match=r"Trace\(first=0, steps=3\): 1 or more of each"):
        Trace(first=0)


def test_time_in_which_two_things_run_counts_once():
    assert busy([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert busy([]) == 0
