"""What fine-tuning BERT on a task has in common: where weights come from, AdamW, what a checkpoint holds, the export."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from recipes.bert_large.pretrain_checkpoint import (
    load_pretraining_checkpoint,
    read_pretraining_checkpoint,
    say_masks_are_kept,
)
from recipes.bert_large.starts import (
    FineTuned,
    TeacherConfig,
    check_choices,
    is_fine_tuned,
    load_dense,
    read_fine_tuned,
)
from slope_pl import ConfigError, SLoPeConfig, SLoPeLightningModule, dense_state_dict, sparse_layers
from slope_pl.config import as_config
from slope_pl.lightning import Distillation, FadeCallback, check_faded_masks
from slope_pl.models import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    Encoder,
    EncoderTask,
    PretrainedUnavailableError,
    encoder_from_config,
    load_config,
    load_encoder,
    load_model_type,
    load_pretrained,
    save_pretrained,
)
from slope_pl.nn import full_shape

Architecture = BertConfig | dict[str, Any]  # of this package's BERT, or config.json of a transformers encoder
Batch = dict[str, Tensor]


class BertFineTuning(SLoPeLightningModule):
    """Base of the recipes' modules. A subclass calls :meth:`take` in its constructor.

    Attributes:
        head: what the head is for.
        num_labels: its outputs, for classification and regression.
    """

    net: Any
    head: EncoderTask = "question_answering"
    num_labels: int | None = None
    task: str | None = None

    def __init__(self, slope: SLoPeConfig | dict[str, Any] | None, fade: float | None) -> None:
        # The first stage of a gradual start is a dense run; its masks are in the callback below.
        super().__init__(slope=None if fade is not None else slope)
        self.masks = as_config(slope)
        self.fade = fade

    def take(
        self,
        *,
        weights: str | None,
        require_weights: bool,
        bert: BertConfig | dict[str, Any] | None,
        encoder: dict[str, Any] | None,
        teacher: TeacherConfig | dict[str, Any] | None,
        learning_rate: float,
        weight_decay: float,
        adapter_weight_decay: float,
        warmup: float,
    ) -> None:
        """Check and keep the settings that all have.

        Raises:
            ValueError: if one is out of range.
            ConfigError: if one has no effect.
        """
        for name, value, low, high in (
            ("learning_rate", learning_rate, 0.0, 1.0),
            ("weight_decay", weight_decay, -1e-9, 1.0),
            ("adapter_weight_decay", adapter_weight_decay, -1e-9, 1.0),
            ("warmup", warmup, -1e-9, 1.0),
        ):
            if not low < value < high:
                raise ValueError(f"{name}={value}: a number between {max(low, 0):g} and {high:g} is expected")
        check_choices(self.fade, self.masks, weights, faded=False)
        if bert is not None and encoder is not None:
            raise ConfigError("bert and encoder are both set, which are two architectures; give one of them")
        self.weights, self.require_weights = weights, require_weights
        self.bert = BertConfig.from_dict(bert) if isinstance(bert, dict) else bert
        self.encoder = encoder
        self.teacher = TeacherConfig(**teacher) if isinstance(teacher, dict) else teacher
        if self.teacher is not None:
            # Only to check the numbers, before anything is read.
            Distillation(nn.Identity(), self.head, self.teacher.temperature, self.teacher.weight)
        self.learning_rate, self.warmup = learning_rate, warmup
        self.decay = {"weights": weight_decay, "no_decay": 0.0, "adapters": adapter_weight_decay}
        self.restores_checkpoint = False
        self.net = None
        self.distillation: Distillation | None = None
        self._states: Distillation | None = None
        self._faded: FineTuned | None = None

    # ------------------------------------------------------------------------------------------------ model

    def new_net(self, architecture: Architecture) -> nn.Module:
        """A dense net with the task's head: this package's BERT, or an encoder of transformers."""
        if not isinstance(architecture, BertConfig):
            classes = self.num_labels if self.head == "classification" else None
            return encoder_from_config(architecture, self.head, classes)
        if self.num_labels is None:
            return BertForQuestionAnswering(architecture)
        return BertForSequenceClassification(architecture, self.num_labels)

    def check_source(self, source: str) -> None:
        """Raise if pretrained weights, a folder or hub id, are not for this task."""

    def configure_model(self) -> None:
        """Build the net, load pretrained weights, then make it sparse: masks are chosen from what was loaded."""
        if self.net is None:
            self.net = self._build()
        super().configure_model()
        if self._faded is not None and self._faded.masks is not None:
            check_faded_masks(self, self._faded.masks)
            self._faded = None

    def _build(self) -> nn.Module:
        # A checkpoint that is about to be restored brings its own weights, and so does load_from_checkpoint.
        fresh = self._trainer is not None and not self.restores_checkpoint
        given = self.encoder or self.bert
        if self.weights is not None and (fresh or given is None):
            try:
                return self._from_weights(self.weights, given, fresh)
            except PretrainedUnavailableError as error:
                if self.require_weights or self.encoder is not None:
                    raise
                if fresh:
                    warnings.warn(
                        f"STARTING FROM RANDOM WEIGHTS: {error} Scores will be those of an untrained model.",
                        stacklevel=2,
                    )
        elif fresh:
            rank_zero_info("Weights: none given, starting from random ones.")
        return self.new_net(given or BertConfig.large())

    def _from_weights(self, source: str, given: Architecture | None, fresh: bool) -> nn.Module:
        """The net of a folder, hub id or checkpoint, and if ``fresh`` its weights.

        Raises:
            PretrainedMismatchError: if shapes differ.
            CheckpointError: if a checkpoint does not fit the net or the method.
            ConfigError: if an architecture is given beside weights that bring another.
        """
        if is_checkpoint(source) and is_fine_tuned(source):
            saved = read_fine_tuned(source)
            net = self.new_net(given or architecture_of(saved.settings))
            if fresh:
                self._start_from(net, saved)
            return net
        if is_checkpoint(source):
            net = self.new_net(given or read_pretraining_checkpoint(source).bert)
            if fresh:
                rank_zero_info(load_pretraining_checkpoint(net, source, self.slope_config).summary())
            return net
        kind = load_model_type(source)
        if kind == "bert" and self.encoder is None:
            net = self.new_net(self.bert or load_config(source))
            if fresh:
                self.check_source(source)
                rank_zero_info(f"Weights from {source}: {load_pretrained(net, source).summary()}.")  # type: ignore[arg-type]
            return net
        if given is not None:
            what = "encoder" if self.encoder is not None else "bert"
            raise ConfigError(
                f"model.{what} is set beside weights={source!r}, a {kind}, which bring their own architecture: leave it out"
            )
        self.check_source(source)
        encoder = load_encoder(source, self.head, self.num_labels if self.head == "classification" else None)
        if fresh:
            new = (
                f"{len(encoder.fresh)} tensors fresh ({', '.join(encoder.fresh)})" if encoder.fresh else "head included"
            )
            rank_zero_info(f"Weights from {source}: a {kind} of transformers, {new}.")
        return encoder

    def _start_from(self, net: nn.Module, saved: FineTuned) -> None:
        faded = saved.masks is not None
        check_choices(self.fade, self.masks, self.weights, faded)
        load_dense(net, saved, self.task, "model.weights")
        if faded:
            self._faded = saved
        how = "faded to 2:4 masks" if faded else "dense"
        rank_zero_info(f"Weights from {saved.path}: {len(saved.state)} tensors, head included, {how}.")

    def load_teacher(self) -> None:
        """Read the teacher, once training begins: no other stage needs it.

        Raises:
            CheckpointError: it is not a dense checkpoint of this task.
            ValueError: its vocabulary is another one than the model's.
        """
        if self.teacher is None:
            return
        saved = read_fine_tuned(self.teacher.checkpoint)
        net = self.new_net(architecture_of(saved.settings))
        load_dense(net, saved, self.task, "model.teacher.checkpoint")
        theirs, own = net.config.vocab_size, self._model().config.vocab_size  # type: ignore[union-attr]
        if theirs != own:
            raise ValueError(
                f"the teacher {saved.path} has a vocabulary of {theirs} tokens, the model one of {own}: both read the same ids"
            )
        if self.teacher.hidden_weight:
            for name in ("num_hidden_layers", "hidden_size"):
                their, mine = (getattr(model.config, name) for model in (net, self._model()))
                if their != mine:
                    raise ConfigError(
                        f"model.teacher.hidden_weight={self.teacher.hidden_weight:g} needs a teacher as deep and as wide as "
                        f"the model: {saved.path} has {name}={their}, the model {mine}. Leave it out, or take another teacher"
                    )
            self._states = Distillation(net, "hidden_states", weight=1.0)
        self.distillation = Distillation(net, self.head, self.teacher.temperature, self.teacher.weight)
        rank_zero_info(f"Teacher: {saved.path}, {self.distillation.teacher_bytes():,} bytes.")

    def on_fit_start(self) -> None:
        """Fail before the first step, not inside an embedding, if data and model do not fit."""
        self.check_sizes()
        self.load_teacher()

    def on_validation_start(self) -> None:
        """Likewise, where nothing is trained."""
        self.check_sizes()

    on_predict_start = on_validation_start

    def check_sizes(self) -> None:
        """Compare vocabulary and lengths of the data module with the model's.

        Raises:
            ValueError: they do not fit.
        """
        net, data = self._model(), self.trainer.datamodule  # type: ignore[attr-defined]
        self.check_vocabulary(data.vocab_size)
        if isinstance(net, Encoder) and data.pad != net.config.pad_token_id:
            # RoBERTa's counts positions by it.
            raise ValueError(
                f"the tokenizer pads with {data.pad}, the model with {net.config.pad_token_id}: data.tokenizer and "
                "model.weights do not belong together"
            )
        longest = getattr(net, "max_length", net.config.max_position_embeddings)
        if data.max_length > longest:
            raise ValueError(
                f"data.max_length is {data.max_length}, but the model has {longest} positions: "
                "make data.max_length as small"
            )

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What net and teacher take."""
        return batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]

    def outputs(self, batch: Batch) -> Any:
        """What the net gives, with hidden states where a teacher's are learnt."""
        if self._states is None:
            return self._model()(*self.inputs(batch))
        return self._model()(*self.inputs(batch), output_hidden_states=True)

    def taught(self, loss: Tensor, outputs: Any, batch: Batch, mask: Tensor | None = None) -> Tensor:
        """The loss to train on: of the labels, with the teacher's part where there is one.

        Args:
            loss: of the labels.
            outputs: of :meth:`outputs`.
            batch: of the data module.
            mask: of :class:`slope_pl.lightning.Distillation`.
        """
        if self.distillation is None:
            return loss
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs: dict[str, Any] = dict(zip(names, self.inputs(batch), strict=True))
        if self._states is not None:
            inputs["output_hidden_states"] = True
        theirs = self.distillation.outputs(inputs, like=outputs[0])
        weight = self.distillation.weight
        loss = (1 - weight) * loss + weight * self.distillation.distance(outputs, theirs, mask)
        if self._states is not None:
            assert self.teacher is not None, "it has hidden states"
            missed = self._states.distance(outputs, theirs, batch["attention_mask"])
            self.log("train/imitation", missed)
            loss = loss + self.teacher.hidden_weight * missed
        return loss

    def configure_callbacks(self) -> list[pl.Callback]:
        """With the fade of a first stage."""
        callbacks = super().configure_callbacks()
        if self.fade is not None:
            callbacks.append(FadeCallback(config=self.masks, fraction=self.fade))
        return callbacks

    def _model(self) -> Any:
        assert self.net is not None, "configure_model() builds it"
        return self.net

    def check_vocabulary(self, size: int) -> None:
        """Fail before the first step, not inside an embedding, if vocabulary and model do not fit."""
        rows = self._model().config.vocab_size
        if size > rows:
            raise ValueError(
                f"the tokenizer has {size} tokens, the model's vocabulary {rows}: "
                "data.tokenizer and model.weights do not belong together"
            )

    def on_train_end(self) -> None:
        """Check that the masks of a pretraining checkpoint are those of the end."""
        pretrained = is_checkpoint(self.weights) and not is_fine_tuned(str(self.weights))
        if pretrained and self.trainer.is_global_zero and sparse_layers(self):
            say_masks_are_kept(self._model(), str(self.weights))

    # ------------------------------------------------------------------------------------------------ optimizer

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a linear warm-up and decay; adapters are a group of their own."""
        groups = parameter_groups(self.named_parameters(), self.decay)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, eps=1e-6)
        rate = linear_schedule(self.trainer.estimated_stepping_batches, self.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------------------------------------ saving

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the architecture: a checkpoint is enough to rebuild the model, wherever the weights came from."""
        super().on_save_checkpoint(checkpoint)
        saved, net = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY], self._model()
        own = isinstance(net.config, BertConfig)
        saved["bert"] = net.config.to_dict() if own else None
        saved["encoder"] = None if own else json.loads(net.config.to_json_string(use_diff=False))
        # A plain mapping: the file then loads with weights_only=True.
        saved["teacher"] = None if self.teacher is None else asdict(self.teacher)

    def export(self, folder: str) -> None:
        """Write a dense Hugging Face model: zeros in place of pruned weights, awake adapters added in."""
        net = self._model()
        if not isinstance(net, Encoder):
            save_pretrained(net, folder, dense_state_dict(net))
            return
        dense = self.new_net(net.config.to_dict())
        dense.load_state_dict(dense_state_dict(net))
        dense.model.save_pretrained(folder)  # type: ignore[union-attr,operator]


