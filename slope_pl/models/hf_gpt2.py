"""Reading and writing GPT-2 weights in Hugging Face's format, from a local folder or from the hub.

That format holds the matrices of the layers transposed, as ``Conv1D``. Either every tensor fits or nothing is read:
:func:`load_gpt2` checks all names and shapes before it changes the model.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slope_pl.models.gpt2 import GPT2, GPT2Config
from slope_pl.models.hf import PretrainedMismatchError
from slope_pl.models.hf_files import listing, locate_pretrained, read_tensors, replacing

# What must agree between the checkpoint's config and the model's for the weights to mean the same. Rates of dropout and
# of initialisation may differ, the size of the vocabulary may grow.
_SAME_IN_BOTH = (
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "inner",
    "activation_function",
    "layer_norm_epsilon",
    "scale_by_inverse_layer_index",
)
_PREFIX = "transformer."
_WORDS, _HEAD = "wte.weight", "lm_head.weight"  # two names of one tensor
_TRANSPOSED = re.compile(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight")
_MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # buffers of old versions: the causal mask and its minus infinity


def load_gpt2_config(source: str | Path, cache_dir: str | Path | None = None) -> GPT2Config:
    """Read the config of a pretrained GPT-2; arguments and OSErrors as :func:`slope_pl.models.locate_pretrained`.

    Raises:
        ValueError: if it is not the config of a GPT-2 this package can compute.
    """
    return _read_config(locate_pretrained(source, cache_dir).config)


def load_gpt2(model: GPT2, source: str | Path, cache_dir: str | Path | None = None) -> None:
    """Load pretrained weights into a dense ``model`` (before surgery), in place: all of them or, on error, none.

    Understands checkpoints with and without the prefix ``transformer.``, with the buffers of old versions and with the head
    stored beside the embeddings, if it equals them. Tensors take the dtype and device of the parameters. In a model with a
    larger vocabulary the rows beyond get the mean of the others: such a token's logit is the mean logit, so that N of them
    beside V words lower no log-probability by more than ln(1 + N/V). (Rows of zeros would have the logit 0, above that of
    every word in a published GPT-2.)

    Args:
        model: built with the config of the checkpoint, see :func:`load_gpt2_config`.
        source: a folder or a hub id such as ``openai-community/gpt2``, as :func:`slope_pl.models.locate_pretrained`.
        cache_dir: as there.

    Raises:
        PretrainedMismatchError: if configs disagree (names the field), tensors are missing, unexpected or of another shape
            (names them), or the checkpoint's head differs from its embeddings.
        OSError: as :func:`slope_pl.models.locate_pretrained`.
    """
    files = locate_pretrained(source, cache_dir)
    _check_config(_read_config(files.config), model.config, files.folder)
    found = _canonical(read_tensors(files), files.folder)
    parameters = dict(model.named_parameters())
    absent = [name for name in parameters if name not in found]
    extra = [name for name in found if name not in parameters]
    if absent or extra:
        raise PretrainedMismatchError(
            f"{files.folder} lacks {len(absent)} tensors of the model{listing(absent)} and has {len(extra)} that the model "
            f"lacks{listing(extra)}. Expected the weights of a GPT-2 without other heads; if the model's linear layers "
            "were replaced by sparse ones, load before that."
        )
    for name, parameter in parameters.items():
        _check_tensor(name, found[name], parameter)
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensor = found[name]
            parameter[: len(tensor)].copy_(tensor)
            if len(parameter) > len(tensor):
                parameter[len(tensor) :] = tensor.float().mean(0)


def save_gpt2(model: GPT2, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
    """Write ``config.json`` and ``model.safetensors``, which ``transformers`` loads to the same logits.

    Each file appears whole or not at all; a folder's earlier files of those names are replaced.

    Args:
        model: its layers may be sparse if ``state_dict`` is given.
        folder: created if need be.
        state_dict: dense weights under the dense model's names, written in their own dtype; None for the model's.

    Returns:
        The folder.

    Raises:
        TypeError: if ``model`` is no GPT2.
        ValueError: if names or shapes differ from those of a dense model (lists them), or the head from the embeddings.
    """
    if not isinstance(model, GPT2):
        raise TypeError(f"save_gpt2 writes a slope_pl.models.GPT2, not a {type(model).__name__}.")
    tensors = {k: v.detach() for k, v in (model.state_dict() if state_dict is None else state_dict).items()}
    head = tensors.pop(_HEAD, None)
    if head is not None and _WORDS in tensors and not torch.equal(head, tensors[_WORDS]):
        raise ValueError(f"{_HEAD} differs from {_WORDS}, but the format has one tensor for both.")
    _check_dense(model.config, tensors)
    # A copy of each: safetensors refuses tensors that are views into a common storage, or not contiguous.
    tensors = {
        _PREFIX + name: _turned(name, tensor).cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    content = model.config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _read_config(path: Path) -> GPT2Config:
    try:
        return GPT2Config.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # of which JSONDecodeError is one
        raise ValueError(f"{path}: {error}") from error


def _check_config(theirs: GPT2Config, ours: GPT2Config, folder: Path) -> None:
    def meaning(config: GPT2Config, field: str) -> Any:
        value = getattr(config, field)
        return "gelu_new" if value == "gelu_pytorch_tanh" else value  # two names of one function

    for field in _SAME_IN_BOTH:
        if meaning(theirs, field) != meaning(ours, field):
            name = "n_inner" if field == "inner" else field
            raise PretrainedMismatchError(
                f"{name} is {getattr(theirs, field)!r} in {folder / 'config.json'} and {getattr(ours, field)!r} in the "
                "model. Build the model with the config of the checkpoint: load_gpt2_config(source)."
            )


def _turned(name: str, tensor: Tensor) -> Tensor:
    """From ``Conv1D``'s layout to ``nn.Linear``'s and back; other tensors stay as they are."""
    return tensor.t() if _TRANSPOSED.fullmatch(name) and tensor.ndim == 2 else tensor


def _canonical(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Map the model's names to the checkpoint's tensors in the model's layout, without buffers and the second head."""
    found: dict[str, Tensor] = {}
    for original, tensor in tensors.items():
        name = original.removeprefix(_PREFIX)
        if _MASKS.fullmatch(name):
            continue
        if name in found:
            raise PretrainedMismatchError(f"{folder} has both {name} and {_PREFIX}{name}, which are the same.")
        found[name] = _turned(name, tensor)
    head = found.pop(_HEAD, None)
    if head is not None and not torch.equal(found.setdefault(_WORDS, head), head):
        raise PretrainedMismatchError(
            f"{_HEAD} differs from {_WORDS} in {folder}; the model has one tensor for both (tie_word_embeddings)."
        )
    return found


