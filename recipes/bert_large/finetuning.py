"""What fine-tuning BERT on a task has in common: where weights come from, AdamW, what a checkpoint holds, the export."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from recipes.bert_large.pretrain_checkpoint import (
    check_masks,
    load_pretraining_checkpoint,
    read_pretraining_checkpoint,
)
from slope_pl import SLoPeLightningModule, dense_state_dict, sparse_layers
from slope_pl.models import (
    BertConfig,
    PretrainedUnavailableError,
    load_config,
    load_pretrained,
    save_pretrained,
)


class BertFineTuning(SLoPeLightningModule):
    """Base of the recipes' modules. A subclass calls :meth:`take` in its constructor and has :meth:`new_net`."""

    net: Any

    def take(
        self,
        *,
        weights: str | None,
        require_weights: bool,
        bert: BertConfig | dict[str, Any] | None,
        learning_rate: float,
        weight_decay: float,
        adapter_weight_decay: float,
        warmup: float,
    ) -> None:
        """Check and keep the settings that all have.

        Raises:
            ValueError: if one is out of range.
        """
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
        self.decay = {"weights": weight_decay, "no_decay": 0.0, "adapters": adapter_weight_decay}
        self.restores_checkpoint = False
        self.net = None

    # ------------------------------------------------------------------------------------------------ model

    def new_net(self, config: BertConfig) -> nn.Module:
        """A dense net with the task's head."""
        raise TypeError(f"{type(self).__name__} has no new_net(config)")

    def read_weights(self, net: nn.Module, source: str) -> str:
        """Read weights into a dense net; returns a line for the log.

        A sparse pretraining checkpoint makes the net sparse, by its own masks.

        Raises:
            PretrainedMismatchError: if shapes differ.
            CheckpointError: if a pretraining checkpoint does not fit the net or the method.
        """
        if is_checkpoint(source):
            return load_pretraining_checkpoint(net, source, self.slope_config).summary()
        return f"Weights from {source}: {load_pretrained(net, source).summary()}."  # type: ignore[arg-type]

    def configure_model(self) -> None:
        """Build the net, load pretrained weights, then make it sparse: masks are chosen from what was loaded."""
        if self.net is None:
            self.net = self._build()
        super().configure_model()

    def _build(self) -> nn.Module:
        # A checkpoint that is about to be restored brings its own weights, and so does load_from_checkpoint.
        fresh = self._trainer is not None and not self.restores_checkpoint
        if self.weights is not None:
            try:
                net = self.new_net(self.bert or architecture(self.weights))
                if fresh:
                    rank_zero_info(self.read_weights(net, self.weights))
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
        return self.new_net(self.bert or BertConfig.large())

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
        if is_checkpoint(self.weights) and self.trainer.is_global_zero and sparse_layers(self):
            layers = check_masks(self._model(), str(self.weights))
            print(f"Masks of {layers} layers are still those of {self.weights}.", flush=True)

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
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["bert"] = self._model().config.to_dict()

    def export(self, folder: str) -> None:
        """Write a dense Hugging Face model: zeros in place of pruned weights, awake adapters added in."""
        net = self._model()
        save_pretrained(net, folder, dense_state_dict(net))


def is_checkpoint(source: str | None) -> bool:
    """Whether weights come from a checkpoint of recipes.bert_large.pretrain, whose masks are then kept."""
    return source is not None and source.endswith(".ckpt")


def architecture(source: str) -> BertConfig:
    """The architecture of weights: a folder with config.json, a hub id, or a .ckpt of recipes.bert_large.pretrain.

    Raises:
        PretrainedUnavailableError: the hub does not deliver.
        PretrainedFilesError: the folder lacks files.
        CheckpointError: the .ckpt is of something else.
    """
    return read_pretraining_checkpoint(source).bert if is_checkpoint(source) else load_config(source)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], decay: Mapping[str, float]
) -> list[dict[str, Any]]:
    """``weights``, ``no_decay`` (biases and norms) and ``adapters``, by their names, each with its decay."""
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "no_decay": [], "adapters": []}
    for name, parameter in parameters:
        if "adapter_" in name:
            groups["adapters"].append(parameter)
        else:
            groups["weights" if parameter.dim() > 1 else "no_decay"].append(parameter)
    return [{"params": ps, "weight_decay": decay[key], "name": key} for key, ps in groups.items() if ps]


def linear_schedule(total: int | float, warmup: float) -> Callable[[int], float]:
    """The rate as a share of its peak, by step: up in the first ``warmup`` of all steps, then down to 0."""
    rising = round(warmup * total)

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return max(0.0, (total - step) / max(1, total - rising))

    return rate
