"""From a pretraining checkpoint into the next model of the chain: phase 2, SQuAD, GLUE, with its masks kept.

    load_pretraining_checkpoint(net, "phase1.ckpt", slope)     # before the module makes itself sparse
    check_masks(net, "phase1.ckpt")                            # at the end of training

A sparse checkpoint makes the net sparse with the checkpoint's own masks, an informed start that no later choice replaces. A
dense one is loaded as it is; what the module then prunes, it prunes by trained weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.checkpoints import read_checkpoint
from slope_pl import CheckpointError, SLoPeConfig, sparse_layers, sparsify
from slope_pl.checkpoint import CHECKPOINT_KEY
from slope_pl.models import BertConfig
from slope_pl.nn.selection import choose_layers
from slope_pl.sparsity import check_indices

_PREFIX = "net."
_HEADS = ("cls.predictions.bias", "cls.seq_relationship.weight")  # what tells pretraining from any other BERT
_MASKS = ("indices", "backward_indices")
_ADAPTERS = ("adapter_down", "adapter_up")
# What may differ between two phases: it is no part of the weights.
_FREE = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "pad_token_id")


@dataclass(frozen=True)
class PretrainingCheckpoint:
    """What a pretraining checkpoint holds.

    Attributes:
        path: the file, or the folder that a sharding strategy wrote.
        bert: its architecture.
        slope: how it was made sparse; None if it is dense.
        step: optimizer steps it was trained for.
        state: the net's tensors by the net's own names, mapped from the file.
    """

    path: Path
    bert: BertConfig
    slope: SLoPeConfig | None
    step: int
    state: Mapping[str, Tensor]

    @property
    def awake(self) -> bool:
        """Whether its adapters take part."""
        return any(bool(tensor) for name, tensor in self.state.items() if name.endswith(".adapter_active"))

    def layers(self) -> list[str]:
        """Names of its sparse layers."""
        return [name.removesuffix(".indices") for name in self.state if name.endswith(".indices")]


@dataclass(frozen=True)
class ChainReport:
    """What :func:`load_pretraining_checkpoint` did, by the names of the net.

    Attributes:
        path: the checkpoint.
        step: optimizer steps it was trained for.
        loaded: tensors that were read.
        fresh: parameters that the checkpoint does not have: heads, and adapters of another rank.
        unused: tensors of the checkpoint that the net has no place for: its pretraining heads.
        masks: sparse layers whose masks are the checkpoint's.
        awake: whether the adapters came along awake.
    """

    path: Path
    step: int
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    masks: tuple[str, ...]
    awake: bool

    def summary(self) -> str:
        """One line for the log."""
        kind = f"2:4 masks of {len(self.masks)} layers kept" if self.masks else "dense"
        adapters = ", adapters awake" if self.awake else ""
        return (
            f"Weights from {self.path} (step {self.step:,}; {kind}{adapters}): {len(self.loaded)} tensors loaded, "
            f"{len(self.fresh)} fresh{_some(self.fresh)}, {len(self.unused)} left aside{_some(self.unused)}."
        )


def read_pretraining_checkpoint(path: str | Path) -> PretrainingCheckpoint:
    """Open a checkpoint of :class:`recipes.bert_large.pretrain_module.BertPretraining`; nothing but its description is read.

    Raises:
        CheckpointError: no such file, not a checkpoint, a damaged one, or one of another model.
    """
    file, what = Path(path).expanduser(), "a checkpoint of recipes.bert_large.pretrain"
    content = read_checkpoint(file, what)
    state = {name.removeprefix(_PREFIX): t for name, t in content["state_dict"].items() if name.startswith(_PREFIX)}
    settings = content.get("hyper_parameters", {})
    missing = [name for name in _HEADS if name not in state]
    if missing or not isinstance(settings.get("bert"), dict):
        raise CheckpointError(
            f"{file} is of another model: it has no {', '.join(_PREFIX + m for m in missing) or 'architecture of a BERT'} "
            f"among its tensors ({', '.join(list(content['state_dict'])[:3])}, ...); expected {what}"
        )
    mark = content.get(CHECKPOINT_KEY)
    slope = None if mark is None else SLoPeConfig.from_dict(mark["config"])
    step = int(content.get("global_step", 0))
    return PretrainingCheckpoint(file, BertConfig.from_dict(settings["bert"]), slope, step, state)


def load_pretraining_checkpoint(net: nn.Module, path: str | Path, slope: SLoPeConfig | None) -> ChainReport:
    """Load a pretraining checkpoint into a dense BERT of any head, and make that sparse if the checkpoint is.

    Everything is compared before anything is changed: after an error the net is as it was.

    Args:
        net: a model of :mod:`slope_pl.models.bert`, dense as yet.
        path: a checkpoint of ``recipes.bert_large.pretrain``, sparse or dense.
        slope: how the run makes its model sparse; None for a dense run. With a sparse checkpoint the masks, and so the mask
            kind and the choice of layers, are the checkpoint's; the adapters too once they were awake. Sleeping ones may get
            another rank. With a dense checkpoint the net stays dense here.

    Returns:
        What was loaded, what is fresh, what was left aside.

    Raises:
        CheckpointError: another architecture, a dense run from a sparse checkpoint, another mask or choice of layers, other
            awake adapters, missing or damaged tensors; or as :func:`read_pretraining_checkpoint`.
    """
    if sparse_layers(net):
        raise CheckpointError(
            "the net is sparse already: load the checkpoint before, with the same slope configuration"
        )
    saved = read_pretraining_checkpoint(path)
    _check_architecture(saved, net)
    # The module's view of its net: patterns and seeds go by qualified names.
    root = nn.ModuleDict({_PREFIX.rstrip("."): net})
    chosen = _check_slope(saved, root, slope)
    expected = _expected(net, chosen)
    known = {name: saved.state[name] for name in expected if name in saved.state}
    _check_tensors(saved, expected, known)
    keeps_adapters = saved.slope is not None and slope is not None and _ranks(saved.slope) == _ranks(slope)
    if chosen:
        assert slope is not None
        sparsify(root, slope)
        if keeps_adapters:
            extra = [f"{name}.{adapter}" for name in chosen for adapter in _ADAPTERS]
            known |= {name: saved.state[name] for name in extra if name in saved.state}
    net.load_state_dict(known, strict=False)
    masks = _compare(net, saved, _MASKS) if chosen else []
    own = dict(net.named_parameters(remove_duplicate=False))
    return ChainReport(
        path=saved.path,
        step=saved.step,
        loaded=tuple(known),
        fresh=tuple(name for name in own if name not in known),
        unused=tuple(name for name in saved.state if name not in known),
        masks=tuple(masks),
        awake=bool(masks) and saved.awake,
    )


def check_masks(net: nn.Module, path: str | Path) -> int:
    """Check that a trained net still has the forward masks of the checkpoint that it started from.

    Args:
        net: the sparse net.
        path: the pretraining checkpoint.

    Returns:
        How many layers were compared; 0 if the checkpoint is dense.

    Raises:
        CheckpointError: a mask differs; names the layers.
    """
    saved = read_pretraining_checkpoint(path)
    return len(_compare(net, saved, ("indices",))) if saved.slope is not None else 0


def say_masks_are_kept(net: nn.Module, path: str | Path) -> None:
    """At the end of training: :func:`check_masks`, with a line that says so; nothing of a dense checkpoint.

    A file that is gone by now, days after the start, is said and no error: the run is done.

    Raises:
        CheckpointError: as :func:`check_masks`.
    """
    # Not the module's print: the progress bar is closed by now, and its print would drop the text.
    if not Path(path).expanduser().exists():
        print(f"{path} is not there any more: WHETHER THE MASKS ARE STILL ITS OWN WAS NOT CHECKED.", flush=True)
    elif layers := check_masks(net, path):
        print(f"Masks of {layers} layers are still those of {path}.", flush=True)


def _compare(net: nn.Module, saved: PretrainingCheckpoint, buffers: tuple[str, ...]) -> list[str]:
    layers = {name: layer for name, layer in sparse_layers(net).items() if f"{name}.indices" in saved.state}
    if not layers:
        raise CheckpointError(f"no sparse layer of the net is one of {saved.path}")
    moved = [
        name
        for name, layer in layers.items()
        if not all(torch.equal(getattr(layer, b).cpu(), saved.state[f"{name}.{b}"]) for b in buffers)
    ]
    if moved:
        raise CheckpointError(
            f"the masks of {len(moved)} of {len(layers)} layers{_some(moved)} are not those of {saved.path}: something has "
            "written into the indices of a sparse layer"
        )
    return list(layers)


def _check_architecture(saved: PretrainingCheckpoint, net: nn.Module) -> None:
    theirs, ours = saved.bert.to_dict(), net.config.to_dict()  # type: ignore[operator,union-attr]
    other = [
        f"{key} {theirs[key]} instead of {ours[key]}" for key in ours if key not in _FREE and theirs[key] != ours[key]
    ]
    if other:
        raise CheckpointError(
            f"{saved.path} is of another architecture: {', '.join(other)}. Leave model.bert out, or give it the "
            "checkpoint's values."
        )


def _check_slope(saved: PretrainingCheckpoint, root: nn.Module, slope: SLoPeConfig | None) -> list[str]:
    """Names of the layers that become sparse with the checkpoint's masks; none from a dense checkpoint."""
    if saved.slope is None:
        return []
    if slope is None:
        raise CheckpointError(
            f"{saved.path} is of a 2:4 sparse model, the configuration is dense: use the sparse sibling (model.slope), or "
            "export the checkpoint and start from the dense weights (model.weights)"
        )
    for name in ("mask", "layer_masks"):
        theirs, own = getattr(saved.slope, name), getattr(slope, name)
        if own != theirs:
            raise CheckpointError(
                f"{saved.path} was made with slope.{name}={theirs!r}, this run has {own!r}: the masks stay those of the "
                "checkpoint, so give its value"
            )
    if saved.awake and _ranks(slope) != _ranks(saved.slope):
        raise CheckpointError(
            f"{saved.path} has awake adapters of rank {_ranks(saved.slope)}, this run asks for {_ranks(slope)}: they are part "
            "of the weights by now, so give the checkpoint's rank"
        )
    chosen = [choice.name.removeprefix(_PREFIX) for choice in choose_layers(root, slope) if choice.reason is None]
    theirs, names = set(saved.layers()), {name.removeprefix(_PREFIX) for name, _ in root.named_modules()}
    lost = [name for name in theirs if name in names and name not in chosen]
    new = [name for name in chosen if name not in theirs]
    if lost or new:
        raise CheckpointError(
            f"{saved.path} has other sparse layers: {len(lost)} of them would become dense here{_some(sorted(lost))}, "
            f"{len(new)} dense ones sparse{_some(new)}. Give include, exclude, keep_first_dense and keep_heads_dense of the "
            "checkpoint."
        )
    return chosen


