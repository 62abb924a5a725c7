"""Encoders of Hugging Face's ``transformers`` behind one forward: BERT, RoBERTa, DistilBERT and their like.

:class:`slope_pl.models.BertForQuestionAnswering` and its kin are this package's own BERT, without that dependency. Here
the model is theirs: weights, names and maths of ``transformers``, which has to be installed.
"""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from slope_pl.models.bert_heads import (
    QuestionAnsweringOutput,
    QuestionAnsweringStates,
    SequenceClassificationOutput,
    SequenceClassificationStates,
)
from slope_pl.models.hf import PretrainedMismatchError
from slope_pl.models.hf_files import PretrainedFilesError, PretrainedUnavailableError
from slope_pl.nn import built_whole

log = logging.getLogger(__name__)

EncoderTask = Literal["question_answering", "classification", "regression"]

ENCODER_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
"""``model_type`` in config.json of the architectures that are tested here. MiniLM's is bert."""

# Positions of these begin behind the padding token's number.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
# Parts that belong to a task: they may be missing from pretrained weights, everything else may not.
_HEADS = ("qa_outputs", "classifier", "pre_classifier", "pooler", "sequence_summary")


class Encoder(nn.Module):
    """A ``transformers`` encoder with the head of a task.

    Attributes:
        model: the ``transformers`` model; dense until surgery.
        task: what its head is for.
        max_length: the longest sequence, tokens.
        fresh: parameters that the weights did not hold, by the names of ``model``: after :func:`load_encoder`, of the head.
    """

    fresh: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, task: EncoderTask) -> None:
        super().__init__()
        self.model, self.task = model, task
        config = self.config
        kind = config.model_type
        # RoBERTa has one row of segments, for all tokens; DistilBERT none, and no such argument.
        has_argument = "token_type_ids" in inspect.signature(model.forward).parameters
        self.uses_token_types = has_argument and getattr(config, "type_vocab_size", 0) > 1
        offset = config.pad_token_id + 1 if kind in _OFFSET_POSITIONS else 0
        self.max_length: int = config.max_position_embeddings - offset

    @property
    def config(self) -> Any:
        """The ``transformers`` config; ``encoder_from_config(encoder.config.to_dict(), task)`` builds the same architecture."""
        return self.model.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> (
        QuestionAnsweringOutput | SequenceClassificationOutput | QuestionAnsweringStates | SequenceClassificationStates
    ):
        """Run encoder and head.

        Args:
            input_ids: int64 ``(B, T)``, ``T`` at most ``max_length``.
            attention_mask: bool or integer ``(B, T)``, 0 for padding; None where there is none.
            token_type_ids: int64 ``(B, T)``, the segment of each token; ignored by architectures that have no segments.
            output_hidden_states: whether to return what the embeddings and every layer give.

        Returns:
            start and end logits ``(B, T)`` each, or logits ``(B, num_labels)``; and hidden states if asked for.

        Raises:
            ValueError: if the sequence is too long.
        """
        if input_ids.dim() != 2 or input_ids.shape[1] > self.max_length:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, expected (B, T) with T <= {self.max_length}."
            )
        segments = {"token_type_ids": token_type_ids} if self.uses_token_types else {}
        asked = {"return_dict": True, "output_hidden_states": output_hidden_states}
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, **asked, **segments)
        if self.task == "question_answering":
            answer = out.start_logits, out.end_logits
            if output_hidden_states:
                return QuestionAnsweringStates(*answer, out.hidden_states)
            return QuestionAnsweringOutput(*answer)
        if output_hidden_states:
            return SequenceClassificationStates(out.logits, out.hidden_states)
        return SequenceClassificationOutput(out.logits)


