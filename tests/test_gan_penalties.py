"""Regularisers of the two players against closed forms, loops and torch's double backward."""

import math

import pytest
import torch

from functorch_gen import gan, nn, random, tree
from functorch_gen.models import DCGANDiscriminator
from functorch_gen.transforms import grad, jacrev

F64 = torch.float64


def normal(seed, *shape):
    return random.normal(random.key(seed), shape, F64)


def four_errors(samples):
    """Four standard errors of the mean."""
    return 4 * float(samples.std() / len(samples) ** 0.5)


W = torch.tensor([3.0, -1.0, 2.0], dtype=F64)


def linear(x):
    return x @ W


@pytest.mark.parametrize("penalty", [gan.r1_penalty, gan.r2_penalty], ids=["r1", "r2"])
def test_of_a_linear_discriminator_it_is_half_gamma_the_squared_weight(penalty):
    found = penalty(linear, normal(0, 5, 3), gamma=0.7)
    torch.testing.assert_close(found, torch.full((5,), 0.35 * 14.0, dtype=F64), rtol=1e-14, atol=0)


def test_r1_of_a_quadratic_discriminator():
    """D = x^T A x / 2 has the gradient A x, A symmetric."""
    a, x = normal(0, 4, 4), normal(1, 6, 4)
    a = a + a.mT
    found = gan.r1_penalty(lambda x: ((x @ a) * x).sum(1) / 2, x)
    torch.testing.assert_close(found, ((x @ a) ** 2).sum(1) / 2, rtol=1e-13, atol=0)


def test_r1_and_its_gradient_are_those_of_torchs_double_backward():
    """Of a convolutional discriminator with labels, example by example, by torch.autograd."""
    net = DCGANDiscriminator(1, 4, channels=(3, 4), num_blocks=1, num_classes=3)
    params = tree.cast(net.init(random.key(0)), F64)
    x, label = normal(1, 5, 1, 4, 4), torch.tensor([0, 2, 1, 1, 0])
    ours = lambda params: gan.r1_penalty(lambda x, y: net(params, x, y), x, label, gamma=2.0)

    leaves = tree.map(lambda p: p.clone().requires_grad_(), params)
    rows = []
    for i in range(5):
        xi = x[i : i + 1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(leaves, xi, label[i : i + 1]).sum(), xi, create_graph=True)
        rows.append(slope.square().sum())
    theirs = torch.stack(rows)
    torch.testing.assert_close(ours(params), theirs.detach(), rtol=1e-12, atol=0)
    expected = torch.autograd.grad(theirs.mean(), tree.leaves(leaves), allow_unused=True)
    for found, slope in zip(tree.leaves(grad(lambda p: ours(p).mean())(params)), expected, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if slope is None else slope, rtol=1e-10, atol=1e-14)


def test_the_gradient_is_that_of_each_example_alone():
    """Though minibatch standard deviation lets each logit see the others."""
    layer = nn.MinibatchStdDev(None)
    critic = lambda x: (layer({}, x) ** 2).sum(1)
    x = normal(0, 4, 2)
    alone = torch.stack([torch.func.grad(lambda row: critic(row[None])[0])(row) for row in x])
    torch.testing.assert_close(gan.input_gradient(critic, x), alone, rtol=1e-14, atol=0)
    logits, slopes = gan.value_and_input_gradient(critic, x)
    assert torch.equal(slopes, gan.input_gradient(critic, x))
    torch.testing.assert_close(logits, torch.cat([critic(x[i : i + 1]) for i in range(len(x))]), rtol=1e-14, atol=0)
    together = torch.func.grad(lambda x: critic(x).sum())(x)
    assert not torch.allclose(together, alone)


@pytest.mark.parametrize("center", [0.0, 1.0, 2.5])
def test_gradient_penalty_of_a_linear_critic(center):
    found = gan.gradient_penalty(linear, random.key(0), normal(1, 5, 3), normal(2, 5, 3), center=center)
    torch.testing.assert_close(found, torch.full((5,), (14**0.5 - center) ** 2, dtype=F64), rtol=1e-14, atol=0)


