"""Small BERTs, ours and transformers', with the same weights."""

import torch
import transformers

from slope_pl.models import (
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

# Weights ten times larger than BERT's, so that attention is far from uniform and a wrong mask or scale shows.
MINI = BertConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=24,
    initializer_range=0.2,
)
KINDS = {
    "base": (BertModel, transformers.BertModel),
    "pretraining": (BertForPreTraining, transformers.BertForPreTraining),
    "qa": (BertForQuestionAnswering, transformers.BertForQuestionAnswering),
    "classification": (BertForSequenceClassification, transformers.BertForSequenceClassification),
}
OUTPUTS = {
    "base": ("last_hidden_state", "pooler_output"),
    "pretraining": ("prediction_logits", "seq_relationship_logits"),
    "qa": ("start_logits", "end_logits"),
    "classification": ("logits",),
}


def build(kind, config=MINI, seed=0):
    torch.manual_seed(seed)
    ours = KINDS[kind][0]
    model = ours(config, num_labels=3) if kind == "classification" else ours(config)
    return randomise(model).eval()


def build_theirs(kind, config=MINI, seed=0):
    torch.manual_seed(seed)
    content = config.to_dict() | {"num_labels": 3 if kind == "classification" else 2}
    return randomise(KINDS[kind][1](transformers.BertConfig.from_dict(content))).eval()


def randomise(model):
    """Move biases and LayerNorms off 0 and 1: at those a swap or an omission would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch(config=MINI, size=2, length=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(size, length, dtype=torch.int64)
    mask[-1, length - 5 :] = 0
    return {
        "input_ids": torch.randint(1, config.vocab_size, (size, length), generator=generator),
        "attention_mask": mask,
        "token_type_ids": (torch.arange(length) >= length // 2).long().expand(size, length).contiguous(),
    }


@torch.no_grad()
def difference(kind, ours, theirs, inputs):
    a, b = ours(**inputs), theirs(**inputs)
    return max((getattr(a, name) - getattr(b, name)).abs().max().item() for name in OUTPUTS[kind])


@torch.no_grad()
def same_outputs(a, b, inputs):
    return all(torch.equal(x, y) for x, y in zip(a(**inputs), b(**inputs), strict=True) if x is not None)
