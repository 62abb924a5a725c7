"""Models to train: BERT and GPT-2 with Hugging Face's parameter names, dense until surgery."""

from slope_pl.models.bert import BertConfig, BertModel, BertModelOutput
from slope_pl.models.bert_heads import (
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    PreTrainingOutput,
    QuestionAnsweringOutput,
    SequenceClassificationOutput,
)
from slope_pl.models.bert_pretraining import PreTrainingLoss, pretraining_loss
from slope_pl.models.encoders import ENCODER_TYPES, Encoder, EncoderTask, encoder_from_config, load_encoder
from slope_pl.models.gpt2 import GPT2, GPT2Config, causal_lm_loss
from slope_pl.models.hf import LoadReport, PretrainedMismatchError, load_config, load_pretrained, save_pretrained
from slope_pl.models.hf_files import (
    PretrainedFiles,
    PretrainedFilesError,
    PretrainedUnavailableError,
    load_model_type,
    locate_pretrained,
)
from slope_pl.models.hf_gpt2 import load_gpt2, load_gpt2_config, save_gpt2

__all__ = [
    "ENCODER_TYPES",
    "GPT2",
    "BertConfig",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertModel",
    "BertModelOutput",
    "Encoder",
    "EncoderTask",
    "GPT2Config",
    "LoadReport",
    "PreTrainingLoss",
    "PreTrainingOutput",
    "PretrainedFiles",
    "PretrainedFilesError",
    "PretrainedMismatchError",
    "PretrainedUnavailableError",
    "QuestionAnsweringOutput",
    "SequenceClassificationOutput",
    "causal_lm_loss",
    "encoder_from_config",
    "load_config",
    "load_encoder",
    "load_gpt2",
    "load_gpt2_config",
    "load_model_type",
    "load_pretrained",
    "locate_pretrained",
    "pretraining_loss",
    "save_gpt2",
    "save_pretrained",
]
