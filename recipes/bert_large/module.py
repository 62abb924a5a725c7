"""BERT for extractive question answering as a LightningModule, dense or 2:4 sparse."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from recipes.bert_large.finetuning import Batch, BertFineTuning
from recipes.bert_large.starts import TeacherConfig
from slope_pl import SLoPeConfig
from slope_pl.data import SquadDataModule, SquadSpans
from slope_pl.models import BertConfig


class BertSquad(BertFineTuning):
    """BERT that finds answers in a context (Devlin et al. 2018, section 4.2).

    Args:
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
        n_best: candidate answers a window.
        max_answer_length: longest answer, tokens.
    """

    def __init__(
        self,
        weights: str | None = None,
        require_weights: bool = False,
        bert: BertConfig | dict[str, Any] | None = None,
        encoder: dict[str, Any] | None = None,
        slope: SLoPeConfig | None = None,
        fade: float | None = None,
        teacher: TeacherConfig | None = None,
        learning_rate: float = 3e-5,
        weight_decay: float = 0.01,
        adapter_weight_decay: float = 1e-4,
        warmup: float = 0.1,
        n_best: int = 20,
        max_answer_length: int = 30,
    ) -> None:
        super().__init__(slope, fade)
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
        self.n_best, self.max_answer_length = n_best, max_answer_length
        self._spans: list[SquadSpans] = []  # a list, so that the metric is no submodule: it holds the data set
        self.save_hyperparameters()

    # ------------------------------------------------------------------------------------------------ model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Start and end logits, both ``(B, T)``, of a batch of the data module."""
        out = self._model()(*self.inputs(batch))
        return out.start_logits, out.end_logits

    def _data(self) -> SquadDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------------ steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean of the cross-entropies of start and end position; with a teacher, its part added."""
        out = None if self.distillation is None else self.outputs(batch)
        start_logits, end_logits = self(batch) if out is None else (out.start_logits, out.end_logits)
        start = F.cross_entropy(start_logits.float(), batch["start_positions"])
        end = F.cross_entropy(end_logits.float(), batch["end_positions"])
        loss = self.taught((start + end) / 2, out, batch, batch["attention_mask"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start a fresh score over the evaluation windows."""
        spans = SquadSpans(self._data().dev_windows, n_best=self.n_best, max_answer_length=self.max_answer_length)
        self._spans = [spans.to(self.device)]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect logits; answers are decoded when all windows of a question are there."""
        self._spans[0].update(batch["window_index"], *self(batch))

    def on_validation_epoch_end(self) -> None:
        """Log exact match and F1 (0 to 100) and the number of questions scored."""
        scores = self._spans[0].compute()
        self.log_dict(
            {
                "val/exact_match": scores["exact_match"],
                "val/f1": scores["f1"],
                "val/questions": scores["questions"].float(),
            },
            prog_bar=True,
            sync_dist=False,
        )
        self._spans = []

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Logits and window numbers, as :func:`slope_pl.data.decode_predictions` takes them."""
        start_logits, end_logits = self(batch)
        return {"window_index": batch["window_index"], "start_logits": start_logits, "end_logits": end_logits}
