"""Distillation: a sparse student learns from a dense teacher's outputs, or from its hidden states, beside the labels.

Outputs: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2: cross-entropy
with softened outputs, times the square of the temperature, so that its gradient keeps its size. Hidden states: Kurtic et
al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", arXiv 2310.06927, section 3 (SquareHead): the
squared difference over the teacher's square, layer by layer. Used in a module's ``training_step``::

    def configure_model(self):
        build or load self.net
        self.distillation = Distillation(frozen_copy(self.net), "classification", temperature=2.0, weight=0.5)
        super().configure_model()                     # makes self.net sparse

    def training_step(self, batch, batch_idx):
        inputs = batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
        logits = self.net(*inputs).logits
        return self.distillation(F.cross_entropy(logits, batch["labels"]), logits, inputs)

A teacher is worth having once it knows the task: a copy of a pretrained net with a fresh head teaches noise. Train the
dense model first, and give its checkpoint to :func:`load_teacher`. Hidden states need no task: there the teacher is the
model as it was before it was pruned, and any text will do.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slope_pl.checkpoint import read_checkpoint
from slope_pl.errors import CheckpointError, ConfigError, ConversionError
from slope_pl.nn import sparse_layers

Task = Literal["classification", "question_answering", "regression", "hidden_states"]


class Distillation:
    """The loss ``(1 - weight) * task + weight * distance(student, teacher)``.

    No ``nn.Module``: as an attribute of a LightningModule, the teacher is no part of it: not in its state dict or
    checkpoints, not in optimizers, not wrapped by DDP, not switched to training mode. It goes to the device of the
    student's outputs at the first call, and to their dtype where no autocast is on. Copies of the holder (weight
    averaging) share it.

    Memory on every rank: the teacher's parameters once (a dense copy of a 2:4 model in fp32 is twice the student's
    values), and the activations of one forward without a graph; no gradients, no optimizer state. Time: one dense
    forward a step.

    Args:
        teacher: takes the same inputs and gives the same kind of outputs; frozen and put into evaluation mode here.
        task: ``classification``: KL(teacher || student) of the logits ``(B, C)``. ``question_answering``: the mean of
            those of the start and end logits ``(B, T)`` over positions. ``regression``: mean squared difference of the
            outputs. ``hidden_states``: the mean over layers of ``|student - teacher|^2 / |teacher|^2``; the first state,
            that of the embeddings, is left out, and ``.pooler_output`` is one more where both have it.
        temperature: divides both logits; above 1 softens. Of no effect without logits (regression, hidden states), where it
            must stay 1.
        weight: of the teacher, from 0 (excluded) to 1 (labels are ignored).

    Raises:
        ConfigError: for a value out of range.
    """

    def __init__(self, teacher: nn.Module, task: Task, temperature: float = 1.0, weight: float = 0.5) -> None:
        if task not in get_args(Task):
            raise ConfigError(f"task={task!r} is unknown; choose one of {', '.join(get_args(Task))}")
        if not _is_number(temperature) or not 0 < temperature < float("inf"):
            raise ConfigError(f"temperature={temperature!r}: a number above 0 is expected")
        if task in ("regression", "hidden_states") and temperature != 1:
            raise ConfigError(f"temperature={temperature!r} has no effect in {task.replace('_', ' ')}; leave it out")
        if not _is_number(weight) or not 0 < weight <= 1:
            raise ConfigError(
                f"weight={weight!r}: above 0 and at most 1 is expected; without a teacher, leave distillation out"
            )
        self.teacher = teacher.requires_grad_(False).eval()
        self.task, self.temperature, self.weight = task, float(temperature), float(weight)

    def __call__(
        self, task_loss: Tensor, student: Any, inputs: Mapping[str, Any] | tuple[Any, ...], mask: Tensor | None = None
    ) -> Tensor:
        """The loss to train on.

        Args:
            task_loss: scalar, of the labels.
            student: outputs: logits ``(B, C)``, or ``(B,)`` or ``(B, 1)`` in regression, as they are or as ``.logits``;
                for questions a pair of start and end logits ``(B, T)``, or ``.start_logits`` and ``.end_logits``; hidden
                states as ``.hidden_states`` or a sequence of them, each ``(B, T, hidden)``.
            inputs: of the student's forward, for the teacher's.
            mask: ``(B, T)``, for questions: 0 for positions that are no answer (padding), which neither side's softmax
                sees; for hidden states: 0 for padding, which does not count.

        Returns:
            scalar.

        Raises:
            ValueError: if outputs of student and teacher differ in shape, or a mask does not fit.
        """
        distance = self.distance(student, self.outputs(inputs, like=self._tensors(student)[0]), mask)
        return (1 - self.weight) * task_loss + self.weight * distance

    @torch.no_grad()
    def outputs(self, inputs: Mapping[str, Any] | tuple[Any, ...], like: Tensor | None = None) -> Any:
        """The teacher's outputs, without gradients; the teacher follows device and dtype of ``like``."""
        if like is not None:
            own = next((p for p in self.teacher.parameters() if p.is_floating_point()), None)
            dtype = None if own is None or torch.is_autocast_enabled(like.device.type) else like.dtype
            if own is not None and (own.device != like.device or dtype not in (None, own.dtype)):
                self.teacher.to(device=like.device, dtype=dtype)
        return self.teacher(**inputs) if isinstance(inputs, Mapping) else self.teacher(*inputs)

    def distance(self, student: Any, teacher: Any, mask: Tensor | None = None) -> Tensor:
        """How far the student's outputs are from the teacher's, a scalar in float32: what ``weight`` multiplies."""
        mine, theirs = self._tensors(student), self._tensors(teacher)
        states = self.task == "hidden_states"
        if len(mine) != len(theirs):
            raise ValueError(
                f"the student has {len(mine)} hidden states, the teacher {len(theirs)}; a teacher as deep is expected"
            )
        for a, b in zip(mine, theirs, strict=True):
            if a.shape != b.shape:
                fix = "a teacher as wide is expected" if states else "give both one head"
                raise ValueError(f"the student's outputs are {tuple(a.shape)}, the teacher's {tuple(b.shape)}; {fix}")
        if mask is not None:
            places = mine[0].shape[:-1] if states else mine[0].shape
            if self.task not in ("question_answering", "hidden_states") or mask.shape != places:
                raise ValueError(
                    f"mask of shape {tuple(mask.shape)} with outputs {tuple(mine[0].shape)} and task {self.task!r}: a mask "
                    "belongs to the positions of question answering, or of hidden states"
                )
        if states:
            errors = [_relative(a, b, mask) for a, b in zip(mine, theirs, strict=True)]
            pooled = [getattr(outputs, "pooler_output", None) for outputs in (student, teacher)]
            if pooled[0] is not None and pooled[1] is not None:
                errors.append(_relative(pooled[0], pooled[1], None))
            return torch.stack(errors).mean()
        if self.task == "regression":
            return F.mse_loss(mine[0].float(), theirs[0].float())
        losses = [self._divergence(a, b, mask) for a, b in zip(mine, theirs, strict=True)]
        return torch.stack(losses).mean()

    def _divergence(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """``T^2 KL(teacher || student)`` a row, mean over rows."""
        log_q, log_p = (self._log_softmax(logits, mask) for logits in (student, teacher))
        rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return rows.mean() * self.temperature**2

    def _log_softmax(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        logits = logits.float() / self.temperature
        if mask is not None:
            # Not -inf, of which the divergence would be NaN; half of the range, so that differences stay finite.
            logits = logits.masked_fill(~mask.bool(), torch.finfo(torch.float32).min / 2)
        return logits.log_softmax(-1)

    def _tensors(self, outputs: Any) -> tuple[Tensor, ...]:
        if self.task == "question_answering":
            if hasattr(outputs, "start_logits"):
                return outputs.start_logits, outputs.end_logits
            start, end = outputs
            return start, end
        if self.task == "hidden_states":
            # A named tuple without that field is outputs of another kind, and no sequence of states.
            sequence = type(outputs) in (list, tuple)
            found = outputs if sequence else getattr(outputs, "hidden_states", None)
            if found is None or isinstance(found, Tensor) or len(found) < 2:
                raise ValueError(
                    "no hidden states of layers among the outputs: ask the model for them (output_hidden_states=True)"
                )
            return tuple(found[1:])
        return (getattr(outputs, "logits", outputs),)

    def teacher_bytes(self) -> int:
        """Bytes of the teacher's parameters and buffers."""
        return sum(t.numel() * t.element_size() for t in (*self.teacher.parameters(), *self.teacher.buffers()))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distillation":
        return self


def _relative(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """``|student - teacher|^2 / |teacher|^2`` in float32, of ``(B, T, hidden)`` over the positions of ``mask``."""
    student, teacher = student.float(), teacher.float()
    if mask is not None:
        kept = mask.bool()[..., None]
        # Before the difference is squared: what stands in padding may be anything.
        student, teacher = student.masked_fill(~kept, 0.0), teacher.masked_fill(~kept, 0.0)
    tiny = torch.finfo(torch.float32).tiny
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=tiny)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of a dense model, frozen and in evaluation mode; to be made before conversion.

    Raises:
        ConversionError: if the model is sparse already.
    """
    if sparse_layers(model):
        raise ConversionError("the model is sparse already: make the teacher's copy before sparsify")
    return copy.deepcopy(model).requires_grad_(False).eval()


def load_teacher(model: nn.Module, checkpoint: str | Path, prefix: str = "net.") -> nn.Module:
    """Load the weights of a dense Lightning checkpoint into a net, frozen and in evaluation mode.

    Args:
        model: a dense net, changed in place; its head included, every tensor must be in the checkpoint.
        checkpoint: of any strategy.
        prefix: of the net's names in the checkpoint's LightningModule.

    Returns:
        the model.

    Raises:
        CheckpointError: if the file does not exist or does not hold this net, dense.
    """
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path} is not there: the checkpoint of the teacher is expected")
    state = read_checkpoint(path, optimizer=False)["state_dict"]
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is not a dense checkpoint of this net under {prefix!r}: {error}") from error
    return model.requires_grad_(False).eval()
