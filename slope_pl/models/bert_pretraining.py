"""The loss of BERT's pretraining; the model with its two heads is :class:`slope_pl.models.BertForPreTraining`."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from slope_pl.models.bert_heads import PreTrainingOutput

IGNORED = -100
"""Label of what is not to be predicted."""


class PreTrainingLoss(NamedTuple):
    """``total`` is the sum of ``masked_words`` and ``next_sentence``; scalars in nats."""

    total: Tensor
    masked_words: Tensor
    next_sentence: Tensor


def pretraining_loss(output: PreTrainingOutput, masked_labels: Tensor, next_sentence_label: Tensor) -> PreTrainingLoss:
    """Mean cross entropy of the masked words plus that of the next sentence (Devlin et al. 2018, appendix A.2).

    Computed in float32 whatever the dtype of the logits. A batch without a masked word has a loss of 0 there, not NaN.

    Args:
        output: of the model; its ``prediction_logits`` ``(B, P, vocab)`` are those of the positions that are labelled.
        masked_labels: int64 ``(B, P)``, ids of the masked words, :data:`IGNORED` elsewhere.
        next_sentence_label: int64 ``(B,)``, 0 if the second segment follows the first, 1 if it is a random one.

    Raises:
        ValueError: if logits and labels do not have the same positions.
    """
    if output.prediction_logits.shape[:-1] != masked_labels.shape:
        raise ValueError(
            f"masked_labels has shape {tuple(masked_labels.shape)}, the logits are of {tuple(output.prediction_logits.shape)}"
            ": give the model the masked_positions that belong to the labels"
        )
    logits, labels = output.prediction_logits.flatten(0, 1).float(), masked_labels.flatten()
    words = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    words = words / (labels != IGNORED).sum().clamp(min=1)
    pairs = F.cross_entropy(output.seq_relationship_logits.float(), next_sentence_label)
    return PreTrainingLoss(words + pairs, words, pairs)
