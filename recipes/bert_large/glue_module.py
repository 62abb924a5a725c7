"""BERT for the tasks of GLUE as a LightningModule, dense or 2:4 sparse."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from recipes.bert_large.glue_optimizer import linear_schedule, parameter_groups
from recipes.bert_large.glue_weights import architecture, is_checkpoint, name_labels, read_weights
from recipes.bert_large.pretrain_checkpoint import check_masks
from slope_pl import SLoPeConfig, SLoPeLightningModule, dense_state_dict, sparse_layers
from slope_pl.data import GlueDataModule, GlueScores
from slope_pl.data.glue_metrics import combine
from slope_pl.data.glue_tasks import task_info
from slope_pl.models import BertConfig, BertForSequenceClassification, PretrainedUnavailableError, save_pretrained

Batch = dict[str, Tensor]


class BertGlue(SLoPeLightningModule):
    """BERT that classifies a sentence or a pair (Devlin et al. 2018, section 4.1), or gives STS-B's score.

    Args:
        task: the data module's task; on the command line it is taken from --data.task.
        weights: pretrained weights to start from: a folder with config.json and model.safetensors, a hub id such as
            google-bert/bert-large-uncased, or a .ckpt of recipes.bert_large.pretrain, whose masks are then kept. Null starts
            from random weights. A hub id that cannot be reached is a loud warning and random weights; see require_weights.
        require_weights: stop instead when the hub cannot be reached.
        bert: the architecture; null takes that of the weights, and without weights BERT-Large (24 layers of 1024).
        slope: how the model is made sparse; null trains it dense.
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
        slope: SLoPeConfig | None = None,
        learning_rate: float = 2.4e-5,
        weight_decay: float = 0.01,
        adapter_weight_decay: float = 1e-4,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(slope=slope)
        for name, value, low, high in (
            ("learning_rate", learning_rate, 0.0, 1.0),
            ("weight_decay", weight_decay, -1e-9, 1.0),
            ("adapter_weight_decay", adapter_weight_decay, -1e-9, 1.0),
            ("warmup", warmup, -1e-9, 1.0),
        ):
            if not low < value < high:
                raise ValueError(f"{name}={value}: a number between {max(low, 0):g} and {high:g} is expected")
        self.info = task_info(task)
        self.task, self.weights, self.require_weights = task, weights, require_weights
        self.bert = BertConfig.from_dict(bert) if isinstance(bert, dict) else bert
        self.learning_rate, self.warmup = learning_rate, warmup
        self.weight_decay, self.adapter_weight_decay = weight_decay, adapter_weight_decay
        self.restores_checkpoint = False
        self.net: BertForSequenceClassification | None = None
        self._scores: dict[str, list[GlueScores]] = {}  # in lists, so that they are no submodules
        self.save_hyperparameters()

    # ------------------------------------------------------------------------------------------------ model

    def configure_model(self) -> None:
        """Build the net, load pretrained weights, then make it sparse: masks are chosen from what was loaded."""
        if self.net is None:
            self.net = self._build()
        super().configure_model()

    def _build(self) -> BertForSequenceClassification:
        # A checkpoint that is about to be restored brings its own weights, and so does load_from_checkpoint.
        fresh = self._trainer is not None and not self.restores_checkpoint
        classes = self.info.num_labels
        if self.weights is not None:
            try:
                net = BertForSequenceClassification(self.bert or architecture(self.weights), classes)
                if fresh:
                    rank_zero_info(read_weights(net, self.weights, self.info, self.slope_config))
                return net
            except PretrainedUnavailableError as error:
                if self.require_weights:
                    raise
                if fresh:
                    warnings.warn(
                        f"STARTING FROM RANDOM WEIGHTS: {error} Scores will be those of an untrained model.",
                        stacklevel=2,
                    )
        elif fresh:
            rank_zero_info("Weights: none given, starting from random ones.")
        return BertForSequenceClassification(self.bert or BertConfig.large(), classes)

    def _model(self) -> BertForSequenceClassification:
        assert self.net is not None, "configure_model() builds it"
        return self.net

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``(B, num_labels)`` of a batch of the data module."""
        return self._model()(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]).logits

    def setup(self, stage: str) -> None:
        """Fail before the first step, not inside an embedding, if data and model do not fit."""
        super().setup(stage)
        data = self._data()
        if data.task != self.task:
            raise ValueError(f"the data is {data.task}'s, the model {self.task}'s: give both the same task")

    def on_fit_start(self) -> None:
        """Check the sizes; the model is there by now."""
        self._check_sizes()

    on_validation_start = on_predict_start = on_fit_start

    def _check_sizes(self) -> None:
        config, data = self._model().config, self._data()
        if data.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {data.vocab_size} tokens, the model's vocabulary {config.vocab_size}: "
                "data.tokenizer and model.weights do not belong together"
            )
        if data.max_length > config.max_position_embeddings:
            raise ValueError(
                f"data.max_length is {data.max_length}, but the model has {config.max_position_embeddings} positions: "
                "make data.max_length as small"
            )

    def _data(self) -> GlueDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------------ steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy; for STS-B the mean squared error of the score."""
        logits, labels = self(batch).float(), batch["labels"]
        loss = F.mse_loss(logits.squeeze(1), labels) if self.info.regression else F.cross_entropy(logits, labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_end(self) -> None:
        """Check that the masks of the pretraining checkpoint are those of the end."""
        if is_checkpoint(self.weights) and self.trainer.is_global_zero and sparse_layers(self):
            layers = check_masks(self._model(), str(self.weights))
            print(f"Masks of {layers} layers are still those of {self.weights}.", flush=True)

    def on_validation_epoch_start(self) -> None:
        """Start fresh scores over the evaluation sets."""
        self._scores = {
            split: [GlueScores(self.task, torch.from_numpy(rows.labels)).to(self.device)]
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

    # ------------------------------------------------------------------------------------------------ optimizer

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a linear warm-up and decay; adapters are a group of their own."""
        groups = parameter_groups(self.named_parameters(), self.weight_decay, self.adapter_weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, eps=1e-6)
        rate = linear_schedule(self.trainer.estimated_stepping_batches, self.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------------------------------------ saving

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the architecture: a checkpoint is enough to rebuild the model, wherever the weights came from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["bert"] = self._model().config.to_dict()

    def export(self, folder: str) -> None:
        """Write a dense Hugging Face model: zeros in place of pruned weights, awake adapters added in."""
        net = self._model()
        save_pretrained(net, folder, dense_state_dict(net))
        name_labels(folder, self.info)
