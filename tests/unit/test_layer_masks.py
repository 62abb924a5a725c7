"""Another kind of mask for some layers, by patterns on their names."""

import copy
import re

import pytest
import torch

from slope_pl import FadeCallback, SLoPeConfig, sparsify
from slope_pl.errors import ConversionError
from slope_pl.nn import layer_seed
from slope_pl.sparsity import make_mask
from tests.lightning.test_calibration import BATCHES, NAMES, expected_masks, masks_of
from tests.lightning.toy import QUIET, Net, Toy, assert_same, fit, make_trainer
from tests.unit.test_surgery import MODELS

pytestmark = QUIET


def test_kinds_of_masks_by_layer():
    """Each layer has the mask that its own kind gives; a second call finds nothing to do."""
    masks = {"*.mlp.c_proj": "random", "*.mlp.*": "transposable"}
    config = SLoPeConfig(seed=3, layer_masks=masks)
    model = MODELS["gpt2"]()
    dense = copy.deepcopy(model)
    layers = sparsify(model, config)
    kinds = {"mlp.c_proj": "random", "mlp.c_fc": "transposable"}
    for name, layer in layers.items():
        kind = kinds.get(name.split(".", 3)[3], "magnitude")
        weight = dense.get_submodule(name).weight.t()
        assert torch.equal(layer.forward_mask(), make_mask(kind, weight, layer_seed(3, name))), name
        assert f"mask={kind} 2:4" in repr(layer)
    assert sparsify(model, config) == layers
    with pytest.raises(ConversionError, match="mask='transposable' instead of 'magnitude'"):
        sparsify(model, SLoPeConfig(seed=3, layer_masks={"*.mlp.c_proj": "random"}))


@pytest.mark.parametrize(
    ("masks", "pattern"),
    [({"*.mpl.*": "random"}, "*.mpl.*"), ({"*": "random", "*.mlp.*": "transposable"}, "*.mlp.*")],
)
def test_a_pattern_of_masks_without_a_layer_is_an_error(masks, pattern):
    with pytest.raises(
        ConversionError, match=re.escape(f"layer_masks pattern '{pattern}' matches none of the 7 layers")
    ):
        sparsify(MODELS["gpt2"](), SLoPeConfig(layer_masks=masks))


def test_masks_by_activation_norms_have_the_kinds_of_their_layers(tmp_path):
    config = SLoPeConfig(mask_calibration_batches=BATCHES, layer_masks={NAMES[1]: "transposable"})
    module, _ = fit(tmp_path, config=config, max_steps=1)
    expected = expected_masks(Net()) | {NAMES[1]: expected_masks(Net(), "transposable")[NAMES[1]]}
    assert_same(masks_of(module), expected)


def test_a_fade_prepares_the_kinds_of_its_layers(tmp_path):
    fade = FadeCallback(2, SLoPeConfig(layer_masks={NAMES[1]: "transposable"}))
    make_trainer(tmp_path, fade, max_steps=3).fit(Toy())
    for i, (name, kind) in enumerate(zip(NAMES, ("magnitude", "transposable", "magnitude"), strict=True)):
        assert torch.equal(fade.masks()[name], make_mask(kind, Net().blocks[i].weight)), name