def _check_tensor(name: str, tensor: Tensor, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise PretrainedMismatchError(f"{name} is on the meta device in the model: call to_empty(device=...) first.")
    if not tensor.is_floating_point():
        raise PretrainedMismatchError(f"{name} is {tensor.dtype} in the checkpoint, expected floating point.")
    shapes = f"{name} has shape {tuple(tensor.shape)} in the checkpoint and {tuple(parameter.shape)} in the model"
    if name == _WORDS and tensor.shape[1:] == parameter.shape[1:]:
        if len(tensor) > len(parameter):
            raise PretrainedMismatchError(f"{shapes}. Words would be lost: set vocab_size={len(tensor)}.")
    elif tensor.shape != parameter.shape:
        layout = " (nn.Linear's layout)" if _TRANSPOSED.fullmatch(name) else ""
        raise PretrainedMismatchError(f"{shapes}{layout}. The file contradicts its config.json: get both anew.")


def _check_dense(config: GPT2Config, tensors: Mapping[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = {name: tuple(parameter.shape) for name, parameter in GPT2(config).named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    absent = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    reshaped = [f"{k} {given[k]} instead of {v}" for k, v in expected.items() if k in given and given[k] != v]
    if absent or extra or reshaped:
        raise ValueError(
            f"Not the weights of a dense GPT2: {len(absent)} absent{listing(absent)}, {len(extra)} "
            f"unexpected{listing(extra)}, {len(reshaped)} of another shape{listing(reshaped)}. For a sparse model "
            "pass its dense weights as state_dict."
        )
