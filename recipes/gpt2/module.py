"""GPT-2 pretraining as a LightningModule: dense, 2:4 sparse, or by one of the methods that is compared with."""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from recipes.compiling import compile_blocks, compiled, is_spread, release_blocks
from recipes.gpt2.optimizer import Schedule, parameter_groups, rate_schedule, refuse_idle
from recipes.gpt2.sampling import continue_text
from slope_pl import SLoPeConfig, SLoPeLightningModule, dense_state_dict
from slope_pl.baselines import (
    FSTCallback,
    FSTConfig,
    SRSTECallback,
    SRSTEConfig,
    mask_layers,
    masked_layers,
    unmask_layers,
)
from slope_pl.data import TextDataModule
from slope_pl.models import GPT2, GPT2Config, load_gpt2, load_gpt2_config, save_gpt2
from slope_pl.nn import was_densified

Batch = dict[str, Tensor]
Size = Literal["small", "medium", "large", "xl"]
TOKENIZER_KEY = "tokenizer"
"""Where a checkpoint names the tokeniser of its text."""
METHODS = {"dense": "dense", "slope": "2:4 sparse", "srste": "Extended SR-STE", "fst": "FST"}
"""Option -> what a model trained with it is called."""

# Rows of logits at a time in eager mode: 8,192 x 50,304 in float32 are 1.6 GB, and the loss needs them three times.
_ROWS = 8192


