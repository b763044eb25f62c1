"""Regularisers of the two players: derivatives of the networks in their inputs, one value for each example, (b,).

``critic(x, *inputs) -> (b,)`` is the discriminator with its parameters (and state) bound, say
``lambda x, label: net(params, x, label)``. Its gradient is taken example by example, ``vmap(grad)``: each logit in its
own input alone, also where the network looks at the whole batch.
"""

from collections.abc import Callable

from einops import rearrange, reduce
from torch import Tensor

from functorch_gen import numerics, random, tree
from functorch_gen.check import check_floating, check_number, check_shape
from functorch_gen.losses.per_example import check_alike
from functorch_gen.transforms import stop_gradient, value_and_grad, vjp, vmap
from functorch_gen.typing import Key, Number, Tree

__all__ = [
    "gradient_penalty",
    "input_gradient",
    "path_length_penalty",
    "path_lengths",
    "r1_penalty",
    "r2_penalty",
    "value_and_input_gradient",
]

Critic = Callable[..., Tensor]


def input_gradient(critic: Critic, x: Tensor, *inputs: Tree) -> Tensor:
    """The gradient of each logit in its own input: (b, ...) -> (b, ...).

    Args:
        critic: ``critic(x, *inputs) -> (b,)``.
        inputs: what else it takes for each example, trees of tensors (b, ...): labels, say.
    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if the critic does not return one logit for each example, or an input has another number of them.

    >>> import torch
    >>> input_gradient(lambda x: (x**2).sum(1), torch.tensor([[1.0, 2.0]]))
    tensor([[2., 4.]])
    """
    return value_and_input_gradient(critic, x, *inputs)[1]


def value_and_input_gradient(critic: Critic, x: Tensor, *inputs: Tree) -> tuple[Tensor, Tensor]:
    """The logits too, from the same pass: (b, ...) -> (b,), (b, ...).

    A loss of the logits and a penalty of the gradients then cost one pass through the critic instead of two.

    Args:
        critic, inputs: as of :func:`input_gradient`.

    >>> import torch
    >>> value_and_input_gradient(lambda x: (x**2).sum(1), torch.tensor([[1.0, 2.0]]))
    (tensor([5.]), tensor([[2., 4.]]))
    """
    _check_examples("input_gradient: x", x)
    for path, given in tree.names(inputs).items():
        if not isinstance(given, Tensor) or given.shape[:1] != x.shape[:1]:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"input_gradient: inputs: {path!r}: expected a tensor (b={len(x)}, ...), got {got}")

    def logit(x: Tensor, *inputs: Tree) -> Tensor:
        found = critic(x[None], *tree.map(lambda i: i[None], inputs))
        check_shape(found, "b", "input_gradient: logits", b=1)
        return found[0]

    return vmap(value_and_grad(logit))(x, *inputs)


def _check_examples(name: str, x: Tensor) -> None:
    check_floating(x, name)
    if not x.ndim:
        raise ValueError(f"{name}: expected shape (b, ...), got ()")


def _squared_norm(x: Tensor) -> Tensor:
    """(b, ...) -> (b,)."""
    return reduce(x.square(), "b ... -> b", "sum")


def r1_penalty(critic: Critic, real: Tensor, *inputs: Tree, gamma: Number = 1.0) -> Tensor:
    """gamma / 2 |grad_x D(x)|^2 at real examples: (b, ...) -> (b,).

    Args:
        critic, inputs: as of :func:`input_gradient`.
    Source: Mescheder et al. 2018, eq. 9, arXiv:1801.04406.

    >>> import torch
    >>> r1_penalty(lambda x: x @ torch.tensor([3.0, 4.0]), torch.zeros(1, 2))
    tensor([12.5000])
    """
    check_number("r1_penalty", "gamma", gamma, low=0)
    return 0.5 * gamma * _squared_norm(input_gradient(critic, real, *inputs))


