"""FSDP2: which modules of a net become units of sharding."""

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from slope_pl.nn import sparse_layers

# Methods of a net that are called in place of forward: FSDP2 gathers the weights for those it knows.
_OTHER_FORWARDS = ("hidden_states", "generate")


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the module or to a part of it."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def shard(module: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Apply ``fully_shard`` to every block of a LightningModule's nets, and to the nets.

    What is not in a block is gathered with the net. A module that is sharded already is left as it is.

    Args:
        module: whose children are the nets; converted already, as sparse layers cannot be made of sharded ones.
        mesh: the data-parallel dimension, ``device_mesh["data_parallel"]`` in ``configure_model``.

    Returns:
        the qualified names of the units.
    """
    if is_fully_sharded(module):
        return []
    _say_what_is_unbuilt(module)
    units = []
    for name, net in module.named_children():
        if not any(True for _ in net.parameters()):
            continue
        for path, block in blocks(net, name):
            _shard(block, mesh)
            units.append(path)
        if not isinstance(net, nn.ModuleList):
            _shard(net, mesh)
            units.append(name)
            for method in _OTHER_FORWARDS:
                if hasattr(net, method):
                    register_fsdp_forward_method(net, method)
    return units


def _say_what_is_unbuilt(module: nn.Module) -> None:
    unbuilt = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if not unbuilt:
        return
    rank_zero_warn(
        f"{len(unbuilt)} parameters ({unbuilt[0]}, ...) are on the meta device. Lightning then empties the whole model and "
        "calls each module's reset_parameters, that of a sparse layer draws it as its dense constructor would and chooses its "
        "masks: what a parent or pretrained weights have put there is lost, unless a checkpoint is restored. To start as on "
        "one device, build it without torch.device('meta'); where a device cannot hold it whole, with torch.device('cpu')."
    )


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(module, mesh=mesh)
    for layer in sparse_layers(module).values():
        layer.note_sharding()  # at once: until then it holds on to the whole of its values


def blocks(net: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """The entries of the outermost ``nn.ModuleList``s that have parameters, by qualified name: a transformer's layers."""
    children = [(f"{name}.{key}".lstrip("."), child) for key, child in net.named_children()]
    if isinstance(net, nn.ModuleList):
        return [(path, child) for path, child in children if any(True for _ in child.parameters())]
    return [found for path, child in children for found in blocks(child, path)]