def test_gradient_penalty_looks_at_uniform_points_of_the_segments():
    """D = |x|^2 / 2 has the gradient x, so a zero-centred penalty is |x|^2; on the way from 0 to v it is (s |v|)^2."""
    v = torch.tensor([3.0, 4.0], dtype=F64).expand(4000, 2)
    critic = lambda x: x.square().sum(1) / 2
    share = gan.gradient_penalty(critic, random.key(0), v, torch.zeros_like(v), center=0.0).sqrt() / 5
    assert share.min() >= 0
    assert share.max() <= 1
    for k in (1, 2, 3):
        assert abs(share.pow(k).mean() - 1 / (k + 1)) < four_errors(share.pow(k))


def test_gradient_penalty_takes_labels_and_images():
    critic = lambda x, label: (label + 1) * x.sum((1, 2, 3))
    label, x = torch.arange(3), normal(0, 3, 1, 2, 2)
    found = gan.gradient_penalty(critic, random.key(0), x, -x, label)
    torch.testing.assert_close(found, (2.0 * torch.arange(1, 4, dtype=F64) - 1) ** 2, rtol=1e-14, atol=0)


def test_what_the_critic_also_takes_may_be_a_tree():
    """Labels and whatever belongs to them, each example with its own; None is nothing."""
    condition = {"scale": normal(1, 4), "shift": (normal(2, 4, 3), None)}
    critic = lambda x, c: torch.tanh((x + c["shift"][0]) @ W) * c["scale"]
    x = normal(0, 4, 3)
    logits, slopes = gan.value_and_input_gradient(critic, x, condition)
    torch.testing.assert_close(logits, critic(x, condition), rtol=1e-14, atol=0)
    torch.testing.assert_close(slopes, torch.func.grad(lambda x: critic(x, condition).sum())(x), rtol=1e-13, atol=0)
    zero = gan.gradient_penalty(critic, random.key(0), x, x, condition, center=0.0)
    torch.testing.assert_close(zero, slopes.square().sum(1), rtol=1e-13, atol=0)


def test_gradient_penalty_is_smooth_where_the_slope_is_zero():
    def loss(scale):
        x = torch.zeros(1, 2, dtype=F64)
        return gan.gradient_penalty(lambda x: scale * x.square().sum(1), random.key(0), x, x).sum()

    scale = torch.tensor(1.0, dtype=F64)
    assert loss(scale) == 1
    assert grad(loss)(scale) == 0
    assert grad(grad(loss))(scale) == 0


def test_path_lengths_of_a_linear_generator():
    """E |A^T y|^2 = |A|_F^2."""
    a = normal(0, 5, 3)
    squared = gan.path_lengths(lambda z: z @ a.mT, random.key(1), torch.zeros(20000, 3, dtype=F64)).square()
    assert abs(squared.mean() - a.square().sum()) < four_errors(squared)
    variance = 2 * (a @ a.mT).square().sum()  # of a quadratic form of normal draws
    assert abs(squared.var() / variance - 1) < 0.1


def test_path_lengths_of_a_curved_generator():
    """E |J(z)^T y|^2 = |J(z)|_F^2, J by jacrev."""
    a, z = normal(0, 4, 3), normal(1, 3)
    generator = lambda z: torch.tanh(z @ a.mT).reshape(-1, 1, 2, 2)
    squared = gan.path_lengths(generator, random.key(2), z.expand(20000, 3)).square()
    jacobian = jacrev(lambda z: generator(z[None])[0].flatten())(z)
    assert abs(squared.mean() - jacobian.square().sum()) < four_errors(squared)


