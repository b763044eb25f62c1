"""Generator and discriminator of images against modules of torch.nn, with labels, at other sizes."""

import pytest
import torch
from torch.nn import functional as F

from functorch_gen import random, tree
from functorch_gen.models import DCGANDiscriminator, DCGANGenerator, PlainResBlock
from functorch_gen.transforms import grad, jit, vmap

F64 = torch.float64


def normal(seed, *shape):
    return random.normal(random.key(seed), shape, F64)


def build(net, seed=0):
    """Parameters in general position: those that start at zero too."""
    params = tree.cast(net.init(random.key(seed)), F64)
    vector, unravel = tree.ravel(params)
    return unravel(vector + 0.1 * normal(seed + 1, len(vector)))


def load(modules, params):
    """The parameters into a dict of torch modules of the same names."""
    held = torch.nn.ModuleDict(modules).double()
    held.load_state_dict(tree.names(params))
    return held


def act(x):
    return F.leaky_relu(x, 0.2)


def test_generator_equals_torch_modules():
    net = DCGANGenerator(2, (8, 4), channels=(3, 4, 5), num_classes=3, latent_dim=6)
    params, z, label = build(net), normal(5, 4, 6), torch.tensor([0, 2, 1, 1])
    up = lambda a, b: torch.nn.ConvTranspose2d(a, b, 4, 2, 1)
    f = load(
        {
            "embed": torch.nn.Embedding(3, 6),
            "start": torch.nn.Linear(12, 10),
            "up1": up(5, 4),
            "up0": up(4, 3),
            "head": torch.nn.Conv2d(3, 2, 3, padding=1),
        },
        params,
    )
    h = f["start"](torch.cat([z, f["embed"](label)], 1)).reshape(4, 5, 2, 1)
    expected = torch.tanh(f["head"](act(f["up0"](act(f["up1"](act(h)))))))
    torch.testing.assert_close(net(params, z, label), expected, rtol=1e-12, atol=1e-13)
    assert expected.shape == (4, 2, 8, 4)


def test_discriminator_equals_torch_modules():
    """The label's part is the projection on the features."""
    net = DCGANDiscriminator(2, (8, 4), channels=(3, 4, 5), num_classes=3)
    params, x, label = build(net), normal(5, 4, 2, 8, 4), torch.tensor([0, 2, 1, 1])
    f = load(
        {
            "stem": torch.nn.Conv2d(2, 3, 3, padding=1),
            "down0": torch.nn.Conv2d(3, 4, 4, 2, 1),
            "down1": torch.nn.Conv2d(4, 5, 4, 2, 1),
            "features": torch.nn.Linear(10, 5),
            "head": torch.nn.Linear(5, 1),
            "embed": torch.nn.Embedding(3, 5),
        },
        params,
    )
    phi = act(f["features"](act(f["down1"](act(f["down0"](act(f["stem"](x)))))).flatten(1)))
    expected = f["head"](phi)[:, 0] + (f["embed"](label) * phi).mean(1)
    torch.testing.assert_close(net(params, x, label), expected, rtol=1e-12, atol=1e-13)
    plain = DCGANDiscriminator(2, (8, 4), channels=(3, 4, 5))
    torch.testing.assert_close(plain(params, x), f["head"](phi)[:, 0], rtol=1e-12, atol=1e-13)


def test_residual_block_equals_torch_modules_and_starts_as_the_identity():
    block, x = PlainResBlock(3), normal(5, 2, 3, 4, 4)
    params = build(block)
    f = load({name: torch.nn.Conv2d(3, 3, 3, padding=1) for name in ("conv1", "conv2")}, params)
    torch.testing.assert_close(block(params, x), x + f["conv2"](act(f["conv1"](act(x)))), rtol=1e-12, atol=1e-13)
    assert torch.equal(block(block.init(random.key(0)), x.float()), x.float())


@pytest.mark.parametrize("net", [DCGANGenerator(1, 4, channels=(3, 4), latent_dim=2), DCGANDiscriminator(1, 4, (3, 4))],
                         ids=["generator", "discriminator"])  # fmt: skip
def test_blocks_stand_at_every_resolution_and_change_nothing_at_first(net):
    deep = type(net)(**{**net.__dict__, "num_blocks": 2})
    params, more = net.init(random.key(0)), deep.init(random.key(0))
    assert sorted(more.keys() - params.keys()) == ["block0_0", "block0_1", "block1_0", "block1_1"]
    x = torch.ones(2, 2) if isinstance(net, DCGANGenerator) else torch.ones(2, 1, 4, 4)
    assert torch.equal(net(params, x), deep(more, x))
    slopes = grad(lambda p: deep(p, x).square().sum())(more)
    assert all(bool(slopes[name]["conv2"]["weight"].abs().sum() > 0) for name in more if name.startswith("block"))


