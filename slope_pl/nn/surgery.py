"""Making a model sparse, and dense again: pure surgery, in place, by qualified name."""

import logging
import zlib
from collections import defaultdict
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from slope_pl.config import SLoPeConfig, as_config
from slope_pl.errors import ConversionError
from slope_pl.nn.eligibility import check_model
from slope_pl.nn.selection import all_names, choose_layers
from slope_pl.nn.sharding import whole_in_place
from slope_pl.nn.sparse_linear import SparseLinear

log = logging.getLogger(__name__)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers of a model by qualified name; a shared one once, under its first name."""
    check_model(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def sparsify(
    model: nn.Module,
    config: SLoPeConfig | None = None,
    *,
    norms: Mapping[str, Tensor] | None = None,
    masks_follow: bool = False,
) -> dict[str, SparseLinear]:
    """Replace the linear layers of a model by 2:4 sparse ones, in place.

    Which ones is :mod:`slope_pl.nn.selection`'s rule. Call it before the optimizer is made and before the model is wrapped
    for distribution. A second call finds nothing to do and returns the same mapping. Layers that stay dense are logged,
    one line a reason, at level INFO.

    Args:
        model: any module; Parameters of biases and everything else are kept as they are.
        config: defaults to ``SLoPeConfig()``.
        norms: of the input features, by layer, for masks by magnitude times norm: what
            :func:`slope_pl.nn.activation_norms` gives. With ``mask_calibration_batches`` they are needed.
        masks_follow: weights and masks are loaded into the sparse layers afterwards; without norms, masks by magnitude alone
            hold their place until then.

    Returns:
        qualified name -> layer, every sparse layer of the model.

    Raises:
        ConversionError: if no layer matches, a pattern matches nothing, an explicit request cannot be met, the model is
            wrapped or sharded already, it is sparse already by another configuration, or norms are missing or unwanted.
    """
    config = as_config(config) or SLoPeConfig()
    existing = sparse_layers(model)
    for name, layer in existing.items():
        own = config.for_layer(name)
        if layer.config != own:
            raise ConversionError(
                f"layer {name!r} is sparse already, with {_differences(layer.config, own)}; use one configuration, or "
                "densify the model first"
            )
    if existing:
        return existing
    refuse_wrapped(model)
    _refuse_other_methods(model)
    choices = choose_layers(model, config)
    if not choices:
        raise ConversionError(f"{type(model).__name__} has no linear layer to make sparse")
    chosen = {id(c.module): c.name for c in choices if c.reason is None}
    log_dense_layers([(c.name, c.reason) for c in choices if c.reason is not None])
    if not chosen:
        reasons = "; ".join(f"{c.name}: {c.reason}" for c in choices[:6])
        raise ConversionError(
            f"none of the {len(choices)} linear layers of {type(model).__name__} can be sparse: {reasons}"
        )
    _check_layer_masks(config, list(chosen.values()))
    _check_norms(norms, config, list(chosen.values()), masks_follow)
    made: dict[int, SparseLinear] = {}
    for name, old in list(all_names(model)):
        if id(old) in chosen:
            if id(old) not in made:
                first_name = chosen[id(old)]
                weight = old.get_parameter("weight")
                # Layer by layer: under ZeRO-3 no more than one dense weight is whole at a time.
                with whole_in_place(weight):
                    scale = None if norms is None else norms[first_name].to(weight.device)
                    made[id(old)] = SparseLinear.from_linear(
                        old, config.for_layer(first_name), layer_seed(config.seed, first_name), scale
                    )
                made[id(old)].shard_like(weight)
            replace_module(model, name, made[id(old)])
    return sparse_layers(model)


def _check_layer_masks(config: SLoPeConfig, chosen: list[str]) -> None:
    left = list(chosen)
    for pattern in config.layer_masks:
        matched = [name for name in left if fnmatchcase(name, pattern)]
        if not matched:
            raise ConversionError(
                f"layer_masks pattern {pattern!r} matches none of the {len(chosen)} layers that become sparse and no pattern "
                f"before it has matched. They are {', '.join(chosen[:6])}{', ...' if len(chosen) > 6 else ''}"
            )
        left = [name for name in left if name not in matched]


def _check_norms(norms: Mapping[str, Tensor] | None, config: SLoPeConfig, chosen: list[str], follow: bool) -> None:
    wanted = config.mask_calibration_batches
    if norms is None:
        if wanted and not follow:
            raise ConversionError(
                f"mask_calibration_batches={wanted}: masks are chosen by magnitude times activation norm, and no norms are "
                "given. Pass norms=activation_norms(model, config, batches) (a Trainer's fit does that by itself), or "
                "masks_follow=True where a checkpoint is loaded next"
            )
        return
    if not wanted:
        raise ConversionError(
            "norms are given, but mask_calibration_batches=0 says that masks are chosen by magnitude alone: set it to the "
            "number of batches that the norms were measured on, so that checkpoints say so too"
        )
    if not isinstance(norms, Mapping):
        raise ConversionError(f"norms: a mapping of layer names to tensors is expected, got a {type(norms).__name__}")
    for name, scale in norms.items():
        if not isinstance(scale, Tensor):
            raise ConversionError(
                f"norms[{name!r}]: a floating tensor (d_in,) is expected, got a {type(scale).__name__}"
            )
    for what, names in (("lack", set(chosen) - set(norms)), ("hold", set(norms) - set(chosen))):
        if names:
            raise ConversionError(
                f"the norms {what} {len(names)} layers ({min(names)}, ...) compared with the {len(chosen)} that become sparse: "
                "measure them on this model with this configuration"
            )


@torch.no_grad()
def densify(model: nn.Module) -> dict[str, nn.Module]:
    """Replace the sparse layers of a model by dense ones, in place: the inverse of :func:`sparsify`.

    Pruned weights are zeros in place; awake adapters are added into the weight (which then is no longer 2:4), sleeping
    ones are dropped. A layer that was a Hugging Face ``Conv1D`` becomes one again. A dense model is left as it is.

    Returns:
        qualified name -> new dense layer, one entry a replaced module; empty if there was none.

    Raises:
        ConversionError: if the model is wrapped for distribution, or was made on the meta device and has no values yet.
    """
    refuse_wrapped(model)
    check_drawn(sparse_layers(model))
    made: dict[int, nn.Module] = {}
    result: dict[str, nn.Module] = {}
    for name, old in list(all_names(model)):
        if isinstance(old, SparseLinear):
            if id(old) not in made:
                made[id(old)] = result[name] = old.to_dense()
                made[id(old)].made_dense_by_slope = True  # type: ignore[assignment]
            replace_module(model, name, made[id(old)])
    return result


def was_densified(model: nn.Module) -> bool:
    """Whether :func:`densify` made the model dense: callback and module then leave it so."""
    return any(hasattr(module, "made_dense_by_slope") for module in model.modules())


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model would have if it were dense; the model stays as it is.

    Names are those of the dense model (``layer.weight``), tensors are detached; awake adapters are added in.
    """
    check_drawn(sparse_layers(model))
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    for prefix, layer in all_names(model):
        if isinstance(layer, SparseLinear):
            own = f"{prefix}." if prefix else ""
            for name in layer.state_dict():
                if name != "bias":
                    del state[own + name]
            weight = layer.weight
            state[own + "weight"] = weight.t().contiguous() if layer.transposed else weight
    return state


