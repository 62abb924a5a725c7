"""Models, patterns and norms that cannot be made sparse, dense or masked as asked."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from slope_pl import SLoPeConfig, dense_state_dict, densify, sparsify, sparsity_report
from slope_pl.baselines import FSTConfig, SRSTEConfig, mask_layers
from slope_pl.nn import SparseLinear, activation_norms, choose_layers
from tests.faults.bad_inputs.case import Case

CALIBRATED = SLoPeConfig(mask_calibration_batches=2)


def net(*widths: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b, dtype=dtype) for a, b in itertools.pairwise(widths)))


def case(name: str, call: Callable[[], object], *says: str) -> Case:
    return Case(name, lambda folder: call(), says)


def built(model: Any) -> Any:
    return model if isinstance(model, nn.Module) or not callable(model) else model()


def made(name: str, model: Any, *says: str, **settings: Any) -> Case:
    return case(name, lambda: sparsify(built(model), SLoPeConfig(**settings)), *says)


def with_norms(norms: Mapping[str, Tensor] | None, config: SLoPeConfig = CALIBRATED) -> Callable[[], object]:
    return lambda: sparsify(net(16, 16, 16), config, norms=norms)


def normed(replace: Callable[[nn.Linear], nn.Module]) -> Callable[[], nn.Module]:
    """A model whose only possible layer is replaced by something."""

    def build() -> nn.Module:
        model = net(16, 16, 16)
        model[1] = replace(model[1])
        return model

    return build


def sharing() -> nn.Module:
    model = net(16, 16, 16)
    model[1].weight = model[0].weight
    return model


def sharing_an_embedding() -> nn.Module:
    model = nn.Sequential(nn.Embedding(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    return model


def sparse(**settings: Any) -> nn.Module:
    model = net(16, 16, 16)
    sparsify(model, SLoPeConfig(**settings))
    return model


def masked() -> nn.Module:
    model = net(16, 16, 16)
    mask_layers(model, SRSTEConfig())
    return model


class Frozen(nn.Linear):
    """A subclass may use its weight in its own way."""


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def measured(batches: Any, model: nn.Module | None = None, **options: Any) -> Callable[[], object]:
    return lambda: activation_norms(model or net(16, 16, 16), SLoPeConfig(), batches, **options)


MODELS = [
    made("no model", None, "NoneType", "an nn.Module"),
    made("a state dict", {"weight": torch.ones(8, 8)}, "dict", "an nn.Module"),
    made("a list of layers", [nn.Linear(16, 16)], "list", "an nn.Module"),
    made("no layer", nn.Sequential(), "has no linear layer"),
    made("convolutions", nn.Sequential(nn.Conv2d(8, 8, 3)), "has no linear layer"),
    made("one layer", lambda: net(16, 16), "none of the 1", "first linear layer"),
    made("odd widths", lambda: net(16, 10, 10, 10), "none of the 3", "10x10", "multiples of 8"),
    made("lopsided", lambda: net(16, 16, 256), "lopsided", "none of the 2"),
    made("only a head", lambda: nn.ModuleDict({"first": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)}), "output head"),
    made("int8", lambda: int8(), "none of the 2", "float64, float32"),
    made("float8", lambda: net(16, 16, 16).to(torch.float8_e4m3fn), "none of the 2", "bfloat16"),
    case("meta, masked", lambda: mask_layers(net(16, 16, 16).to("meta"), SRSTEConfig()), "meta device", "materialise"),
    case("meta, counted", lambda: sparsity_report(unset()), "2 sparse layers", "meta device", "reset_parameters"),
    case("meta, densified", lambda: densify(unset()), "2 sparse layers", "meta device", "reset_parameters"),
    case("meta, exported", lambda: dense_state_dict(unset()), "2 sparse layers", "meta device", "reset_parameters"),
    made("weight norm", normed(parametrizations.weight_norm), "which may use", "none of the"),
    made("a subclass", normed(lambda _: Frozen(16, 16)), "a Frozen, which may use"),
    made("lazy", normed(lambda _: nn.LazyLinear(16)), "a LazyLinear"),
    made("tied layers", sharing, "weight is tied to 0"),
    made("tied to an embedding", sharing_an_embedding, "weight is tied to 0"),
    made("a layer by itself", nn.Linear(16, 16), "itself is a linear layer", "wrap it", keep_first_dense=False),
    made("masked already", masked, "'1' is a MaskedLinear, masked by SRSTEConfig", "unmask_layers"),
    made("another seed", sparse, "seed=0 instead of 3", "densify", seed=3),
    made("another rank", lambda: sparse(adapter_rank=4), "adapter_rank=4 instead of 0", "densify"),
    made("a rank above a side", lambda: net(64, 64, 16), "adapter_rank=32", "16x64", adapter_rank=32),
    made("a model in DDP's clothes", lambda: wrapped(), "wrapped as FSDP", "before distribution"),
    case("a config that is none", lambda: sparsify(net(16, 16, 16), 4), "int", "a mapping"),
    case("a config with a typo", lambda: sparsify(net(16, 16, 16), {"seeds": 1}), "'seeds'", "known are mask"),
]


def unset() -> nn.Module:
    model = net(16, 16, 16, 16).to("meta")
    sparsify(model, SLoPeConfig())
    return model.to_empty(device="cpu")


def int8() -> nn.Module:
    model = net(16, 16, 16)
    for layer in model:
        layer.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    return model


def wrapped() -> nn.Module:
    from torch.distributed.fsdp import FSDPModule

    model = net(16, 16, 16)
    model[1].__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    return model


PATTERNS = [
    made(
        "include nothing",
        lambda: net(16, 16, 16),
        "include pattern 'encoder.*'",
        "There are 2: 0, 1",
        include=["encoder.*"],
    ),
    made("exclude nothing", lambda: net(16, 16, 16), "exclude pattern 'head'", "There are 2", exclude=["head"]),
    made("exclude all", lambda: net(16, 16, 16), "excluded by pattern", "none of the 2", exclude=["*"]),
    made("include the excluded", lambda: net(16, 16, 16), "'1' is asked for", "excluded", include=["1"], exclude=["*"]),
    made("include a tied one", sharing, "'1' is asked for", "tied to 0", include=["1"]),
    made("include a subclass", normed(lambda _: Frozen(16, 16)), "'1' is asked for", "a Frozen", include=["1"]),
    made("include an odd one", lambda: net(16, 16, 12), "'1' is asked for", "12x16", include=["1"]),
    made(
        "include a module",
        lambda: nn.Sequential(net(16, 16, 16)),
        "pattern '0'",
        "There are 2: 0.0, 0.1",
        include=["0"],
    ),
]
NORMS = [
    case("norms missing", with_norms(None), "mask_calibration_batches=2", "norms=activation_norms"),
    case("norms unwanted", with_norms({"1": torch.ones(16)}, SLoPeConfig()), "mask_calibration_batches=0", "number of"),
    case("norms of other layers", with_norms({"0": torch.ones(16)}), "lack 1 layers (1", "measure them on this model"),
    case("norms of more layers", with_norms({"1": torch.ones(16), "7": torch.ones(8)}), "hold 1 layers (7"),
    case("norms of another width", with_norms({"1": torch.ones(8)}), "(8,)", "(16,)"),
    case("norms that are no tensors", with_norms({"1": [1.0] * 16}), "list", "a floating tensor"),
    case("norms in a list", with_norms([torch.ones(16)]), "list", "a mapping"),
    case("no batches", measured([]), "there is no batch"),
    case("batches that are none", measured(None), "NoneType", "batches"),
    case("a layer without input", measured([torch.ones(2, 16)], Branches()), "1 layers saw no input (c)", "exclude"),
    case("NaN in the data", measured([torch.full((2, 16), float("nan"))]), "'1'", "not finite"),
    case("norms of a sparse model", measured([torch.ones(2, 16)], sparse()), "sparse already", "dense model"),
]
BACK = [
    case("densify nothing", lambda: densify(None), "NoneType", "an nn.Module"),
    case("densify a sharded one", lambda: densify(wrapped()), "FSDP", "before distribution"),
    case("densify a layer by itself", lambda: densify(SparseLinear(16, 16)), "itself is a linear layer", "to_dense"),
    case("dense state of a path", lambda: dense_state_dict("model.ckpt"), "str", "an nn.Module"),
    case("report of nothing", lambda: sparsity_report(None), "NoneType", "an nn.Module"),
    case("choose of nothing", lambda: choose_layers(None, SLoPeConfig()), "NoneType", "an nn.Module"),
    case("mask a sparse model", lambda: mask_layers(sparse(), SRSTEConfig()), "SLoPe's sparse layers (1", "densify"),
    case("mask with SLoPe's config", lambda: mask_layers(net(16, 16, 16), SLoPeConfig()), "SLoPeConfig", "SRSTEConfig"),
    case("mask no feed-forward", lambda: mask_layers(net(16, 16, 16), FSTConfig()), "feed-forward", "targets"),
    case("mask a target that is not there", lambda: mask_layers(net(16, 16), FSTConfig(targets=["x"])), "'x'", "There"),
    case(
        "mask twice",
        lambda: mask_layers(masked(), SRSTEConfig(seed=3)),
        "'1' is masked already",
        "seed=3",
        "unmask_layers",
    ),
]
CASES = [*MODELS, *PATTERNS, *NORMS, *BACK]