def test_path_length_penalty_follows_its_running_mean():
    generator, mean, expected = lambda z: 3 * z, torch.tensor(0.0, dtype=F64), 0.0
    for n in range(5):
        key = random.key(n)
        lengths = gan.path_lengths(generator, key, torch.zeros(7, 2, dtype=F64))
        penalty, mean = gan.path_length_penalty(generator, key, torch.zeros(7, 2, dtype=F64), mean, decay=0.9)
        expected = 0.9 * expected + 0.1 * float(lengths.mean())
        assert float(mean) == pytest.approx(expected, rel=1e-14)
        torch.testing.assert_close(penalty, (lengths - expected) ** 2, rtol=1e-13, atol=0)


def test_the_mean_of_path_lengths_is_a_constant_to_the_gradient():
    """d/ds (s l - a)^2 = 2 (s l - a) l, l the length at s = 1."""
    z, key, start = torch.zeros(1, 2, dtype=F64), random.key(0), torch.tensor(0.5, dtype=F64)
    length = float(gan.path_lengths(lambda z: z, key, z))
    slope = grad(lambda s: gan.path_length_penalty(lambda z: s * z, key, z, start)[0].sum())(torch.ones((), dtype=F64))
    mean = 0.99 * 0.5 + 0.01 * length
    assert float(slope) == pytest.approx(2 * (length - mean) * length, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_penalties_keep_the_dtype(dtype):
    x = normal(0, 2, 3).to(dtype)
    w = W.to(dtype)
    assert gan.r1_penalty(lambda x: x @ w, x).dtype == dtype
    assert gan.gradient_penalty(lambda x: x @ w, random.key(0), x, -x).dtype == dtype
    penalty, mean = gan.path_length_penalty(lambda z: z * 2, random.key(0), x, torch.tensor(0.0))
    assert (penalty.dtype, mean.dtype) == (dtype, torch.float32)
    assert math.isfinite(float(mean))


def test_wrong_arguments_are_refused():
    x = torch.zeros(2, 3)
    for call, kind, message in (
        (lambda: gan.r1_penalty(lambda x: x, x), ValueError, r"input_gradient: logits: expected shape \(b=1,\), got"),
        (lambda: gan.r1_penalty(linear, x.long()), TypeError, "input_gradient: x: expected a floating-point tensor"),
        (lambda: gan.r1_penalty(linear, x, gamma=-1.0), ValueError, "r1_penalty: expected 0 <= gamma"),
        (lambda: gan.r2_penalty(linear, x, gamma=-1.0), ValueError, "r2_penalty: expected 0 <= gamma"),
        (
            lambda: gan.gradient_penalty(linear, random.key(0), x, x[:1]),
            ValueError,
            r"gradient_penalty: fake: expected shape \(2, 3\), as real has, got \(1, 3\)",
        ),
        (
            lambda: gan.r1_penalty(linear, torch.ones(())),
            ValueError,
            r"input_gradient: x: expected shape \(b, ...\), got",
        ),
        (
            lambda: gan.r1_penalty(lambda x, c: x.sum(1), x, {"label": torch.arange(3)}),
            ValueError,
            r"input_gradient: inputs: '0.label': expected a tensor \(b=2, ...\), got \(3,\)",
        ),
        (
            lambda: gan.path_lengths(lambda z: z.sum(), random.key(0), x),
            ValueError,
            r"path_lengths: expected images \(b=2, ...\), got \(\)",
        ),
        (lambda: gan.path_lengths(lambda z: z, random.key(0), torch.ones(())), ValueError, "path_lengths: z: expected"),
        (
            lambda: gan.path_length_penalty(lambda z: z, random.key(0), x, torch.tensor(0)),
            TypeError,
            r"path_length_penalty: mean: expected a floating-point tensor, got torch.int64",
        ),
        (
            lambda: gan.path_length_penalty(lambda z: z, random.key(0), x, torch.zeros(1)),
            ValueError,
            r"path_length_penalty: mean: expected shape \(\), got \(1,\)",
        ),
        (
            lambda: gan.path_length_penalty(lambda z: z, random.key(0), x, torch.zeros(()), decay=2.0),
            ValueError,
            "path_length_penalty: expected 0 <= decay <= 1, got 2.0",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()
