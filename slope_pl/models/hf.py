"""Reading and writing BERT weights in Hugging Face's format, from a local folder or from the hub.

:func:`load_pretrained` checks every name and shape before it changes the model: after an error the model is as it was.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slope_pl.models.bert import BertConfig, BertModel
from slope_pl.models.bert_heads import BertForPreTraining, BertForQuestionAnswering, BertForSequenceClassification
from slope_pl.models.hf_files import listing, locate_pretrained, read_tensors, replacing

AnyBert = BertModel | BertForPreTraining | BertForQuestionAnswering | BertForSequenceClassification

# What must agree between the checkpoint's config and the model's for the weights to mean the same. Rates of dropout and
# of initialisation may differ, the size of the vocabulary may grow (load_pretrained).
_SAME_IN_BOTH = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "hidden_act",
)
_WORDS = "bert.embeddings.word_embeddings.weight"
_WORD_BIAS = "cls.predictions.bias"
# The second names of tied tensors.
_TIED = {"cls.predictions.decoder.weight": _WORDS, "cls.predictions.decoder.bias": _WORD_BIAS}


class PretrainedMismatchError(ValueError):
    """A checkpoint and a model do not fit together."""


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_pretrained` did.

    Attributes:
        loaded: parameters of the model that were read, by the model's names.
        missing: parameters that the checkpoint lacks and that keep their fresh initialisation, by the model's names.
        unexpected: tensors of the checkpoint that the model has no place for, by the checkpoint's names.
        padded_rows: rows of the vocabulary that the model has beyond the checkpoint's, set to zero.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    padded_rows: int = 0

    def summary(self) -> str:
        """Return one line for the log."""
        missing, unexpected = listing(self.missing), listing(self.unexpected)
        padded = f", {self.padded_rows} vocabulary rows padded with zeros" if self.padded_rows else ""
        return (
            f"{len(self.loaded)} tensors loaded, {len(self.missing)} missing and freshly initialised{missing}, "
            f"{len(self.unexpected)} unexpected and ignored{unexpected}{padded}"
        )


def load_config(source: str | Path, cache_dir: str | Path | None = None) -> BertConfig:
    """Read the config of a pretrained model; ``source``, ``cache_dir`` and errors as :func:`locate_pretrained`.

    Raises:
        ValueError: if it is not the config of a BERT this package can compute.
    """
    return _read_config(locate_pretrained(source, cache_dir).config)


def load_pretrained(model: AnyBert, source: str | Path, cache_dir: str | Path | None = None) -> LoadReport:
    """Load pretrained weights into a dense ``model`` (before surgery), in place.

    Understands checkpoints with and without the prefix ``bert.`` and with the old ``LayerNorm.gamma`` and ``beta``.
    Heads (and the pooler) may be absent from the checkpoint, the encoder may not. A model with a larger vocabulary than
    the checkpoint's gets zeros in the rows beyond. Tensors take the dtype and device of the parameters.

    Args:
        model: one of the models of :mod:`slope_pl.models.bert`.
        source: folder or hub id, as :func:`locate_pretrained`.
        cache_dir: as :func:`locate_pretrained`.

    Raises:
        PretrainedMismatchError: if configs disagree (names the field), shapes disagree (names the tensor and both
            shapes), parts of the encoder are absent, or the checkpoint's decoder is not tied to its embeddings.
        OSError: as :func:`locate_pretrained`.
    """
    files = locate_pretrained(source, cache_dir)
    _check_config(_read_config(files.config), model.config, files.folder)
    found = _canonical(read_tensors(files))
    parameters = {_with_prefix(name): (name, parameter) for name, parameter in model.named_parameters()}
    if _WORD_BIAS in parameters:
        _resolve_ties(found)

    absent = [name for name in parameters if name not in found]
    encoder = [name for name in absent if name.startswith(("bert.embeddings.", "bert.encoder."))]
    if encoder:
        raise PretrainedMismatchError(
            f"{files.folder} lacks {len(encoder)} tensors of the encoder{listing(encoder)}. Expected the weights of a "
            "BERT; if the model's linear layers were replaced by sparse ones, load before that."
        )
    matched = {name: value for name, value in parameters.items() if name in found}
    for name, (_, parameter) in matched.items():
        _check_tensor(name, found[name][1], parameter)

    padded = 0
    with torch.no_grad():
        for name, (_, parameter) in matched.items():
            tensor = found[name][1]
            parameter[: len(tensor)].copy_(tensor)
            parameter[len(tensor) :].zero_()
            padded = max(padded, len(parameter) - len(tensor))
    return LoadReport(
        loaded=tuple(own for own, _ in matched.values()),
        missing=tuple(parameters[name][0] for name in absent),
        unexpected=tuple(sorted(original for name, (original, _) in found.items() if name not in parameters)),
        padded_rows=padded,
    )


def save_pretrained(model: AnyBert, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
    """Write ``config.json`` and ``model.safetensors``, which ``transformers`` loads to the same logits.

    Each file appears whole or not at all; a folder's earlier files of those names are replaced.

    Args:
        model: one of the models of :mod:`slope_pl.models.bert`; its layers may be sparse if ``state_dict`` is given.
        folder: created if need be.
        state_dict: dense weights under the dense model's names, written in their own dtype; None for the model's.

    Returns:
        The folder.

    Raises:
        TypeError: if ``model`` is no BERT of this package.
        ValueError: if names or shapes differ from those of a dense model (lists them), or tied tensors differ.
    """
    kind = next((kind for kind in AnyBert.__args__ if isinstance(model, kind)), None)
    if kind is None:
        raise TypeError(f"save_pretrained writes the models of slope_pl.models.bert, not a {type(model).__name__}.")
    content = model.config.to_dict() | {"architectures": [kind.__name__]}
    if isinstance(model, BertForSequenceClassification):
        labels = [f"LABEL_{i}" for i in range(model.num_labels)]
        content |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}

    tensors = {k: v.detach() for k, v in (model.state_dict() if state_dict is None else state_dict).items()}
    for second, first in _TIED.items():
        if first in tensors and second in tensors and not torch.equal(tensors[first], tensors.pop(second)):
            raise ValueError(f"{second} differs from {first}, but the format has one tensor for both.")
    _check_dense(model, tensors)
    # A copy of each: safetensors refuses tensors that are views into a common storage.
    tensors = {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _read_config(path: Path) -> BertConfig:
    try:
        return BertConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # of which JSONDecodeError is one
        raise ValueError(f"{path}: {error}") from error


def _check_config(theirs: BertConfig, ours: BertConfig, folder: Path) -> None:
    def meaning(config: BertConfig, field: str) -> Any:
        value = getattr(config, field)
        return "gelu_new" if value == "gelu_pytorch_tanh" else value  # two names of one function

    for field in _SAME_IN_BOTH:
        if meaning(theirs, field) != meaning(ours, field):
            raise PretrainedMismatchError(
                f"{field} is {getattr(theirs, field)!r} in {folder / 'config.json'} and {getattr(ours, field)!r} in "
                "the model. Build the model with the config of the checkpoint: load_config(source)."
            )


def _with_prefix(name: str) -> str:
    """Give the parts of a bare encoder the name they have below a head."""
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def _canonical(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Map today's full name to the checkpoint's own name and the tensor; buffers are left out."""
    found: dict[str, tuple[str, Tensor]] = {}
    for original, tensor in tensors.items():
        name = _with_prefix(original)
        name = name.replace(".LayerNorm.gamma", ".LayerNorm.weight").replace(".LayerNorm.beta", ".LayerNorm.bias")
        if name in ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids"):
            continue
        if name in found:
            raise PretrainedMismatchError(
                f"The checkpoint has both {found[name][0]} and {original}, which are the same."
            )
        found[name] = (original, tensor)
    return found


