"""What a model holds: parameters, stored bytes and densities, counted, not estimated."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slope_pl import ops
from slope_pl.nn.selection import is_linear
from slope_pl.nn.sharding import full_bytes, full_numel
from slope_pl.nn.sparse_linear import SparseLinear
from slope_pl.nn.surgery import check_drawn, sparse_layers


@dataclass(frozen=True)
class SparsityReport:
    """Counts of a model; a parameter or buffer that several modules share counts once.

    Attributes:
        sparse_layers: number of 2:4 layers.
        dense_layers: number of dense linear layers: ``nn.Linear``, its subclasses, Hugging Face's ``Conv1D``.
        kept_parameters: trainable values of the sparse weights.
        pruned_entries: entries of the sparse weights that are not stored.
        adapter_parameters: of the low-rank adapters, asleep or awake.
        dense_parameters: everything else: dense layers, biases, embeddings, norms.
        stored_bytes: of the parameters and persistent buffers, as in a checkpoint's model state.
        dense_bytes: what the same model would store with all its linear layers dense and without adapters.
        forward_density: kept share of the sparse weights' entries: 0.5 by construction.
        backward_density: share that the input gradient is multiplied with: about 0.406, 0.5 for transposable masks.
    """

    sparse_layers: int
    dense_layers: int
    kept_parameters: int
    pruned_entries: int
    adapter_parameters: int
    dense_parameters: int
    stored_bytes: int
    dense_bytes: int
    forward_density: float
    backward_density: float

    @property
    def total_parameters(self) -> int:
        """Everything trainable or frozen that is stored: kept values, adapters and dense parameters."""
        return self.kept_parameters + self.adapter_parameters + self.dense_parameters

    def rows(self) -> list[tuple[str, str]]:
        """The report as label and text, for a table; a dense model has nothing to say of sparse weights."""
        if not self.sparse_layers:
            return [
                ("linear layers, all dense", f"{self.dense_layers:,}"),
                ("parameters", f"{self.dense_parameters:,}"),
                ("stored bytes", f"{self.stored_bytes:,}"),
            ]
        return [
            ("2:4 linear layers (dense ones)", f"{self.sparse_layers:,} ({self.dense_layers:,})"),
            ("kept values of 2:4 weights", f"{self.kept_parameters:,}"),
            ("pruned entries, not stored", f"{self.pruned_entries:,}"),
            ("adapter parameters", f"{self.adapter_parameters:,}"),
            ("dense parameters", f"{self.dense_parameters:,}"),
            ("stored bytes (if all dense)", f"{self.stored_bytes:,} ({self.dense_bytes:,})"),
            ("density forward / backward", f"{self.forward_density:.4f} / {self.backward_density:.4f}"),
        ]


def sparsity_report(model: nn.Module) -> SparsityReport:
    """Count a model's sparse and dense parameters, bytes and densities.

    Densities are counted from the masks themselves; a model without sparse layers has densities 1.
    """
    layers = sparse_layers(model)
    check_drawn(layers)
    kept = adapters = forward = backward = entries = dense_bytes = stored = 0
    own: set[int] = set()
    for layer in layers.values():
        forward += int(layer.forward_mask().sum())
        backward += int(layer.backward_mask().sum())
        entries += layer.out_features * layer.in_features
        dense_bytes += layer.out_features * layer.in_features * layer.values.element_size()
        kept += full_numel(layer.values)
        parts: list[Tensor] = [layer.values, layer.indices, layer.backward_indices, layer.adapter_active]
        for adapter in (layer.adapter_down, layer.adapter_up):
            if adapter is not None:
                adapters += full_numel(adapter)
                parts.append(adapter)
        stored += sum(map(full_bytes, parts))
        own.update(id(part) for part in parts)
    others = {id(tensor): tensor for tensor in _persistent(model) if id(tensor) not in own}
    other_bytes = sum(map(full_bytes, others.values()))
    return SparsityReport(
        sparse_layers=len(layers),
        dense_layers=sum(isinstance(module, nn.Linear) or is_linear(module) for module in model.modules()),
        kept_parameters=kept,
        pruned_entries=entries - forward,
        adapter_parameters=adapters,
        dense_parameters=sum(full_numel(t) for t in others.values() if isinstance(t, nn.Parameter)),
        stored_bytes=stored + other_bytes,
        dense_bytes=dense_bytes + other_bytes,
        forward_density=forward / entries if entries else 1.0,
        backward_density=backward / entries if entries else 1.0,
    )


def backend_lines(layers: dict[str, SparseLinear], device_type: str, dtype: torch.dtype | None) -> list[str]:
    """Which backend multiplies how many layers, a line each, and why not a faster one.

    Args:
        layers: qualified name -> layer.
        device_type: where they will run.
        dtype: of their inputs after autocast; None: of each layer's values.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        place = ops.Place(device_type, dtype or layer.values.dtype, layer.out_features, layer.in_features)
        backend = ops.resolve_backend(layer.config.backend, *place)
        asked_for = layer.config.backend != "auto" or backend != "reference"
        groups.setdefault((backend, "" if asked_for else ops.reasons_against(place)), []).append(name)
    lines = []
    for (backend, reasons), names in groups.items():
        which = f"{len(names)} layers" if len(names) > 1 else f"layer {names[0]}"
        slower = f", exact but slower than dense ({reasons})" if reasons else ""
        lines.append(f"products of {which} run on the {backend} backend{slower}")
    return lines


def _persistent(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers that a state dict holds."""
    buffers = [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    return [*model.parameters(), *buffers]