def r2_penalty(critic: Critic, fake: Tensor, *inputs: Tree, gamma: Number = 1.0) -> Tensor:
    """gamma / 2 |grad_x D(x)|^2 at generated examples: (b, ...) -> (b,).

    Args:
        critic, inputs: as of :func:`input_gradient`.
    Source: Mescheder et al. 2018, eq. 10, arXiv:1801.04406; beside R1 in Huang et al. 2024 (R3GAN), arXiv:2501.05441.

    >>> import torch
    >>> r2_penalty(lambda x: x @ torch.tensor([3.0, 4.0]), torch.zeros(1, 2), gamma=2.0)
    tensor([25.])
    """
    check_number("r2_penalty", "gamma", gamma, low=0)
    return r1_penalty(critic, fake, *inputs, gamma=gamma)


def gradient_penalty(
    critic: Critic, key: Key, real: Tensor, fake: Tensor, *inputs: Tree, center: Number = 1.0
) -> Tensor:
    """(|grad_x D(x)| - center)^2 at a uniform point between a real and a generated example: (b, ...) -> (b,).

    Gulrajani et al. weigh it by 10. With ``center=0`` it is zero-centred.

    Args:
        critic, inputs: as of :func:`input_gradient`.
        center: 1 asks for slopes of one, as a critic of the Wasserstein distance has them; 0 for none.
    Raises:
        ValueError: if ``real`` and ``fake`` differ in shape.
    Source: Gulrajani et al. 2017, eq. 3, arXiv:1704.00028; zero-centred: Thanh-Tung et al. 2019, arXiv:1902.03984.

    >>> import torch
    >>> x = torch.zeros(1, 2)
    >>> gradient_penalty(lambda x: x @ torch.tensor([3.0, 4.0]), random.key(0), x, x)
    tensor([16.])
    """
    check_number("gradient_penalty", "center", center)
    check_alike("gradient_penalty", real=real, fake=fake)
    share = random.uniform(key, (len(real), *[1] * (real.ndim - 1)), real.dtype)
    slope = input_gradient(critic, share * real + (1 - share) * fake, *inputs)
    return (numerics.norm(rearrange(slope, "b ... -> b (...)"), dim=1) - center).square()


def path_lengths(generator: Callable[[Tensor], Tensor], key: Key, z: Tensor) -> Tensor:
    """|J^T y|, J the Jacobian of each image in its latent, y ~ N(0, I): (b, ...) -> (b,).

    Their mean square is |J|_F^2. Images must not depend on the latents of others.

    Args:
        generator: ``generator(z) -> (b, ...)``.
    Raises:
        TypeError: if ``z`` is not floating.
        ValueError: if the generator does not return one image for each latent.
    Source: Karras et al. 2020, section 3.2, arXiv:1912.04958.

    >>> import torch
    >>> path_lengths(lambda z: 3 * z[:, :1], random.key(0), torch.zeros(4000, 2)).square().mean().round()
    tensor(9.)
    """
    _check_examples("path_lengths: z", z)
    images, pull = vjp(generator, z)
    if images.shape[:1] != z.shape[:1]:
        raise ValueError(f"path_lengths: expected images (b={len(z)}, ...), got {tuple(images.shape)}")
    (slope,) = pull(random.normal(key, images.shape, images.dtype))
    return numerics.norm(rearrange(slope, "b ... -> b (...)"), dim=1)


def path_length_penalty(
    generator: Callable[[Tensor], Tensor], key: Key, z: Tensor, mean: Tensor, *, decay: Number = 0.99
) -> tuple[Tensor, Tensor]:
    """(path length - a)^2, a the running mean of path lengths; and that mean: (b, ...), () -> (b,), ().

    The mean is state, 0 at first: a <- decay a + (1 - decay) mean(lengths), a constant to the gradient.

    Source: Karras et al. 2020, eq. 4, arXiv:1912.04958.

    >>> import torch
    >>> generator = lambda z: 3 * z[:, :1]
    >>> penalty, mean = path_length_penalty(generator, random.key(0), torch.zeros(4, 2), torch.tensor(0.0))
    >>> penalty.shape, mean.shape
    (torch.Size([4]), torch.Size([]))
    """
    check_number("path_length_penalty", "decay", decay, low=0, high=1)
    check_shape(mean, "", "path_length_penalty: mean")
    check_floating(mean, "path_length_penalty: mean")
    lengths = path_lengths(generator, key, z)
    mean = stop_gradient(mean + ((1 - decay) * (lengths.mean() - mean)).to(mean.dtype))
    return (lengths - mean).square(), mean
