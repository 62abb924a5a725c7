"""Models to train: BERT with Hugging Face's parameter names, dense until surgery."""

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

__all__ = [
    "BertConfig",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertModel",
    "BertModelOutput",
    "LoadReport",
    "PreTrainingOutput",
    "PretrainedFiles",
    "PretrainedFilesError",
    "PretrainedMismatchError",
    "PretrainedUnavailableError",
    "QuestionAnsweringOutput",
    "SequenceClassificationOutput",
    "load_config",
    "load_pretrained",
    "locate_pretrained",
    "save_pretrained",
]
