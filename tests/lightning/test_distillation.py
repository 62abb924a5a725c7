"""A teacher beside a module in a Trainer: trained, saved and averaged without it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from slope_pl import Distillation, SLoPeConfig, SLoPeLightningModule, sparse_layers
from slope_pl.lightning import frozen_copy
from tests.lightning.toy import CLASSES, QUIET, WIDTH, Net, Toy, assert_same, fixed_batch, make_trainer

pytestmark = QUIET

CONFIG = SLoPeConfig(adapter_rank=4, adapter_start_step=8)


class Student(SLoPeLightningModule, Toy):
    """Builds its net in configure_model, copies it, then becomes sparse."""

    def __init__(self, weight=0.5, temperature=2.0):
        super().__init__(slope=CONFIG)
        self.net, self.weight, self.temperature = None, weight, temperature
        self.distillation = None

    def configure_model(self):
        if self.net is None:
            self.net = Net()
            teacher = frozen_copy(self.net)
            self.distillation = Distillation(teacher, "classification", self.temperature, self.weight)
        super().configure_model()

    def loss(self, batch):
        logits = self(batch)
        return self.distillation(F.cross_entropy(logits, batch["label"]), logits, (batch,))


def test_the_teacher_is_in_no_checkpoint_no_optimizer_and_does_not_move(tmp_path):
    module = Student()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=10)
    trainer = make_trainer(tmp_path, saver, enable_checkpointing=True, max_steps=10, limit_val_batches=1)
    trainer.fit(module)
    teacher = module.distillation.teacher
    assert_same(teacher.state_dict(), Net().state_dict())
    assert not any(part.training for part in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held.isdisjoint(id(p) for p in teacher.parameters())
    saved = torch.load(tmp_path / "step=10.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == set(module.state_dict())
    assert not any("teacher" in name or "distillation" in name for name in saved)
    assert len(sparse_layers(module)) == 3
    again = Student()
    make_trainer(tmp_path, max_steps=12).fit(again, ckpt_path=tmp_path / "step=10.ckpt")
    assert len(again.losses) == 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precisions(tmp_path, precision):
    module = Student()
    make_trainer(tmp_path, precision=precision, max_steps=9).fit(module)
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.distillation.teacher.parameters()} == {expected}


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_averages_share_the_teacher(tmp_path):
    module = Student()

    class Look(EMAWeightAveraging):
        def on_train_start(self, trainer, pl_module):
            self.shared = self._average_model.module.distillation is pl_module.distillation

    average = Look(decay=0.9)
    make_trainer(tmp_path, average, max_steps=9).fit(module)
    assert average.shared


def test_the_student_comes_closer_to_its_teacher(tmp_path):
    """With the teacher's weight at 1, labels have no say."""

    class Wrong(Student):
        def loss(self, batch):
            return super().loss(batch | {"label": (batch["label"] + 1) % CLASSES})

    module = Wrong(weight=1.0, temperature=1.0)
    module.configure_model()
    batch = fixed_batch()
    assert batch["x"].shape[1] == WIDTH
    before = copy.deepcopy(module)

    def distance(student):
        with torch.no_grad():
            return module.distillation.distance(student(batch), module.distillation.outputs((batch,))).item()

    make_trainer(tmp_path, max_steps=60).fit(module)
    assert distance(module) < 0.2 * distance(before)