def wake_adapters(model: nn.Module) -> int:
    """Wake the adapters of every sparse layer; returns how many layers woke."""
    return sum(layer.wake_adapters() for layer in sparse_layers(model).values())


def check_drawn(layers: Mapping[str, SparseLinear]) -> None:
    """Raise a ConversionError if one was made on the meta device and has neither values nor masks yet."""
    unset = [name for name, layer in layers.items() if not layer.is_drawn]
    if unset:
        raise ConversionError(
            f"{len(unset)} sparse layers ({unset[0]}, ...) were made on the meta device and have neither values nor masks: "
            "call reset_parameters() of each once it is on its device, or load a state dict. Lightning does so under FSDP2"
        )


def layer_seed(seed: int, name: str) -> int:
    """A layer's own seed: from the configured one and the qualified name, alike on every rank and machine.

    32 bits: torch's CPU generator looks at no more of a seed.
    """
    return zlib.crc32(f"{seed}:{name}".encode())


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one with that qualified name."""
    parent, _, child = name.rpartition(".")
    if not name:
        raise ConversionError(
            "the model itself is a linear layer: use SparseLinear.from_linear and to_dense, or wrap it in a module"
        )
    setattr(model.get_submodule(parent), child, new)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise a ConversionError if a model is wrapped or sharded for distribution."""
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel | FSDPModule):
            raise ConversionError(
                f"{name or 'the model'} is wrapped as {type(module).__name__} already: change layers before distribution"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ConversionError(f"parameter {name!r} is sharded already (DTensor): change layers before fully_shard")


def _refuse_other_methods(model: nn.Module) -> None:
    for name, module in model.named_modules():
        method = getattr(module, "masked_by", None)
        if method is not None:
            raise ConversionError(
                f"layer {name!r} is a {type(module).__name__}, masked by {method}: use one method a model, or "
                "unmask_layers(model) first"
            )


def _differences(old: SLoPeConfig, new: SLoPeConfig) -> str:
    a, b = old.to_dict(), new.to_dict()
    return ", ".join(f"{key}={a[key]!r} instead of {b[key]!r}" for key in a if a[key] != b[key])


def log_dense_layers(dense: list[tuple[str, str]]) -> None:
    """Log ``(name, reason)`` of the layers that stay dense, one line a reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in dense:
        by_reason[reason].append(name)
    for reason, names in by_reason.items():
        log.info(
            "%d linear layer%s dense: %s: %s",
            len(names),
            " stays" if len(names) == 1 else "s stay",
            reason,
            ", ".join(names),
        )
