"""BERT pretraining as a LightningModule: masked words and next sentence, dense or 2:4 sparse, in two phases."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal, cast

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

from recipes.bert_large.finetuning import parameter_groups
from recipes.bert_large.imitation import ImitationConfig, freeze_heads, load_imitated, set_dropout
from recipes.bert_large.pretrain_checkpoint import (
    load_pretraining_checkpoint,
    read_pretraining_checkpoint,
    say_masks_are_kept,
)
from recipes.compiling import compile_blocks, compiled, is_spread, release_blocks
from slope_pl import SLoPeConfig, SLoPeLightningModule, dense_state_dict, sparse_layers
from slope_pl.data import MlmDataModule
from slope_pl.lightning import Distillation
from slope_pl.models import (
    BertConfig,
    BertForPreTraining,
    PreTrainingLoss,
    PreTrainingOutput,
    load_config,
    load_pretrained,
    pretraining_loss,
    save_pretrained,
)
from slope_pl.optim import Lamb

Batch = dict[str, Tensor]
OptimizerName = Literal["lamb", "adamw"]


def polynomial_rate(total: int, warmup: float, power: float) -> Callable[[int], float]:
    """The rate of each step as a share of its peak, as in the published runs.

    With ``p`` the share of the steps that are done when this one is: ``p / warmup`` before ``warmup``, then
    ``(1 - p) ** power``. So it rises from 0 to 1, drops at once to ``(1 - warmup) ** power`` (0.85 in phase 1), and ends in 0.

    Args:
        total: optimizer steps of the run.
        warmup: share of them in which it rises.
        power: of the decay; 0.5 as published, 1 is linear.
    """

    def share(step: int) -> float:
        progress = (step + 1) / total
        return progress / warmup if progress < warmup else max(0.0, 1 - progress) ** power

    return share


class BertPretraining(SLoPeLightningModule):
    """BERT that learns to fill in masked words and to tell which sentence follows (Devlin et al. 2018, section 3.1).

    Args:
        learning_rate: peak of the schedule.
        bert: the architecture; null takes that of ``start_from`` or of the weights, else BERT-Large (24 layers of 1024) with
            30,528 words, which is the tokenizer's 30,522 padded to a multiple of 64.
        start_from: a checkpoint of this recipe to take the weights from, such as phase 1's for phase 2: a sparse one keeps its
            masks, a dense one is pruned by its trained weights. Steps, optimizer and schedule begin anew.
        weights: pretrained weights to start from instead: a folder with config.json and model.safetensors, or a hub id.
        slope: how the model is made sparse; null trains it dense.
        imitation: learn the hidden states of a dense teacher, by default of what the run starts from: a pruned model
            recovers on plain text. Null: masked words and next sentences alone.
        dropout: replaces the architecture's rates in this run; its checkpoint names the architecture's own. Null keeps them.
        optimizer: lamb as published, or adamw.
        weight_decay: of matrices and embeddings; biases and norms have none.
        adapter_weight_decay: of the low-rank adapters.
        warmup: share of all steps in which the rate rises from 0.
        decay_power: power of the polynomial decay that follows.
        betas: of the optimizer.
        epsilon: of the optimizer.
        always_adapt: let LAMB use its trust ratio for biases and norms too; the published runs do not.
        compile: torch.compile the loss, on CUDA, or block by block where weights are sharded; the first step then takes a
            minute or so.
    """

    def __init__(
        self,
        learning_rate: float = 6e-3,
        bert: BertConfig | dict[str, Any] | None = None,
        start_from: str | None = None,
        weights: str | None = None,
        slope: SLoPeConfig | None = None,
        imitation: ImitationConfig | None = None,
        dropout: float | None = None,
        optimizer: OptimizerName = "lamb",
        weight_decay: float = 0.01,
        adapter_weight_decay: float = 1e-4,
        warmup: float = 0.2843,
        decay_power: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-6,
        always_adapt: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(slope=slope)
        for name, value, good, expected in (
            ("learning_rate", learning_rate, 0 < learning_rate < 1, "a number above 0 and below 1"),
            ("weight_decay", weight_decay, 0 <= weight_decay < 1, "0 or more, and below 1"),
            ("adapter_weight_decay", adapter_weight_decay, 0 <= adapter_weight_decay < 1, "0 or more, and below 1"),
            ("warmup", warmup, 0 <= warmup < 1, "a share of all steps, 0 or more and below 1"),
            ("decay_power", decay_power, decay_power > 0, "a number above 0 (1 is linear)"),
            ("betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers from 0 to below 1"),
            ("epsilon", epsilon, epsilon > 0, "a number above 0"),
            ("dropout", dropout, dropout is None or 0 <= dropout < 1, "0 or more, and below 1, or null"),
            ("optimizer", optimizer, optimizer in ("lamb", "adamw"), "lamb or adamw"),
        ):
            if not good:
                raise ValueError(f"{name}={value}: {expected} is expected")
        if start_from is not None and weights is not None:
            raise ValueError(f"start_from={start_from} and weights={weights} are both set; give one of them")
        self.bert = BertConfig.from_dict(bert) if isinstance(bert, dict) else bert
        self.start_from, self.weights = start_from, weights
        self.imitation = ImitationConfig(**imitation) if isinstance(imitation, dict) else imitation
        if self.imitation is not None:
            self.imitation.source(weights, start_from)
        self.distillation: Distillation | None = None
        self.dropout = dropout
        self.learning_rate, self.warmup, self.decay_power = learning_rate, warmup, decay_power
        self.optimizer_name, self.betas, self.epsilon, self.always_adapt = optimizer, betas, epsilon, always_adapt
        self.decay = {"weights": weight_decay, "no_decay": 0.0, "adapters": adapter_weight_decay}
        self.wants_compile = compile
        self.restores_checkpoint = False
        self.net: BertForPreTraining | None = None
        self._compiled: Callable[..., Any] | None = None
        self.val = nn.ModuleDict(
            {
                "mlm_loss": MeanMetric(),
                "nsp_loss": MeanMetric(),
                "nsp_accuracy": BinaryAccuracy(),
            }
        )
        if self.imitation is not None:
            self.val["imitation"] = MeanMetric()
        self.save_hyperparameters()

    # ------------------------------------------------------------------------------------------------ model

    def configure_model(self) -> None:
        """Build the net, load what it starts from, then make it sparse, unless a sparse checkpoint did."""
        if self.net is None:
            self.net = self._build()
            words = self.net.config.vocab_size
            self.val["mlm_accuracy"] = MulticlassAccuracy(words, average="micro", ignore_index=-100)
            if self.dropout is not None:
                set_dropout(self.net, self.dropout)
        super().configure_model()
        if self.imitates_alone:
            freeze_heads(self.net)

    @property
    def imitates_alone(self) -> bool:
        """Whether nothing but hidden states is learnt: the heads stay as they are, and have no scores."""
        return self.imitation is not None and self.imitation.weight == 1

    def _build(self) -> BertForPreTraining:
        # A checkpoint that is about to be restored brings its own weights, and so does load_from_checkpoint.
        fresh = self._trainer is not None and not self.restores_checkpoint
        config = self.bert
        if config is None and self.start_from is not None:
            config = read_pretraining_checkpoint(self.start_from).bert
        if config is None and self.weights is not None:
            config = load_config(self.weights)
        net = BertForPreTraining(config or BertConfig.large(vocab_size=30528))
        if fresh and self.start_from is not None:
            rank_zero_info(load_pretraining_checkpoint(net, self.start_from, self.slope_config).summary())
        elif fresh and self.weights is not None:
            rank_zero_info(f"Weights from {self.weights}: {load_pretrained(net, self.weights).summary()}.")
        return net

    def _model(self) -> BertForPreTraining:
        assert self.net is not None, "configure_model() builds it"
        return self.net

    def _data(self) -> MlmDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def forward(self, batch: Batch) -> PreTrainingOutput:
        """Logits of the masked positions ``(B, P, vocab)`` and of the next sentence ``(B, 2)``."""
        return _forward(self._model(), batch)

    def on_fit_start(self) -> None:
        """Fail before the first step where the settings do not fit each other."""
        self._check_data()
        self._load_imitated()
        if self.wants_compile and not self._compiles():
            rank_zero_info(f"compile=True has no effect on {self.device.type}: the step is compiled on CUDA alone.")

    def on_validation_start(self) -> None:
        """Likewise for ``validate``."""
        self._check_data()
        self._load_imitated()

    def _load_imitated(self) -> None:
        if self.imitation is not None and self.distillation is None:
            source = self.imitation.source(self.weights, self.start_from)
            data = self._data()
            teacher = load_imitated(source, self._model().config, data.vocab_size, data.max_length)
            self.distillation = Distillation(teacher, "hidden_states", weight=self.imitation.weight)

    def _check_data(self) -> None:
        config, data = self._model().config, self._data()
        if data.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {data.vocab_size} tokens, the model's vocabulary {config.vocab_size}: set "
                f"model.bert.vocab_size to {data.vocab_size} or more, or data.tokenizer to the model's own"
            )
        if data.max_length > config.max_position_embeddings:
            raise ValueError(
                f"data.max_length={data.max_length} tokens, but the model has positions for "
                f"{config.max_position_embeddings}: lower it, or raise model.bert.max_position_embeddings"
            )

    # ------------------------------------------------------------------------------------------------ steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum of the two losses; with a teacher, the share of its hidden states that is missed."""
        if self.distillation is not None:
            return self._imitate(self.distillation, batch)
        loss: PreTrainingLoss = self._training_loss()(self._model(), batch)
        self.log("train/loss", loss.total, prog_bar=True)
        self.log_dict({"train/mlm_loss": loss.masked_words, "train/nsp_loss": loss.next_sentence})
        return loss.total

    def _imitate(self, distillation: Distillation, batch: Batch) -> Tensor:
        loss, missed, own = self._training_loss()(
            self._model(), batch, self._taught(batch), distillation.distance, distillation.weight
        )
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/imitation", missed)
        if own is not None:
            self.log_dict({"train/mlm_loss": own.masked_words, "train/nsp_loss": own.next_sentence})
        return loss

    def _taught(self, batch: Batch) -> Any:
        assert self.distillation is not None, "with a teacher"
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: batch[name] for name in names} | {"output_hidden_states": True}
        return self.distillation.outputs(inputs, like=self._model().bert.embeddings.word_embeddings.weight)

    def _training_loss(self) -> Callable[..., Any]:
        eager = _loss if self.distillation is None else _imitation_loss
        if not self._compiles():
            return eager
        if self._compiled is None and is_spread(self._model()):
            compile_blocks(self._model())
            self._compiled = eager
        elif self._compiled is None:
            self._compiled = compiled(eager)
        return self._compiled

    def _compiles(self) -> bool:
        return self.wants_compile and self.device.type == "cuda"

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect losses and accuracies: words count by number, whatever the batches' sizes."""
        metrics = self._metrics()
        output = _forward(self._model(), batch, states=self.distillation is not None, words=not self.imitates_alone)
        if self.distillation is not None:
            missed = self.distillation.distance(output, self._taught(batch), batch["attention_mask"])
            metrics["imitation"].update(missed, batch["attention_mask"].sum())
        if self.imitates_alone:
            return
        labels, following = batch["masked_labels"], batch["next_sentence_label"]
        loss = pretraining_loss(output, labels, following)
        metrics["mlm_loss"].update(loss.masked_words, (labels != -100).sum())
        metrics["nsp_loss"].update(loss.next_sentence, len(following))
        metrics["mlm_accuracy"].update(output.prediction_logits.argmax(-1).flatten(), labels.flatten())
        metrics["nsp_accuracy"].update(output.seq_relationship_logits.argmax(-1), following)

    def _metrics(self) -> dict[str, Metric]:
        return cast("dict[str, Metric]", dict(self.val.items()))

    def on_validation_epoch_end(self) -> None:
        """Log losses (nats) and accuracies (shares), over all ranks; ``val/loss`` is of the heads, where they learn."""
        metrics = self._metrics()
        measured = {"imitation": metrics["imitation"]} if self.imitates_alone else metrics
        found = {f"val/{name}": metric.compute() for name, metric in measured.items()}
        learnt = ("imitation",) if self.imitates_alone else ("mlm_loss", "nsp_loss")
        found["val/loss"] = torch.stack([found[f"val/{name}"] for name in learnt]).sum()
        self.log_dict(found, prog_bar=True, sync_dist=False)
        for metric in self._metrics().values():
            metric.reset()

    def on_train_end(self) -> None:
        """Check that the masks of the phase before are those of the end."""
        if self.start_from is None or not sparse_layers(self) or not self.trainer.is_global_zero:
            return
        say_masks_are_kept(self._model(), self.start_from)

    def teardown(self, stage: str) -> None:
        """Let go of what was compiled."""
        self._compiled = None
        if self.net is not None:
            release_blocks(self.net)

    # ------------------------------------------------------------------------------------------------ optimizer

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """LAMB (or AdamW) with a warm-up and polynomial decay; adapters are a group of their own."""
        total = self.trainer.estimated_stepping_batches
        if not 0 < total < math.inf:
            raise ValueError("the number of steps is missing, and the schedule needs it: set trainer.max_steps")
        given = parameter_groups(self.named_parameters(), self.decay)
        options: dict[str, Any] = {"lr": self.learning_rate, "betas": self.betas, "eps": self.epsilon}
        optimizer: torch.optim.Optimizer
        if self.optimizer_name == "lamb":
            if isinstance(self.trainer.strategy, DeepSpeedStrategy):
                raise ValueError(
                    "optimizer=lamb under DeepSpeed: ZeRO flattens parameters, and LAMB's step depends on the norm of each of "
                    "them; use optimizer=adamw, or strategy slope_ddp"
                )
            optimizer = Lamb(given, **options, always_adapt=self.always_adapt)
        else:
            optimizer = torch.optim.AdamW(given, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, polynomial_rate(int(total), self.warmup, self.decay_power)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------------------------------------ saving

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the architecture: a checkpoint is enough to rebuild the model, wherever the weights came from."""
        super().on_save_checkpoint(checkpoint)
        saved = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        saved["bert"] = self._model().config.to_dict()
        # A plain mapping: the file then loads with weights_only=True.
        saved["imitation"] = None if self.imitation is None else asdict(self.imitation)

    def export(self, folder: str) -> None:
        """Write a dense Hugging Face model: zeros in place of pruned weights, awake adapters added in."""
        net = self._model()
        save_pretrained(net, folder, dense_state_dict(net))


def _forward(net: BertForPreTraining, batch: Batch, states: bool = False, words: bool = True) -> PreTrainingOutput:
    positions = batch["masked_positions"]
    return net(
        batch["input_ids"],
        batch["attention_mask"],
        batch["token_type_ids"],
        masked_positions=positions if words else positions[:, :0],  # none is decoded
        output_hidden_states=states,
    )


def _loss(net: BertForPreTraining, batch: Batch) -> PreTrainingLoss:
    return pretraining_loss(_forward(net, batch), batch["masked_labels"], batch["next_sentence_label"])


def _imitation_loss(
    net: BertForPreTraining, batch: Batch, theirs: Any, distance: Callable[..., Tensor], weight: float
) -> tuple[Tensor, Tensor, PreTrainingLoss | None]:
    """What is trained on, the share of the hidden states that is missed, and the heads' losses if they learn."""
    output = _forward(net, batch, states=True, words=weight < 1)
    missed = distance(output, theirs, batch["attention_mask"])
    if weight == 1:
        pooled = getattr(output, "pooler_output", None)
        # DDP waits for a gradient of every parameter, also where the teacher has no pooler.
        idle = 0.0 if pooled is None or theirs.pooler_output is not None else 0.0 * pooled.sum()
        return missed + idle, missed.detach(), None
    own = pretraining_loss(output, batch["masked_labels"], batch["next_sentence_label"])
    return (1 - weight) * own.total + weight * missed, missed.detach(), own
