"""BERT for extractive question answering as a LightningModule, dense or 2:4 sparse."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from recipes.bert_large.pretrain_checkpoint import (
    check_masks,
    load_pretraining_checkpoint,
    read_pretraining_checkpoint,
)
from slope_pl import SLoPeConfig, SLoPeLightningModule, dense_state_dict, sparse_layers
from slope_pl.data import SquadDataModule, SquadSpans
from slope_pl.models import (
    BertConfig,
    BertForQuestionAnswering,
    PretrainedUnavailableError,
    load_config,
    load_pretrained,
    save_pretrained,
)

Batch = dict[str, Tensor]


class BertSquad(SLoPeLightningModule):
    """BERT that finds answers in a context (Devlin et al. 2018, section 4.2).

    Args:
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
        n_best: candidate answers a window.
        max_answer_length: longest answer, tokens.
    """

    def __init__(
        self,
        weights: str | None = None,
        require_weights: bool = False,
        bert: BertConfig | dict[str, Any] | None = None,
        slope: SLoPeConfig | None = None,
        learning_rate: float = 3e-5,
        weight_decay: float = 0.01,
        adapter_weight_decay: float = 1e-4,
        warmup: float = 0.1,
        n_best: int = 20,
        max_answer_length: int = 30,
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
        self.weights, self.require_weights = weights, require_weights
        self.bert = BertConfig.from_dict(bert) if isinstance(bert, dict) else bert
        self.learning_rate, self.warmup = learning_rate, warmup
        self.weight_decay, self.adapter_weight_decay = weight_decay, adapter_weight_decay
        self.n_best, self.max_answer_length = n_best, max_answer_length
        self.restores_checkpoint = False
        self.net: BertForQuestionAnswering | None = None
        self._spans: list[SquadSpans] = []  # a list, so that the metric is no submodule: it holds the data set
        self.save_hyperparameters()

    # ------------------------------------------------------------------------------------------------ model

    def configure_model(self) -> None:
        """Build the net, load pretrained weights, then make it sparse: masks are chosen from what was loaded."""
        if self.net is None:
            self.net = self._build()
        super().configure_model()

    def _build(self) -> BertForQuestionAnswering:
        # A checkpoint that is about to be restored brings its own weights, and so does load_from_checkpoint.
        fresh = self._trainer is not None and not self.restores_checkpoint
        if self.weights is not None and self.weights.endswith(".ckpt"):
            net = BertForQuestionAnswering(self.bert or read_pretraining_checkpoint(self.weights).bert)
            if fresh:
                rank_zero_info(load_pretraining_checkpoint(net, self.weights, self.slope_config).summary())
            return net
        if self.weights is not None:
            try:
                net = BertForQuestionAnswering(self.bert or load_config(self.weights))
                if fresh:
                    rank_zero_info(f"Weights from {self.weights}: {load_pretrained(net, self.weights).summary()}.")
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
        return BertForQuestionAnswering(self.bert or BertConfig.large())

    def _model(self) -> BertForQuestionAnswering:
        assert self.net is not None, "configure_model() builds it"
        return self.net

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Start and end logits, both ``(B, T)``, of a batch of the data module."""
        return self._model()(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])

    def on_fit_start(self) -> None:
        """Fail before the first step, not inside an embedding, if vocabulary and model do not fit."""
        rows = self._model().config.vocab_size
        if self._data().vocab_size > rows:
            raise ValueError(
                f"the tokenizer has {self._data().vocab_size} tokens, the model's vocabulary {rows}: "
                "data.tokenizer and model.weights do not belong together"
            )

    def _data(self) -> SquadDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------------ steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean of the cross-entropies of start and end position."""
        start_logits, end_logits = self(batch)
        start = F.cross_entropy(start_logits.float(), batch["start_positions"])
        end = F.cross_entropy(end_logits.float(), batch["end_positions"])
        loss = (start + end) / 2
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_end(self) -> None:
        """Check that the masks of the pretraining checkpoint are those of the end."""
        if (self.weights or "").endswith(".ckpt") and self.trainer.is_global_zero and sparse_layers(self):
            layers = check_masks(self._model(), str(self.weights))
            print(f"Masks of {layers} layers are still those of {self.weights}.", flush=True)

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

    # ------------------------------------------------------------------------------------------------ optimizer

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a linear warm-up and decay; adapters are a group of their own."""
        total = self.trainer.estimated_stepping_batches
        warmup = round(self.warmup * total)

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return max(0.0, (total - step) / max(1, total - warmup))

        optimizer = torch.optim.AdamW(self._parameter_groups(), lr=self.learning_rate, eps=1e-6)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups: dict[str, list[nn.Parameter]] = {"weights": [], "no_decay": [], "adapters": []}
        for name, parameter in self.named_parameters():
            if "adapter_" in name:
                groups["adapters"].append(parameter)
            else:
                groups["weights" if parameter.dim() > 1 else "no_decay"].append(parameter)
        decay = {"weights": self.weight_decay, "no_decay": 0.0, "adapters": self.adapter_weight_decay}
        return [{"params": ps, "weight_decay": decay[key], "name": key} for key, ps in groups.items() if ps]

    # ------------------------------------------------------------------------------------------------ saving

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the architecture: a checkpoint is enough to rebuild the model, wherever the weights came from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["bert"] = self._model().config.to_dict()

    def export(self, folder: str) -> None:
        """Write a dense Hugging Face model: zeros in place of pruned weights, awake adapters added in."""
        net = self._model()
        save_pretrained(net, folder, dense_state_dict(net))
