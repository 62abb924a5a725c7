"""Where a sparse fine-tuning from a dense model may start: its teacher, and checkpoints of the recipe's own dense runs.

--model.teacher.checkpoint DENSE.ckpt       the outputs of the dense sibling are learnt beside the labels
--model.weights DENSE.ckpt                  its trained weights are pruned, instead of pretrained ones
--model.fade 0.5                            first stage of a gradual start: dense, entries to be pruned fade to zero
--model.weights FADED.ckpt                  second stage: sparse, by the masks that the first has faded to
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from recipes.checkpoints import read_checkpoint
from slope_pl import CheckpointError, ConfigError, SLoPeConfig
from slope_pl.checkpoint import CHECKPOINT_KEY
from slope_pl.lightning import faded_masks

_PREFIX = "net."


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A dense teacher, see :class:`slope_pl.lightning.Distillation`.

    Args:
        checkpoint: of the dense sibling's run, on the same task and vocabulary; the architecture may be another.
        weight: of the teacher in the loss, above 0 to 1 (labels are ignored).
        temperature: divides both logits; of no effect for STS-B, where it must stay 1.
        hidden_weight: of the distance to the teacher's hidden states (the share of their squares that is missed, mean over
            layers: 0.02 to 0.03 after a recovery, so 16 makes as much of it as of a loss of 0.4), which is added to the loss;
            0 leaves it out. The teacher must then be as deep and as wide as the model.
    """

    checkpoint: str
    weight: float = 0.5
    temperature: float = 1.0
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        number = isinstance(self.hidden_weight, int | float) and not isinstance(self.hidden_weight, bool)
        if not number or not 0 <= self.hidden_weight < math.inf:
            raise ConfigError(f"model.teacher.hidden_weight={self.hidden_weight!r}: a number of 0 or more is expected")


@dataclass(frozen=True)
class FineTuned:
    """A checkpoint of a fine-tuning recipe.

    Attributes:
        path: the file.
        settings: the module's, as saved.
        state: the net's tensors by its own names, mapped from the file.
        masks: those that a first stage faded to, by the module's names; None of another run.
        sparse: whether it is of a sparse model.
    """

    path: Path
    settings: Mapping[str, Any]
    state: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] | None
    sparse: bool


def is_fine_tuned(path: str) -> bool:
    """Whether a file is a checkpoint of a fine-tuning recipe, and not of pretraining; False if it cannot be read."""
    try:
        names = read_checkpoint(path, verify=False).get("state_dict", {})
    except CheckpointError:
        return False
    return any(
        name.startswith((f"{_PREFIX}qa_outputs.", f"{_PREFIX}classifier.", f"{_PREFIX}model.")) for name in names
    )


def read_fine_tuned(path: str) -> FineTuned:
    """Open a checkpoint of a fine-tuning recipe; tensors are read when they are used.

    Raises:
        CheckpointError: no such file, not such a checkpoint, or a first stage that has not faded to the end.
    """
    file = Path(path).expanduser()
    content = read_checkpoint(file, "a checkpoint of this recipe")
    state = {name.removeprefix(_PREFIX): t for name, t in content["state_dict"].items() if name.startswith(_PREFIX)}
    settings = content.get("hyper_parameters", {})
    if not state or "learning_rate" not in settings:
        raise CheckpointError(
            f"{file} is of another model ({', '.join(list(content['state_dict'])[:3])}, ...); expected a checkpoint of this "
            "recipe"
        )
    began = (content.get("callbacks", {}).get("FadeCallback") or {}).get("masks")
    return FineTuned(file, settings, state, faded_masks(content) if began else None, CHECKPOINT_KEY in content)


def load_dense(net: nn.Module, saved: FineTuned, task: str | None, what: str) -> None:
    """Load all of a dense checkpoint, its head included, into a dense net.

    Args:
        net: changed in place; not after an error.
        saved: the checkpoint.
        task: of the run; None where a recipe has one task.
        what: the setting, for messages.

    Raises:
        CheckpointError: it is sparse, of another task, or of another architecture.
    """
    if saved.settings.get("task") != task:
        raise CheckpointError(
            f"{what} is {saved.path}, a checkpoint of {saved.settings.get('task', 'another recipe')}; this run's task is "
            f"{task or 'SQuAD'}: give one of the same task"
        )
    if saved.sparse:
        raise CheckpointError(
            f"{what} is {saved.path}, of a 2:4 sparse model; expected a dense one. A sparse run is resumed with --ckpt_path"
        )
    own = {name: tensor.shape for name, tensor in net.state_dict().items()}
    other = [name for name in own if name not in saved.state or saved.state[name].shape != own[name]]
    other += [name for name in saved.state if name not in own]
    if other:
        raise CheckpointError(
            f"{what} is {saved.path}, of another architecture: {len(other)} tensors differ ({', '.join(other[:3])}). Leave "
            "model.bert out, or give it the checkpoint's values"
        )
    net.load_state_dict(dict(saved.state))


def check_choices(fade: float | None, slope: SLoPeConfig | None, weights: str | None, faded: bool) -> None:
    """Refuse what contradicts itself, or would have no effect.

    Args:
        fade: share of the steps of a first stage; None in any other run.
        slope: as given.
        weights: as given.
        faded: whether these are of a first stage.

    Raises:
        ConfigError: naming the setting.
    """
    if fade is not None:
        if isinstance(fade, bool) or not 0 < fade <= 1:
            raise ConfigError(f"fade={fade!r}: a share of the steps is expected, above 0 and at most 1")
        if slope is None:
            raise ConfigError(f"fade={fade} has no effect on a dense model: give slope, whose masks are faded to")
        if slope.has_adapters:
            raise ConfigError(
                f"fade={fade} with adapter_rank={slope.adapter_rank}: the first stage of a gradual start is dense and has no "
                "adapters; give them in the second"
            )
        if faded:
            raise ConfigError(f"fade={fade} and weights={weights!r}, which have faded already: leave one of them out")
    if faded and slope is None:
        raise ConfigError(f"weights={weights!r} have faded to 2:4 masks, a dense run would fill them again: give slope")
    if faded and slope is not None and slope.mask_calibration_batches:
        raise ConfigError(
            f"mask_calibration_batches={slope.mask_calibration_batches} has no effect on weights={weights!r}: their masks "
            "were chosen in the first stage; set it to 0"
        )
    if faded and slope is not None and "random" in slope.mask_kinds:
        raise ConfigError(
            f"mask='random' would throw away the masks of weights={weights!r}; give the first stage's mask"
        )
