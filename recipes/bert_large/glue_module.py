"""BERT for the tasks of GLUE as a LightningModule, dense or 2:4 sparse."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.bert_large.finetuning import Batch, BertFineTuning
from recipes.bert_large.glue_labels import name_labels, refuse_other_task
from recipes.bert_large.starts import TeacherConfig
from slope_pl import SLoPeConfig
from slope_pl.data import GlueDataModule, GlueScores
from slope_pl.data.glue_metrics import combine
from slope_pl.data.glue_tasks import task_info
from slope_pl.models import BertConfig


class BertGlue(BertFineTuning):
    """BERT that classifies a sentence or a pair (Devlin et al. 2018, section 4.1), or gives STS-B's score.

    Args:
        task: the data module's task; on the command line it is taken from --data.task.
        weights: what to start from: a folder with config.json and model.safetensors, or a hub id. A BERT
            (google-bert/bert-large-uncased, MiniLM) is this package's own; RoBERTa, DistilBERT and the like need transformers.
            A .ckpt of recipes.bert_large.pretrain keeps its masks; a .ckpt of a dense run of this recipe, on the same task,
            brings its head too, and its masks if it was made with fade. Null starts from random weights. A hub id that cannot
            be reached is a loud warning and random weights; see require_weights.
        require_weights: stop instead when the hub cannot be reached.
        bert: the architecture; null takes that of the weights, and without weights BERT-Large (24 layers of 1024).
        encoder: the architecture of an encoder of transformers, as in its config.json: what checkpoints hold. Without weights.
        slope: how the model is made sparse; null trains it dense.
        fade: first stage of a gradual start: train a dense model, and let the weights that slope prunes fade to zero in this
            share of the steps. The second stage takes this one's checkpoint as weights.
        teacher: a dense model whose outputs are learnt beside the labels.
        learning_rate: peak of the schedule.
        weight_decay: of the weights; biases and norms have none.
        adapter_weight_decay: of the low-rank adapters (the published runs use 1e-4).
        warmup: share of all steps in which the rate rises from 0 to its peak; it then falls linearly to 0.
    """

    def __init__(
        self,
        task: str = "cola",
        weights: str | None = None,
        require_weights: bool = False,
        bert: BertConfig | dict[str, Any] | None = None,
        encoder: dict[str, Any] | None = None,
        slope: SLoPeConfig | None = None,
        fade: float | None = None,
        teacher: TeacherConfig | None = None,
        learning_rate: float = 2.4e-5,
        weight_decay: float = 0.01,
        adapter_weight_decay: float = 1e-4,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(slope, fade)
        self.info = task_info(task)
        self.task, self.num_labels = task, self.info.num_labels
        self.head = "regression" if self.info.regression else "classification"
        self.take(
            weights=weights,
            require_weights=require_weights,
            bert=bert,
            encoder=encoder,
            teacher=teacher,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            adapter_weight_decay=adapter_weight_decay,
            warmup=warmup,
        )
        self._scores: dict[str, list[GlueScores]] = {}  # in lists, so that they are no submodules
        self.save_hyperparameters()

    # ------------------------------------------------------------------------------------------------ model

    def check_source(self, source: str) -> None:
        """Refuse a model that was fine-tuned on another task of GLUE.

        Raises:
            PretrainedMismatchError: it was.
        """
        refuse_other_task(source, self.info)

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``(B, num_labels)`` of a batch of the data module."""
        return self._model()(*self.inputs(batch)).logits

    def setup(self, stage: str) -> None:
        """Fail before the first step, not inside an embedding, if data and model do not fit."""
        super().setup(stage)
        data = self._data()
        if data.task != self.task:
            raise ValueError(f"the data is {data.task}'s, the model {self.task}'s: give both the same task")

    def _data(self) -> GlueDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------------ steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy, for STS-B the mean squared error of the score; with a teacher, its part added."""
        out, labels = None if self.distillation is None else self.outputs(batch), batch["labels"]
        logits = (self(batch) if out is None else out.logits).float()
        loss = F.mse_loss(logits.squeeze(1), labels) if self.info.regression else F.cross_entropy(logits, labels)
        loss = self.taught(loss, out, batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start fresh scores over the evaluation sets."""
        self._scores = {
            split: [GlueScores(self.info.name, torch.from_numpy(rows.labels)).to(self.device)]
            for split, rows in self._data().dev_rows.items()
        }

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect logits; metrics need all rows."""
        split = list(self._scores)[dataloader_idx]
        self._scores[split][0].update(batch["row_index"], self(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the task's metrics (0 to 100), ``val/score``, which GLUE averages, and the number of rows scored."""
        found = {split: scores[0].compute() for split, scores in self._scores.items()}
        rows = torch.stack([values.pop("rows") for values in found.values()]).sum()
        scores = {f"val/{name}": value.float() for name, value in combine(self.info, found).items()}
        self.log_dict({**scores, "val/rows": rows.float()}, prog_bar=True, sync_dist=False)
        self._scores = {}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Logits and row numbers."""
        return {"row_index": batch["row_index"], "logits": self(batch).float()}

    # ------------------------------------------------------------------------------------------------ saving

    def export(self, folder: str) -> None:
        """As in the base class, with the task and its class names."""
        super().export(folder)
        name_labels(folder, self.info)