def is_checkpoint(source: str | None) -> bool:
    """Whether weights come from a checkpoint: of pretraining, whose masks are kept, or of a dense run of this recipe."""
    return source is not None and source.endswith(".ckpt")


def architecture_of(settings: Mapping[str, Any]) -> Architecture:
    """The architecture that a module's saved settings name."""
    if settings.get("encoder") is not None:
        return dict(settings["encoder"])
    return BertConfig.from_dict(settings["bert"])


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], decay: Mapping[str, float]
) -> list[dict[str, Any]]:
    """``weights``, ``no_decay`` (biases and norms) and ``adapters``, by their names, each with its decay."""
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "no_decay": [], "adapters": []}
    for name, parameter in parameters:
        if "adapter_" in name:
            groups["adapters"].append(parameter)
        else:
            groups["weights" if len(full_shape(parameter)) > 1 else "no_decay"].append(parameter)
    return [{"params": ps, "weight_decay": decay[key], "name": key} for key, ps in groups.items() if ps]


def linear_schedule(total: int | float, warmup: float) -> Callable[[int], float]:
    """The rate as a share of its peak, by step: up in the first ``warmup`` of all steps, then down to 0."""
    rising = round(warmup * total)

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return max(0.0, (total - step) / max(1, total - rising))

    return rate
