"""What the two players minimise, as functions of the discriminator's logits: one value for each example, (b,).

A logit is high where the discriminator takes an example for real. ``d_...`` is the discriminator's loss, ``g_...`` the
generator's; the relativistic one compares each real example with a generated one, so the generator needs both logits.
"""

from torch import Tensor
from torch.nn import functional as F

from functorch_gen import numerics
from functorch_gen.check import check_floating, check_shape
from functorch_gen.losses.per_example import in_float32

__all__ = [
    "d_hinge",
    "d_least_squares",
    "d_logistic",
    "d_relativistic",
    "d_wasserstein",
    "g_hinge",
    "g_least_squares",
    "g_minimax",
    "g_non_saturating",
    "g_relativistic",
    "g_wasserstein",
]


def _check(name: str, **logits: Tensor) -> None:
    sizes: dict[str, int] = {}
    for argument, x in logits.items():
        check_floating(x, f"{name}: {argument}")
        sizes |= check_shape(x, "b", f"{name}: {argument}", **sizes)


@in_float32
def d_logistic(real: Tensor, fake: Tensor) -> Tensor:
    """-log D(x) - log(1 - D(G(z))), D = sigmoid(logit): of the minimax and of the non-saturating game.

    Source: Goodfellow et al. 2014, eq. 1, arXiv:1406.2661.

    >>> import torch
    >>> d_logistic(torch.zeros(1), torch.zeros(1))  # 2 ln 2, at the equilibrium
    tensor([1.3863])
    """
    _check("d_logistic", real=real, fake=fake)
    return numerics.softplus(-real) + numerics.softplus(fake)


@in_float32
def g_minimax(fake: Tensor) -> Tensor:
    """log(1 - D(G(z))): the discriminator's loss with the sign changed; its slope vanishes where D wins.

    Source: Goodfellow et al. 2014, eq. 1, arXiv:1406.2661.

    >>> import torch
    >>> g_minimax(torch.zeros(1))
    tensor([-0.6931])
    """
    _check("g_minimax", fake=fake)
    return -numerics.softplus(fake)


@in_float32
def g_non_saturating(fake: Tensor) -> Tensor:
    """-log D(G(z)): steepest where the discriminator wins.

    Source: Goodfellow et al. 2014, section 3, arXiv:1406.2661.

    >>> import torch
    >>> g_non_saturating(torch.zeros(1))  # ln 2, at the equilibrium
    tensor([0.6931])
    """
    _check("g_non_saturating", fake=fake)
    return numerics.softplus(-fake)


@in_float32
def d_least_squares(real: Tensor, fake: Tensor) -> Tensor:
    """(D(x) - 1)^2 / 2 + D(G(z))^2 / 2, of the logits themselves.

    Source: Mao et al. 2017, eq. 2 with a = 0, b = 1, arXiv:1611.04076.

    >>> import torch
    >>> d_least_squares(torch.tensor([0.5]), torch.tensor([0.5]))
    tensor([0.2500])
    """
    _check("d_least_squares", real=real, fake=fake)
    return 0.5 * (real - 1).square() + 0.5 * fake.square()


@in_float32
def g_least_squares(fake: Tensor) -> Tensor:
    """(D(G(z)) - 1)^2 / 2.

    Source: Mao et al. 2017, eq. 2 with c = 1, arXiv:1611.04076.

    >>> import torch
    >>> g_least_squares(torch.tensor([0.5]))
    tensor([0.1250])
    """
    _check("g_least_squares", fake=fake)
    return 0.5 * (fake - 1).square()


@in_float32
def d_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """max(0, 1 - D(x)) + max(0, 1 + D(G(z))).

    Source: Lim and Ye 2017, arXiv:1705.02894; Miyato et al. 2018, eq. 16, arXiv:1802.05957.

    >>> import torch
    >>> d_hinge(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -2.0]))
    tensor([2., 0.])
    """
    _check("d_hinge", real=real, fake=fake)
    return F.relu(1 - real) + F.relu(1 + fake)


def g_hinge(fake: Tensor) -> Tensor:
    """-D(G(z)).

    Source: Miyato et al. 2018, eq. 17, arXiv:1802.05957.

    >>> import torch
    >>> g_hinge(torch.tensor([0.5]))
    tensor([-0.5000])
    """
    _check("g_hinge", fake=fake)
    return -fake


def d_wasserstein(real: Tensor, fake: Tensor) -> Tensor:
    """D(G(z)) - D(x): minus an estimate of the Wasserstein-1 distance, if D is 1-Lipschitz.

    That is for weight clipping (``d_project`` of :func:`make_step`), :func:`gradient_penalty` or
    :class:`functorch_gen.nn.SpectralNorm` to see to.

    Source: Arjovsky et al. 2017, eq. 2, arXiv:1701.07875.

    >>> import torch
    >>> d_wasserstein(torch.tensor([1.0]), torch.tensor([0.5]))
    tensor([-0.5000])
    """
    _check("d_wasserstein", real=real, fake=fake)
    return fake - real


def g_wasserstein(fake: Tensor) -> Tensor:
    """-D(G(z)).

    Source: Arjovsky et al. 2017, algorithm 1, arXiv:1701.07875.

    >>> import torch
    >>> g_wasserstein(torch.tensor([0.5]))
    tensor([-0.5000])
    """
    _check("g_wasserstein", fake=fake)
    return -fake


@in_float32
def d_relativistic(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(D(x) - D(G(z))): a real example must look more real than the generated one it is paired with.

    Source: Jolicoeur-Martineau 2019, arXiv:1807.00734; Huang et al. 2024 (R3GAN), arXiv:2501.05441.

    >>> import torch
    >>> d_relativistic(torch.ones(1), torch.ones(1))  # ln 2, at the equilibrium
    tensor([0.6931])
    """
    _check("d_relativistic", real=real, fake=fake)
    return numerics.softplus(fake - real)


@in_float32
def g_relativistic(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(D(G(z)) - D(x)).

    Source: Jolicoeur-Martineau 2019, arXiv:1807.00734; Huang et al. 2024 (R3GAN), arXiv:2501.05441.

    >>> import torch
    >>> g_relativistic(torch.ones(1), torch.ones(1))
    tensor([0.6931])
    """
    _check("g_relativistic", real=real, fake=fake)
    return numerics.softplus(real - fake)
