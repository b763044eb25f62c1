"""jit: backward passes that differ by one factor for each example are computed once."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

import functorch_gen as fg
from functorch_gen import gan
from functorch_gen.transforms.tracing.backends import decomposed
from functorch_gen.transforms.tracing.trace import trace

ATEN = torch.ops.aten
COSTLY = (ATEN.mm.default, ATEN.convolution.default, ATEN.convolution_backward.default)


def leaky_relu(x):
    return F.leaky_relu(x, 0.2)


def convolutional(activation, params, x):
    """(b, 2, 4, 4) -> (b,), with a residual block."""
    h = F.conv2d(x, params["stem"], params["bias"], padding=1)
    h = h + F.conv2d(activation(h), params["block"], padding=1)
    h = F.conv2d(activation(h), params["down"], stride=2)
    return (activation(h).flatten(1) @ params["head"])[:, 0]


def perceptron(activation, params, x):
    """(b, 6) -> (b,)."""
    h = activation(x @ params["first"] + params["bias"])
    return (activation(h @ params["second"]) @ params["head"])[:, 0]


def problem(net, b=3, layout=None):
    sizes = {
        convolutional: {
            "stem": (3, 2, 3, 3),
            "bias": (3,),
            "block": (3, 3, 3, 3),
            "down": (4, 3, 2, 2),
            "head": (16, 1),
        },
        perceptron: {"first": (6, 5), "bias": (5,), "second": (5, 4), "head": (4, 1)},
    }[net]
    keys = fg.random.split(fg.random.key(0), len(sizes) + 1)
    draw = lambda key, shape: fg.random.normal(key, shape, torch.float64)
    params = {name: draw(key, shape) for key, (name, shape) in zip(keys, sizes.items())}
    params = {name: p.contiguous(memory_format=layout) if layout and p.ndim == 4 else p for name, p in params.items()}
    return params, draw(keys[-1], (b, 2, 4, 4) if net is convolutional else (b, 6))


def loss(net, activation, params, x):
    """Of the logits, and of their slopes."""
    logit, slope = gan.value_and_input_gradient(partial(net, activation, params), x)
    return (F.softplus(-logit) + 0.3 * slope.square().flatten(1).sum(1)).mean()


def costly(fun, *args):
    """How many products and convolutions the compiled program has; a convolution's two gradients are two."""
    graph = decomposed(trace(fun, args).graph).graph
    nodes = [n for n in graph.nodes if n.target in COSTLY]
    return sum(sum(n.args[-1][:2]) if n.target is COSTLY[2] else 1 for n in nodes)


def flat(net, activation, params):
    """Gradient in the parameters as a function of leaves."""
    leaves, treedef = fg.tree.flatten(params)
    gradient = fg.grad(partial(loss, net, activation))
    return lambda x, *leaves: gradient(fg.tree.unflatten(treedef, leaves), x), leaves


@pytest.mark.parametrize(
    ("net", "count", "curved"), [(convolutional, 15, 20), (perceptron, 13, 14)], ids=["convolutional", "perceptron"]
)
def test_the_second_way_back_is_left_out_where_the_network_is_piecewise_linear(net, count, curved):
    params, x = problem(net)
    for activation, expected in ((leaky_relu, count), (torch.relu, count), (torch.tanh, curved)):
        fun, leaves = flat(net, activation, params)
        assert costly(fun, x, *leaves) == expected


@pytest.mark.parametrize(
    ("net", "layout"),
    [(convolutional, torch.contiguous_format), (convolutional, torch.channels_last), (perceptron, None)],
    ids=["contiguous", "channels_last", "perceptron"],
)
@pytest.mark.parametrize("activation", [leaky_relu, torch.tanh], ids=["leaky_relu", "tanh"])
@pytest.mark.parametrize("b", [1, 4, 6])
def test_gradients_are_those_of_the_program_as_it_stands(net, b, activation, layout):
    """Compared on the decomposed graph itself: no code is generated. Batches are of the sizes of other axes too."""
    params, x = problem(net, b, layout)
    fun, leaves = flat(net, activation, params)
    traced = trace(fun, (x, *leaves))
    found = decomposed(traced.graph)(x, *leaves, *traced.constants)
    for a, e in zip(found, fg.tree.leaves(fun(x, *leaves)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


def test_a_loss_of_several_kinds_in_one_program():
    """Two batches, a penalty of one of them, weights for each example, and the logits returned as well."""
    params, x = problem(convolutional)
    net = partial(convolutional, leaky_relu)

    def fun(params, x, weight):
        logit, slope = gan.value_and_input_gradient(partial(net, params), x)
        other = net(params, x.flip(0))
        return (weight * logit).sum() + slope.pow(4).sum() + (other * logit.detach()).sum(), logit

    weight = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    gradient = fg.grad(fun, has_aux=True)
    found, expected = fg.jit(gradient)(params, x, weight), gradient(params, x, weight)
    for a, e in zip(fg.tree.leaves(found), fg.tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


def test_both_turns_of_a_gan_in_one_compiled_step():
    sizes = {"channels": (4, 8), "num_blocks": 1, "num_classes": 3}
    d, g = fg.models.DCGANDiscriminator(1, 4, **sizes), fg.models.DCGANGenerator(1, 4, latent_dim=2, **sizes)
    keys = fg.random.split(fg.random.key(0), 4)
    label, image = torch.arange(5) % 3, fg.random.normal(keys[0], (5, 1, 4, 4))

    def d_loss(params, g_params, key, batch):
        critic = partial(d, params)
        real, slope = gan.value_and_input_gradient(critic, batch, label)
        fake, fake_slope = gan.value_and_input_gradient(
            critic, g(g_params, fg.random.normal(key, (5, 2)), label), label
        )
        penalty = (slope.square() + fake_slope.square()).sum((1, 2, 3))
        return (gan.d_relativistic(real, fake) + penalty).mean()

    def g_loss(g_params, params, key, batch):
        fake = d(params, g(g_params, fg.random.normal(key, (5, 2)), label), label)
        return gan.g_relativistic(d(params, batch, label), fake).mean()

    tx = fg.optim.sgd(0.1)
    d_params, g_params = (
        fg.tree.map(lambda x: x + 0.05, net.init(k)) for net, k in zip((d, g), keys[1:3], strict=True)
    )
    state = gan.init_state(d_params, g_params, tx, tx, keys[3])
    step = gan.make_step(d_loss, g_loss, tx, tx)
    found, expected = fg.jit(step)(state, image), step(state, image)
    for a, e in zip(fg.tree.leaves(found), fg.tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=1e-6)
