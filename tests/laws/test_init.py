"""Laws of layers: hashable descriptions; parameters are floating, a function of the key, and batch over keys."""

import nn_cases
import pytest
import torch
from rows.layers import UNET
from zoo import assert_trees_close

from functorch_gen import models, random, tree
from functorch_gen.transforms import vmap

LAYERS = [
    *[case.layer for case in nn_cases.CASES],
    models.ResBlock(2, 4, 3, num_heads=2, num_groups=2),
    models.SpatialAttention(4, 2, num_groups=2),
    UNET,
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_init_is_a_function_of_the_key(layer):
    params = layer.init(random.key(0))
    assert tree.equal(params, layer.init(random.key(0)))
    assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(params))
    other = layer.init(random.key(1))
    constant = {"GroupNorm", "LayerNorm", "RMSNorm"}  # ones and zeros, whatever the key
    if tree.leaves(params) and type(layer).__name__ not in constant:
        assert not tree.equal(params, other)


WITH_PARAMETERS = [layer for layer in LAYERS if tree.leaves(layer.init(random.key(0)))]


@pytest.mark.parametrize("layer", WITH_PARAMETERS, ids=lambda layer: type(layer).__name__)
def test_init_batches_over_keys(layer):
    keys = random.split(random.key(0), 3)
    # The samplers' transcendental functions: an ulp of float32 between vectorised and scalar code.
    expected = tree.stack([layer.init(key) for key in keys])
    assert_trees_close(vmap(layer.init)(keys), expected, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_layer_is_a_hashable_value(layer):
    with pytest.raises((AttributeError, TypeError)):
        layer.anything = 1
    assert hash(layer) == hash(layer)
    assert layer == layer