def test_minibatch_standard_deviation_sees_the_group():
    """A repeated example has none: the logit is that of the features beside sqrt(eps)."""
    net = DCGANDiscriminator(1, 4, (3, 4), group_size=2)
    params = build(net)
    x, other = normal(5, 1, 1, 4, 4), normal(6, 1, 1, 4, 4)
    alone, twice = net(params, x), net(params, torch.cat([x, x]))
    torch.testing.assert_close(twice, alone.expand(2), rtol=1e-12, atol=1e-13)
    assert abs(float(net(params, torch.cat([x, other]))[0] - alone[0])) > 1e-3
    assert params["features"]["weight"].shape == (4, 5 * 2 * 2)


def test_images_differ_by_label_and_lie_in_the_open_interval():
    net = DCGANGenerator(1, 8, channels=(4, 8), num_classes=10, latent_dim=3)
    params = net.init(random.key(0))
    images = net(params, torch.zeros(10, 3), torch.arange(10))
    assert images.abs().max() < 1
    assert len({tuple(image.flatten().tolist()) for image in images}) == 10


def test_one_size_for_all_channels_is_a_network_of_one_resolution():
    g, d = DCGANGenerator(3, 5, channels=(4,), latent_dim=2), DCGANDiscriminator(3, 5, channels=(4,))
    images = g(g.init(random.key(0)), torch.ones(2, 2))
    assert images.shape == (2, 3, 5, 5)
    assert d(d.init(random.key(0)), images).shape == (2,)
    assert hash(DCGANGenerator(3, [5, 5], [4])) == hash(DCGANGenerator(3, (5, 5), (4,)))


def test_the_pair_is_one_graph_and_maps_over_seeds():
    g, d = DCGANGenerator(1, 4, (2, 3), 1, latent_dim=2), DCGANDiscriminator(1, 4, (2, 3), 1)
    play = lambda d_params, g_params, z: d(d_params, g(g_params, z))
    keys, z = random.split(random.key(0), 3), normal(1, 2, 2).float()
    d_params, g_params = vmap(d.init)(keys), vmap(g.init)(keys)
    together = vmap(play, in_dims=(0, 0, None))(d_params, g_params, z)
    for i in range(3):
        alone = play(tree.map(lambda p, i=i: p[i], d_params), tree.map(lambda p, i=i: p[i], g_params), z)
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-6)
    compiled = jit(play, backend="aten")
    params = d.init(random.key(0)), g.init(random.key(1))
    torch.testing.assert_close(compiled(*params, z), play(*params, z), rtol=1e-5, atol=1e-6)
    assert compiled.traces == 1


def test_wrong_sizes_and_labels_are_refused():
    g, d = DCGANGenerator(1, 4, (2, 3), num_classes=3, latent_dim=2), DCGANDiscriminator(1, 4, (2, 3))
    g_params, d_params = g.init(random.key(0)), d.init(random.key(0))
    z, x = torch.ones(2, 2), torch.ones(2, 1, 4, 4)
    for call, kind, message in (
        (
            lambda: DCGANGenerator(1, 6, (2, 3, 4)),
            ValueError,
            "DCGANGenerator: expected image_size divisible by 4, got 6",
        ),
        (lambda: DCGANDiscriminator(0, 4), ValueError, "DCGANDiscriminator: expected image_channels >= 1, got 0"),
        (lambda: DCGANDiscriminator(1, 4, ()), ValueError, "DCGANDiscriminator: expected channels with at least 1"),
        (lambda: DCGANGenerator(1, 4, latent_dim=0), ValueError, "DCGANGenerator: expected latent_dim >= 1, got 0"),
        (lambda: DCGANDiscriminator(1, 4, group_size=-1), ValueError, "expected group_size >= 0, got -1"),
        (lambda: DCGANGenerator(1, 4, num_classes=0), ValueError, "DCGANGenerator: expected num_classes >= 1, got 0"),
        (lambda: PlainResBlock(0), ValueError, "PlainResBlock: expected channels >= 1, got 0"),
        (lambda: g(g_params, z), ValueError, r"DCGANGenerator: label: expected labels \(b,\), got None"),
        (lambda: g(g_params, z, torch.zeros(2)), TypeError, "DCGANGenerator: label: expected an int64 or int32 tensor"),
        (lambda: g(g_params, z, torch.zeros(3).long()), ValueError, r"DCGANGenerator: label: expected shape \(b=2,\)"),
        (
            lambda: g(g_params, z[:, :1], None),
            ValueError,
            r"DCGANGenerator: z: expected shape \(b, d=2\), got \(2, 1\)",
        ),
        (lambda: d(d_params, x, torch.zeros(2).long()), ValueError, "label: expected no label without num_classes"),
        (lambda: d(d_params, x[..., :3]), ValueError, r"DCGANDiscriminator: x: expected shape \(b, c=1, h=4, w=4\)"),
    ):
        with pytest.raises(kind, match=message):
            call()