def _resolve_ties(found: dict[str, tuple[str, Tensor]]) -> None:
    """Drop the second names of tied tensors, after checking that they are what the model takes them for."""
    for second, first in _TIED.items():
        if second not in found:
            continue
        original, tensor = found.pop(second)
        if not torch.equal(found.setdefault(first, (original, tensor))[1], tensor):
            raise PretrainedMismatchError(
                f"{original} differs from {found[first][0]}; the model has one tensor for both."
            )


def _check_tensor(name: str, tensor: Tensor, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise PretrainedMismatchError(f"{name} is on the meta device in the model: call to_empty(device=...) first.")
    if not tensor.is_floating_point():
        raise PretrainedMismatchError(f"{name} is {tensor.dtype} in the checkpoint, expected floating point.")
    shapes = f"{name} has shape {tuple(tensor.shape)} in the checkpoint and {tuple(parameter.shape)} in the model."
    if name in (_WORDS, _WORD_BIAS) and tensor.shape[1:] == parameter.shape[1:]:
        if len(tensor) > len(parameter):
            raise PretrainedMismatchError(f"{shapes} Words would be lost: set vocab_size={len(tensor)}.")
    elif tensor.shape != parameter.shape:
        hint = "" if name.startswith("bert.") else " It is the head of another task: save that model without it."
        raise PretrainedMismatchError(shapes + hint)


def _check_dense(model: AnyBert, tensors: Mapping[str, Tensor]) -> None:
    with torch.device("meta"):
        if isinstance(model, BertForSequenceClassification):
            dense: nn.Module = BertForSequenceClassification(model.config, model.num_labels)
        elif isinstance(model, BertModel):
            dense = BertModel(model.config, add_pooling_layer=model.pooler is not None)
        else:
            dense = type(model)(model.config)
    expected = {name: tuple(parameter.shape) for name, parameter in dense.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    absent = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    reshaped = [f"{k} {given[k]} instead of {v}" for k, v in expected.items() if k in given and given[k] != v]
    if absent or extra or reshaped:
        raise ValueError(
            f"Not the weights of a dense {type(model).__name__}: {len(absent)} absent{listing(absent)}, {len(extra)} "
            f"unexpected{listing(extra)}, {len(reshaped)} of another shape{listing(reshaped)}. For a sparse model "
            "pass its dense weights as state_dict."
        )