@built_whole()
def load_encoder(
    name_or_folder: str | Path, task: EncoderTask = "classification", num_labels: int | None = None, **overrides: Any
) -> Encoder:
    """A pretrained encoder with a head for a task; the head is fresh unless the weights hold it in this size.

    Weights come in torch's default dtype, whatever the file's. The model is in training mode.

    Args:
        name_or_folder: a folder with ``config.json`` and weights, or a hub id such as ``FacebookAI/roberta-base``.
        task: ``question_answering``, ``classification`` or ``regression``.
        num_labels: classes, at least 2, for classification only.
        **overrides: of the config: ``hidden_dropout_prob=0.0``.

    Returns:
        the model, dense: :func:`slope_pl.sparsify` takes it. Heads (``qa_outputs``, ``classifier``, RoBERTa's
        ``classifier.dense`` and DistilBERT's ``pre_classifier``) and the first layer's query, key and value stay dense by
        its rule; ELECTRA-small, whose first linear layer is the projection of its embeddings, keeps that one instead.

    Raises:
        ImportError: if ``transformers`` is not installed.
        ValueError: if the architecture is not one of :data:`ENCODER_TYPES`, or ``num_labels`` does not fit the task.
        PretrainedFilesError: if the folder does not exist or lacks files.
        PretrainedUnavailableError: if the hub does not deliver.
        PretrainedMismatchError: if the weights lack a part of the encoder.
    """
    num_labels = _labels(task, num_labels)
    transformers = _transformers()
    source = _source(name_or_folder)
    try:
        config, unused = transformers.AutoConfig.from_pretrained(
            source, num_labels=num_labels, return_unused_kwargs=True, **overrides
        )
    except ValueError as error:
        raise ValueError(f"{source}: {_unknown(_first_line(error))}") from error
    except OSError as error:
        raise _not_there(source, error) from error
    _check(config, source, unused)
    try:
        model, report = _auto_class(transformers, task).from_pretrained(
            source,
            config=config,
            dtype=torch.get_default_dtype(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head of another number of classes; anything else is refused below
        )
    except OSError as error:
        raise _not_there(source, error) from error
    fresh = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    lost = sorted(name for name in fresh if not any(head in name.split(".") for head in _HEADS))
    if fresh and not lost:
        log.info("%s: fresh, since the weights do not hold them: %s", source, ", ".join(sorted(fresh)))
    if lost:
        raise PretrainedMismatchError(
            f"the weights of {source} lack {len(lost)} tensors of the {config.model_type} encoder ({', '.join(lost[:3])}): "
            "they are of another model"
        )
    encoder = Encoder(model.train(), task)
    encoder.fresh = tuple(sorted(fresh))
    return encoder


@built_whole()
def encoder_from_config(
    config: Mapping[str, Any], task: EncoderTask = "classification", num_labels: int | None = None
) -> Encoder:
    """An encoder with random weights, to load a checkpoint into.

    Args:
        config: the content of a ``config.json``; ``model_type`` names the architecture.
        task: see :func:`load_encoder`.
        num_labels: see :func:`load_encoder`.

    Raises:
        ImportError: if ``transformers`` is not installed.
        ValueError: if the architecture is not one of :data:`ENCODER_TYPES`, or ``num_labels`` does not fit the task.
    """
    num_labels = _labels(task, num_labels)
    transformers = _transformers()
    content = {key: value for key, value in config.items() if key not in ("id2label", "label2id", "num_labels")}
    kind = content.pop("model_type", None)
    if kind not in ENCODER_TYPES:
        raise ValueError(_unknown(f"model_type is {kind!r}"))
    made = transformers.AutoConfig.for_model(kind, **content, num_labels=num_labels)
    return Encoder(_auto_class(transformers, task).from_config(made, dtype=torch.get_default_dtype()), task)


def _labels(task: str, num_labels: int | None) -> int:
    """The number of outputs, checked."""
    if task not in get_args(EncoderTask):
        raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(get_args(EncoderTask))}.")
    if task == "classification":
        if num_labels is None or num_labels < 2:
            raise ValueError(f"num_labels={num_labels} for classification; give the number of classes, at least 2.")
        return num_labels
    outputs = 1 if task == "regression" else 2
    if num_labels not in (None, outputs):
        raise ValueError(f"num_labels={num_labels} for {task}, which has {outputs}; leave it out.")
    return outputs


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "Hugging Face encoders need transformers, which is not installed: pip install 'slope_pl[hf]'. BERT itself needs "
            "nothing: slope_pl.models.BertForQuestionAnswering and load_pretrained."
        ) from error
    return transformers


def _auto_class(transformers: Any, task: EncoderTask) -> Any:
    if task == "question_answering":
        return transformers.AutoModelForQuestionAnswering
    return transformers.AutoModelForSequenceClassification


def _source(name_or_folder: str | Path) -> str:
    """A folder that exists, or a hub id; what looks like a path and is none is an error now, not a request to the hub."""
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise PretrainedFilesError(f"{folder} has no config.json. Expected a folder of a Hugging Face model.")
        return str(folder)
    name = str(name_or_folder)
    if isinstance(name_or_folder, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise PretrainedFilesError(f"No such folder: {folder}. Expected one with config.json and model.safetensors.")
    return name


def _not_there(source: str, error: OSError) -> OSError:
    if Path(source).is_dir():
        return PretrainedFilesError(f"{source} lacks files of a Hugging Face model: {_first_line(error)}")
    return PretrainedUnavailableError(
        f"{source} could not be fetched from the hub: {_first_line(error)} Give a folder that holds it, or a name that exists."
    )


def _check(config: Any, source: str, unused: Mapping[str, Any]) -> None:
    if config.model_type not in ENCODER_TYPES:
        raise ValueError(f"{source}: {_unknown(f'it is a {config.model_type}')}")
    if unused:
        raise ValueError(f"{source}: a {config.model_type} config has no {', '.join(sorted(unused))}.")


def _unknown(what: str) -> str:
    return f"{what.rstrip('.')}, expected an encoder: {', '.join(ENCODER_TYPES)} (MiniLM is a bert)."


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