def next_token_loss(
    net: GPT2,
    input_ids: Tensor,
    targets: Tensor,
    rows: int | None = _ROWS,
    head_loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Mean cross entropy of ``targets``, in float32 whatever the dtype of the logits.

    Args:
        net: the model.
        input_ids: int64 ``(B, T)``.
        targets: int64 ``(B, T)``, the token after each.
        rows: how many of the ``B * T`` tokens have their logits in memory at a time; more are made in pieces, and again in
            the backward pass. None for all: under torch.compile, which never stores them in float32.
        head_loss: what takes the head, its input and targets, and gives the summed loss; eager by default.

    Returns:
        A scalar, in nats.
    """
    hidden, wanted = net.hidden_states(input_ids).flatten(0, 1), targets.flatten()
    if head_loss is None:
        head_loss = _head_loss
    if rows is None or len(wanted) <= rows:
        return head_loss(net.lm_head, hidden, wanted) / len(wanted)
    parts = [
        recompute(head_loss, net.lm_head, h, t, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.split(rows), wanted.split(rows), strict=True)
    ]
    return torch.stack(parts).sum() / len(wanted)


def _head_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


class GPT2Pretraining(SLoPeLightningModule):
    """GPT-2 that learns to predict the next token of packed text (Radford et al. 2019).

    Args:
        learning_rate: peak of the schedule. No default: each method has its own best one.
        size: widths and depth of a published GPT-2; null takes those of ``gpt2``.
        gpt2: the architecture; ``size`` replaces its n_embd, n_layer and n_head. Null is the published one, or that of the
            weights.
        weights: pretrained weights to start from: a folder with config.json and model.safetensors, or a hub id such as
            openai-community/gpt2. Null starts from random weights.
        slope: how the model is made sparse; null, without srste and fst either, trains it dense.
        srste: train by Extended SR-STE instead, simulated on dense products.
        fst: train by FST instead, simulated on dense products.
        schedule: how the rate falls after the warm-up, linear or cosine.
        warmup: share of all steps (below 1) or number of steps (an integer) in which the rate rises from 0.
        min_rate_share: the share of the peak that the rate falls to.
        weight_decay: of matrices and embeddings; biases and norms have none.
        values_weight_decay: of the kept values of sparse weights; null is weight_decay.
        adapter_weight_decay: of the low-rank adapters (the published BERT runs use 1e-4).
        values_learning_rate_scale: factor on the rate of the kept values of sparse weights.
        adapter_learning_rate_scale: factor on the rate of the adapters.
        betas: of AdamW.
        epsilon: of AdamW.
        compile: torch.compile the training step, on CUDA, block by block where weights are sharded; the first step then takes
            a minute or so.
        gradient_checkpointing: keep only the layers' inputs for the backward pass: less memory, a third more time.
        sample_prompt: what the sample at the end of training continues; "" begins a new document.
        sample_tokens: its length; 0 for no sample.
    """

    def __init__(
        self,
        learning_rate: float,
        size: Size | None = None,
        gpt2: GPT2Config | None = None,
        weights: str | None = None,
        slope: SLoPeConfig | None = None,
        srste: SRSTEConfig | None = None,
        fst: FSTConfig | None = None,
        schedule: Schedule = "linear",
        warmup: int | float = 0.01,
        min_rate_share: float = 0.0,
        weight_decay: float = 0.1,
        values_weight_decay: float | None = None,
        adapter_weight_decay: float = 1e-4,
        values_learning_rate_scale: float = 1.0,
        adapter_learning_rate_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
        compile: bool = False,
        gradient_checkpointing: bool = False,
        sample_prompt: str = "",
        sample_tokens: int = 100,
    ) -> None:
        super().__init__(slope=slope)
        for name, value, good, expected in (
            ("learning_rate", learning_rate, 0 < learning_rate < 1, "a number above 0 and below 1"),
            ("warmup", warmup, isinstance(warmup, int) or warmup < 1, "a share below 1, or an integer number of steps"),
            ("warmup", warmup, warmup >= 0, "0 or more"),
            ("min_rate_share", min_rate_share, 0 <= min_rate_share <= 1, "a share from 0 to 1"),
            ("weight_decay", weight_decay, 0 <= weight_decay < 1, "0 or more, and below 1"),
            ("values_weight_decay", values_weight_decay, 0 <= (values_weight_decay or 0) < 1, "null, or 0 to below 1"),
            ("adapter_weight_decay", adapter_weight_decay, 0 <= adapter_weight_decay < 1, "0 or more, and below 1"),
            ("values_learning_rate_scale", values_learning_rate_scale, values_learning_rate_scale > 0, "above 0"),
            ("adapter_learning_rate_scale", adapter_learning_rate_scale, adapter_learning_rate_scale > 0, "above 0"),
            ("betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers from 0 to below 1"),
            ("epsilon", epsilon, epsilon > 0, "a number above 0"),
            ("schedule", schedule, schedule in ("linear", "cosine"), "linear or cosine"),
            ("sample_tokens", sample_tokens, sample_tokens >= 0, "0 (no sample) or more"),
        ):
            if not good:
                raise ValueError(f"{name}={value}: {expected} is expected")
        methods = [name for name, given in (("slope", slope), ("srste", srste), ("fst", fst)) if given is not None]
        if len(methods) > 1:
            raise ValueError(
                f"{' and '.join(methods)} are both set: a model is trained by one method; set the other to null"
            )
        self.baseline: SRSTEConfig | FSTConfig | None = None
        if methods in (["srste"], ["fst"]):
            self.baseline = SRSTEConfig.coerce(srste) if srste is not None else FSTConfig.coerce(fst)
        self.method = METHODS[methods[0] if methods else "dense"]
        self.learning_rate, self.schedule = learning_rate, schedule
        self.warmup, self.min_rate_share = warmup, min_rate_share
        # A checkpoint, read without the command line, has mappings. They are no part of the types above, for then the
        # command line would take a misspelt field as one.
        self.architecture = _architecture(size, GPT2Config(**gpt2) if isinstance(gpt2, Mapping) else gpt2)
        self.weights, self.gradient_checkpointing = weights, gradient_checkpointing
        kept = weight_decay if values_weight_decay is None else values_weight_decay
        self.decay = {"weights": weight_decay, "values": kept, "adapters": adapter_weight_decay}
        self.scale = {"values": values_learning_rate_scale, "adapters": adapter_learning_rate_scale}
        self.levers = (  # name, value, default, the kind of parameters that it is about
            ("values_learning_rate_scale", values_learning_rate_scale, 1.0, "values"),
            ("values_weight_decay", values_weight_decay, None, "values"),
            ("adapter_learning_rate_scale", adapter_learning_rate_scale, 1.0, "adapters"),
            ("adapter_weight_decay", adapter_weight_decay, 1e-4, "adapters"),
        )
        self.betas, self.epsilon = betas, epsilon
        self.wants_compile = compile
        self.sample_prompt, self.sample_tokens = sample_prompt, sample_tokens
        self.restores_checkpoint = False
        self.net: GPT2 | None = None
        self._compiled: Callable[..., Tensor] | None = None
        self._val_loss = self._val_tokens = torch.zeros(())
        self.save_hyperparameters()

    # ------------------------------------------------------------------------------------------------ model

    def configure_model(self) -> None:
        """Build the net, load pretrained weights, then make it sparse: masks are chosen from what was loaded."""
        if self.net is None:
            self.net = self._build()
        super().configure_model()
        if self.baseline is not None and not was_densified(self):
            mask_layers(self, self.baseline)

    def configure_callbacks(self) -> list[pl.Callback]:
        """The callback of the method, unless the Trainer has one."""
        callbacks = super().configure_callbacks()
        kind = {SRSTEConfig: SRSTECallback, FSTConfig: FSTCallback}.get(type(self.baseline))
        if kind is not None and not any(isinstance(cb, kind) for cb in self.trainer.callbacks):  # type: ignore[attr-defined]
            callbacks.append(kind(self.baseline))
        return callbacks

    def _build(self) -> GPT2:
        config = self.architecture
        if config is None:
            config = GPT2Config.small() if self.weights is None else load_gpt2_config(self.weights)
        net = GPT2(config, gradient_checkpointing=self.gradient_checkpointing)
        # A checkpoint that is about to be restored brings its own weights, and so does load_from_checkpoint.
        if self.weights is not None and self._trainer is not None and not self.restores_checkpoint:
            load_gpt2(net, self.weights)
            rank_zero_info(f"Weights from {self.weights}.")
        return net

    def _model(self) -> GPT2:
        assert self.net is not None, "configure_model() builds it"
        return self.net

    def _data(self) -> TextDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits ``(B, T, vocab)`` of token ids ``(B, T)``."""
        return self._model()(input_ids)

    def on_fit_start(self) -> None:
        """Fail before the first step where the settings do not fit each other."""
        self._check_data()
        self._check_last_validation()
        if self.wants_compile and not self._compiles():
            rank_zero_info(f"compile=True has no effect on {self.device.type}: the step is compiled on CUDA alone.")

    def on_validation_start(self) -> None:
        """Likewise for ``validate``."""
        self._check_data()

    def _check_data(self) -> None:
        config, data = self._model().config, self._data()
        if data.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {data.vocab_size} tokens, the model's vocabulary {config.vocab_size}: set "
                f"model.gpt2.vocab_size to {data.vocab_size} or more, or data.tokenizer to the model's own"
            )
        if data.context > config.n_positions:
            raise ValueError(
                f"data.context={data.context} tokens, but the model has positions for {config.n_positions}: lower it, or "
                f"raise model.gpt2.n_positions"
            )

    def _check_last_validation(self) -> None:
        """The final loss is what a run is for; Lightning validates after each interval, not at the end."""
        trainer = self.trainer
        batches, every = trainer.max_steps * trainer.accumulate_grad_batches, trainer.val_check_interval
        validates = (
            trainer.check_val_every_n_epoch is None and trainer.limit_val_batches and len(self._data().val_windows)
        )
        if batches > 0 and validates and isinstance(every, int) and batches % every:
            raise ValueError(
                f"val_check_interval={every} batches does not divide the {batches} batches of this run (max_steps x "
                f"accumulate_grad_batches): the last step would not be validated. Set trainer.val_check_interval={batches}, "
                "or another divisor"
            )

    # ------------------------------------------------------------------------------------------------ steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross entropy of the next tokens."""
        loss = self._training_loss()(self._model(), batch["input_ids"], batch["targets"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _training_loss(self) -> Callable[..., Tensor]:
        if not self._compiles():
            return next_token_loss
        if self._compiled is None and is_spread(self._model()):
            compile_blocks(self._model())
            self._compiled = functools.partial(next_token_loss, rows=None, head_loss=compiled(_head_loss))
        elif self._compiled is None:
            # The loss with the net: the logits' conversion to float32 is then part of the loss kernels.
            self._compiled = compiled(_whole_loss)
        return self._compiled

    def _compiles(self) -> bool:
        return self.wants_compile and self.device.type == "cuda"

    def on_validation_epoch_start(self) -> None:
        """Start a fresh mean over the held-out tokens."""
        self._val_loss = self._val_tokens = torch.zeros((), dtype=torch.float64, device="cpu")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the loss of every token: the last batch may be smaller. Never compiled, for it would be again."""
        loss, count = next_token_loss(self._model(), batch["input_ids"], batch["targets"]), batch["targets"].numel()
        self._val_loss = self._val_loss.to(loss.device) + loss.double() * count
        self._val_tokens = self._val_tokens + count

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss (nats a token), its exponential, and the number of tokens."""
        strategy = self.trainer.strategy
        total = strategy.reduce(self._val_loss, reduce_op="sum")
        tokens = strategy.reduce(self._val_tokens.to(self._val_loss.device), reduce_op="sum")
        loss = torch.as_tensor(total / tokens)
        found = {"val/loss": loss, "val/perplexity": loss.exp(), "val/tokens": torch.as_tensor(tokens)}
        # The ranks have the same numbers by now; without sync_dist Lightning would warn that they may not.
        self.log_dict({key: value.float() for key, value in found.items()}, prog_bar=True, sync_dist=True)

    def sample(self) -> str | None:
        """``sample_prompt`` as the model continues it, on this rank alone.

        None if ``sample_tokens`` is 0, or where one rank has no whole model.
        """
        strategy = self.trainer.strategy
        whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
        if not self.sample_tokens or not whole:
            return None
        data = self._data()
        with self.trainer.precision_plugin.forward_context():
            (text,) = continue_text(
                self._model(), data.load_tokenizer(), [self.sample_prompt], self.sample_tokens, window=data.context
            )
        return self.sample_prompt + text

    def teardown(self, stage: str) -> None:
        """Let go of what was compiled."""
        self._compiled = None
        if self.net is not None:
            release_blocks(self.net)

    # ------------------------------------------------------------------------------------------------ optimizer

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a warm-up and decay; kept values and adapters are groups of their own."""
        total = self.trainer.estimated_stepping_batches
        if not 0 < total < math.inf:
            raise ValueError(
                "the number of steps is missing, and the schedule of the rate needs it: set trainer.max_steps"
            )
        groups = parameter_groups(self, self.learning_rate, decay=self.decay, scale=self.scale)
        refuse_idle(self.levers, groups)
        optimizer = torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=self.betas, eps=self.epsilon, fused=self._fused()
        )
        share = rate_schedule(self.schedule, int(total), self.warmup, self.min_rate_share)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _fused(self) -> bool:
        # With a gradient scaler, a fused optimizer unscales by itself, after the clipping.
        return self.device.type == "cuda" and self.trainer.precision != "16-mixed"

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does; it refuses fused optimizers under bf16 too, where there is no scaler to clash with."""
        by_hand = self._fused() and not isinstance(
            self.trainer.strategy, DeepSpeedStrategy
        )  # which clips in its engine
        if not (by_hand and gradient_clip_val and gradient_clip_algorithm in (None, "norm")):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    # ------------------------------------------------------------------------------------------------ saving

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add architecture and tokeniser: a checkpoint is enough to rebuild the model and to write text with it."""
        super().on_save_checkpoint(checkpoint)
        hparams = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        hparams |= {"gpt2": asdict(self._model().config), "size": None}
        for name in ("srste", "fst"):
            if hparams[name] is not None and self.baseline is not None:
                hparams[name] = self.baseline.to_dict()  # no class: the file then loads with weights_only=True
        checkpoint[TOKENIZER_KEY] = {"source": self._data().tokenizer, "end_of_text": self._data().end_of_text}

    def export(self, folder: str) -> None:
        """Write a dense Hugging Face model: zeros in place of pruned weights, awake adapters added in."""
        net = self._model()
        if masked_layers(net):
            net = copy.deepcopy(net)
            unmask_layers(net)
        save_gpt2(net, folder, dense_state_dict(net))


def _architecture(size: Size | None, config: GPT2Config | None) -> GPT2Config | None:
    if size is None:
        return config
    base, preset = config or GPT2Config(), getattr(GPT2Config, size)()
    own = {name: getattr(preset, name) for name in ("n_embd", "n_layer", "n_head")}
    if lost := [f"{k}={getattr(base, k)}" for k in own if getattr(base, k) not in (own[k], getattr(GPT2Config, k))]:
        rank_zero_info(f"gpt2: {', '.join(lost)} has no effect: size={size} has {own}; set size to null for your own")
    return replace(base, **own)


def _whole_loss(net: GPT2, input_ids: Tensor, targets: Tensor) -> Tensor:
    return next_token_loss(net, input_ids, targets, rows=None)
