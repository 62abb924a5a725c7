"""Recovery on plain text: a pruned pretrained BERT learns to give the hidden states of its dense self.

--model.weights FOLDER --model.imitation.weight 1       before any task; fine-tuning then starts from this run's checkpoint

Fine-tuning alone cannot do that: its few labelled texts are no measure of what pretraining had learnt. The loss is
SquareHead's, see :mod:`slope_pl.lightning.distillation`.
"""

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from recipes.bert_large.pretrain_checkpoint import read_pretraining_checkpoint
from slope_pl import CheckpointError, ConfigError
from slope_pl.models import BertConfig, BertModel, load_config, load_pretrained
from slope_pl.models.bert import BertSelfAttention


@dataclass(frozen=True, kw_only=True)
class ImitationConfig:
    """A dense teacher whose hidden states are learnt.

    Args:
        weight: of the teacher in the loss, above 0 to 1; at 1 the heads of pretraining are pruned, but not trained.
        teacher: a folder, a hub id, or a dense checkpoint of this recipe; of the model's depth and width. Null is what the run
            starts from (weights, or a dense start_from).
    """

    weight: float = 1.0
    teacher: str | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not 0 < self.weight <= 1:
            raise ConfigError(
                f"model.imitation.weight={self.weight!r}: above 0 and at most 1 is expected; without a teacher, leave "
                "model.imitation out"
            )

    def source(self, weights: str | None, start_from: str | None) -> str:
        """Where the teacher comes from.

        Raises:
            ConfigError: the run starts from nothing, and no teacher is named.
        """
        found = next((source for source in (self.teacher, weights, start_from) if source is not None), None)
        if found is None:
            raise ConfigError(
                "model.imitation has nothing to imitate: the run starts from random weights. Give model.weights (a folder or "
                "hub id), a dense model.start_from, or model.imitation.teacher"
            )
        return found


def load_imitated(source: str, config: BertConfig, words: int, length: int) -> BertModel:
    """The teacher's encoder, with its pooler if it has been trained.

    Args:
        source: a folder, a hub id, or a dense checkpoint of ``recipes.bert_large.pretrain``.
        config: of the model that imitates it.
        words: tokens of the tokenizer.
        length: tokens of the longest example.

    Raises:
        CheckpointError: a sparse checkpoint.
        ConfigError: it cannot be read; of another depth or width, with fewer words or positions.
    """
    is_checkpoint = source.endswith(".ckpt") or Path(source).expanduser().is_file()
    saved = read_pretraining_checkpoint(source) if is_checkpoint else None
    if saved is not None and saved.slope is not None:
        raise CheckpointError(
            f"{source} is of a 2:4 sparse model, which is no teacher: name a dense one as model.imitation.teacher"
        )
    try:
        theirs = saved.bert if saved is not None else load_config(source)
    except OSError as error:
        raise ConfigError(f"no teacher to imitate: {error} Another place: model.imitation.teacher.") from error
    for name in ("num_hidden_layers", "hidden_size"):
        if getattr(theirs, name) != getattr(config, name):
            raise ConfigError(
                f"the teacher {source} has {name}={getattr(theirs, name)}, the model {getattr(config, name)}: hidden states "
                "are compared layer by layer, so a teacher as deep and as wide is expected"
            )
    if theirs.vocab_size < words:
        raise ConfigError(
            f"the tokenizer has {words} tokens, the teacher {source} a vocabulary of {theirs.vocab_size}: data.tokenizer and "
            "the teacher do not belong together"
        )
    if theirs.max_position_embeddings < length:
        raise ConfigError(
            f"data.max_length is {length}, but the teacher {source} has {theirs.max_position_embeddings} positions: make "
            "data.max_length as small"
        )
    teacher = BertModel(theirs)
    if saved is None:
        if any(name.startswith("pooler.") for name in load_pretrained(teacher, source).missing):
            teacher.pooler = None  # such a model's would be random, another one at each start
    else:
        prefix = "bert."
        state = {name.removeprefix(prefix): t for name, t in saved.state.items() if name.startswith(prefix)}
        teacher.load_state_dict({name: state[name] for name in teacher.state_dict()})
    rank_zero_info(
        f"Imitates the hidden states of {source}: {theirs.num_hidden_layers} layers of {theirs.hidden_size}."
    )
    return teacher


def freeze_heads(net: nn.Module) -> None:
    """Train no head: no hidden state depends on one. The decoder's matrix is the embeddings', which are trained."""
    words = net.bert.embeddings.word_embeddings.weight  # type: ignore[union-attr]
    for parameter in net.cls.parameters():  # type: ignore[union-attr]
        if parameter is not words:
            parameter.requires_grad_(False)


def set_dropout(net: nn.Module, rate: float) -> None:
    """Set every rate of a BERT, and leave its configuration alone."""
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        elif isinstance(module, BertSelfAttention):
            module.dropout_prob = rate