def _expected(net: nn.Module, chosen: list[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the net's tensors will have, without adapters."""
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    for name in chosen:
        rows, columns = shapes.pop(f"{name}.weight")
        shapes |= {
            f"{name}.values": (rows, columns // 2),
            f"{name}.indices": (rows, columns // 8),
            f"{name}.backward_indices": (columns, rows // 8),
            f"{name}.adapter_active": (),
        }
    return shapes


def _check_tensors(
    saved: PretrainingCheckpoint, expected: Mapping[str, tuple[int, ...]], known: Mapping[str, Tensor]
) -> None:
    absent = [name for name in expected if name.startswith("bert.") and name not in known]
    if absent:
        raise CheckpointError(f"{saved.path} is damaged: it lacks {len(absent)} tensors of the encoder{_some(absent)}")
    for name, tensor in known.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{saved.path}: {name} has shape {tuple(tensor.shape)}, expected {expected[name]}: the file is damaged"
            )
        if name.rpartition(".")[2] in _MASKS:
            try:
                check_indices(tensor, name)
            except ValueError as error:
                raise CheckpointError(f"{saved.path}: {error}") from error


def _ranks(config: SLoPeConfig) -> Any:
    return (
        config.adapter_rank if config.adapter_rank_fraction is None else f"{config.adapter_rank_fraction} of the width"
    )


def _some(names: tuple[str, ...] | list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
