"""Models to train: BERT and GPT-2 with Hugging Face's parameter names, dense until surgery."""

from slope_pl.models.bert import (
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    BertModelOutput,
    PreTrainingOutput,
    QuestionAnsweringOutput,
    SequenceClassificationOutput,
)
from slope_pl.models.gpt2 import GPT2, GPT2Config, causal_lm_loss
from slope_pl.models.hf import (
    LoadReport,
    PretrainedFiles,
    PretrainedFilesError,
    PretrainedMismatchError,
    PretrainedUnavailableError,
    load_config,
    load_pretrained,
    locate_pretrained,
    save_pretrained,
)
from slope_pl.models.hf_gpt2 import load_gpt2, load_gpt2_config, save_gpt2

__all__ = [
    "GPT2",
    "BertConfig",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertModel",
    "BertModelOutput",
    "GPT2Config",
    "LoadReport",
    "PreTrainingOutput",
    "PretrainedFiles",
    "PretrainedFilesError",
    "PretrainedMismatchError",
    "PretrainedUnavailableError",
    "QuestionAnsweringOutput",
    "SequenceClassificationOutput",
    "causal_lm_loss",
    "load_config",
    "load_gpt2",
    "load_gpt2_config",
    "load_pretrained",
    "locate_pretrained",
    "save_gpt2",
    "save_pretrained",
]
