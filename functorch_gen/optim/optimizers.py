"""The optimizers by name: short chains of the transformations in this folder.

Each takes a number, a 0-d tensor or a function of the step as learning rate, and 0-d tensors for its other numbers.
A number out of its range is a ValueError. Those that decay weights need the parameters in ``update``.
"""

from collections.abc import Sequence

from torch import Tensor

from functorch_gen import tree
from functorch_gen.gradient_transformation import GradientTransformation, chain, identity, stateless
from functorch_gen.optim import matrices, moments
from functorch_gen.optim.clipping import clip_by_block_rms
from functorch_gen.optim.memory import check_hyperparameters, per_parameter
from functorch_gen.optim.partitions import Mask, add_decayed_weights, masked, partition, resolve_mask
from functorch_gen.optim.scaling import (
    scale,
    scale_by_learning_rate,
    scale_by_param_block_rms,
    scale_by_polyak,
    scale_by_sign,
    scale_by_trust_ratio,
)
from functorch_gen.optim.wrappers import ema
from functorch_gen.schedules import LearningRate
from functorch_gen.typing import Number, Params, Tree

__all__ = [
    "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "adan", "amsgrad", "lamb", "lars",
    "lion", "muon", "nadam", "polyak_sgd", "radam", "rmsprop", "sgd", "sign_sgd",
]  # fmt: skip


def _rate(name: str, learning_rate: LearningRate, flip_sign: bool = True) -> GradientTransformation:
    check_hyperparameters(name, learning_rate=learning_rate)
    return scale_by_learning_rate(learning_rate, flip_sign=flip_sign)


def sgd(learning_rate: LearningRate, momentum: Number | None = None, nesterov: bool = False) -> GradientTransformation:
    """Gradient descent: p <- p - learning_rate v with v = g, or momentum (v <- g + momentum v), or Nesterov's.

    Nesterov's step is g + momentum v, with the new v. Equals ``optax.sgd`` and ``torch.optim.SGD`` (dampening 0).

    >>> import torch
    >>> tx = sgd(0.1, momentum=0.9)
    >>> tx.update([torch.ones(1)], tx.init([torch.zeros(1)]))[0]
    [tensor([-0.1000])]
    """
    if nesterov and momentum is None:
        raise ValueError("sgd: expected momentum with nesterov=True, got None")
    return chain(_momentum("sgd", momentum, nesterov), _rate("sgd", learning_rate))


def _momentum(name: str, momentum: Number | None, nesterov: bool) -> GradientTransformation:
    if momentum is None:
        return identity()
    check_hyperparameters(name, momentum=momentum)
    return moments.trace(momentum, nesterov)


def adam(
    learning_rate: LearningRate, b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, eps_root: Number = 0.0
) -> GradientTransformation:
    """Adam: p <- p - learning_rate mu_hat / (sqrt(nu_hat + eps_root) + eps); see :func:`scale_by_adam`.

    Equals ``optax.adam``, and ``torch.optim.Adam`` when ``eps_root`` is 0.

    >>> import torch
    >>> tx = adam(0.1)
    >>> tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))[0]
    [tensor([-0.1000,  0.1000])]
    """
    return chain(moments.scale_by_adam(b1, b2, eps, eps_root), _rate("adam", learning_rate))


def adamw(
    learning_rate: LearningRate, b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, eps_root: Number = 0.0,
    weight_decay: Number = 1e-4, mask: Mask = None,
) -> GradientTransformation:  # fmt: skip
    """Adam with decoupled decay: p <- p - learning_rate (mu_hat / (sqrt(nu_hat + eps_root) + eps) + weight_decay p).

    Equals ``optax.adamw``, and ``torch.optim.AdamW`` when ``eps_root`` is 0 (whose default decay is 1e-2, not 1e-4).

    Args:
        mask: which parameters decay: ``"*.weight"``, say; see :func:`add_decayed_weights`.
    Source: Loshchilov and Hutter 2019, algorithm 2, arXiv:1711.05101.

    >>> import torch
    >>> tx, params = adamw(0.1, weight_decay=0.5), [torch.ones(1)]
    >>> tx.update([torch.zeros(1)], tx.init(params), params)[0]
    [tensor([-0.0500])]
    """
    decay = add_decayed_weights(weight_decay, mask)
    return chain(moments.scale_by_adam(b1, b2, eps, eps_root), decay, _rate("adamw", learning_rate))


def nadam(
    learning_rate: LearningRate, b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, eps_root: Number = 0.0
) -> GradientTransformation:
    """Adam with Nesterov's momentum: mu_hat = b1 mu / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t).

    Equals ``optax.nadam``; ``torch.optim.NAdam`` moves b1 by a schedule of its own.

    >>> nadam(0.1).init({})[0].mu
    {}
    """
    return chain(moments.scale_by_adam(b1, b2, eps, eps_root, nesterov=True), _rate("nadam", learning_rate))


def radam(
    learning_rate: LearningRate, b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, eps_root: Number = 0.0,
    threshold: Number = 5.0,
) -> GradientTransformation:  # fmt: skip
    """p <- p - learning_rate u, u = r mu_hat / (sqrt(nu_hat + eps_root) + eps), at first mu_hat: rectified Adam.

    Equals ``optax.radam``; see :func:`scale_by_radam` for r, and how ``torch.optim.RAdam`` differs.

    >>> radam(0.1).init({})[0].nu_age
    tensor(0.)
    """
    return chain(moments.scale_by_radam(b1, b2, eps, eps_root, threshold), _rate("radam", learning_rate))


def adamax(
    learning_rate: LearningRate, b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8
) -> GradientTransformation:
    """Adam in the maximum norm: p <- p - learning_rate mu_hat / nu, nu <- max(|g| + eps, b2 nu).

    Equals ``optax.adamax`` and ``torch.optim.Adamax``.

    >>> adamax(0.1).init({})[0].nu
    {}
    """
    return chain(moments.scale_by_adamax(b1, b2, eps), _rate("adamax", learning_rate))


def amsgrad(
    learning_rate: LearningRate, b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, eps_root: Number = 0.0
) -> GradientTransformation:
    """p <- p - learning_rate mu_hat / (sqrt(nu_max + eps_root) + eps), nu_max the largest nu_hat so far.

    Equals ``optax.amsgrad``; see :func:`scale_by_amsgrad` for how ``torch.optim.Adam(amsgrad=True)`` differs.

    >>> amsgrad(0.1).init({})[0].nu_max
    {}
    """
    return chain(moments.scale_by_amsgrad(b1, b2, eps, eps_root), _rate("amsgrad", learning_rate))


def adabelief(
    learning_rate: LearningRate, b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-16, eps_root: Number = 1e-16
) -> GradientTransformation:
    """p <- p - learning_rate mu_hat / (sqrt(nu_hat) + eps), nu <- b2 nu + (1 - b2) (g - mu)^2 + eps_root.

    Equals ``optax.adabelief``.

    >>> adabelief(0.1).init({})[0].nu
    {}
    """
    return chain(moments.scale_by_belief(b1, b2, eps, eps_root), _rate("adabelief", learning_rate))


def adan(
    learning_rate: LearningRate, b1: Number = 0.98, b2: Number = 0.92, b3: Number = 0.99, eps: Number = 1e-8,
    eps_root: Number = 1e-8, weight_decay: Number = 0.0, mask: Mask = None,
) -> GradientTransformation:  # fmt: skip
    """Adaptive Nesterov momentum: p <- p - learning_rate ((m + (1 - b2) v) / (sqrt(n + eps_root) + eps) + decay p).

    Equals ``optax.adan``; see :func:`scale_by_adan` for m, v and n.

    >>> adan(0.1).init({})[0].t
    tensor(0)
    """
    decay = add_decayed_weights(weight_decay, mask)
    return chain(moments.scale_by_adan(b1, b2, b3, eps, eps_root), decay, _rate("adan", learning_rate))


def adagrad(
    learning_rate: LearningRate, initial_accumulator_value: Number = 0.1, eps: Number = 1e-7
) -> GradientTransformation:
    """p <- p - learning_rate g / sqrt(s + eps), s <- s + g^2, at first ``initial_accumulator_value``.

    Equals ``optax.adagrad``, and at eps = 0 ``torch.optim.Adagrad``.

    >>> adagrad(0.1).init({})[0].sum_of_squares
    {}
    """
    return chain(moments.scale_by_rss(initial_accumulator_value, eps), _rate("adagrad", learning_rate))


def adadelta(
    learning_rate: LearningRate = 1.0, rho: Number = 0.9, eps: Number = 1e-6, weight_decay: Number = 0.0,
    weight_decay_mask: Mask = None,
) -> GradientTransformation:  # fmt: skip
    """p <- p - learning_rate sqrt(e_x + eps) / sqrt(e_g + eps) (g + weight_decay p); see :func:`scale_by_adadelta`.

    e_g and e_x are means of squared gradients and of squared updates. Equals ``optax.adadelta`` and
    ``torch.optim.Adadelta``.

    >>> adadelta().init({})[1].e_g
    {}
    """
    decay = add_decayed_weights(weight_decay, weight_decay_mask)
    return chain(decay, moments.scale_by_adadelta(rho, eps), _rate("adadelta", learning_rate))


def rmsprop(
    learning_rate: LearningRate, decay: Number = 0.9, eps: Number = 1e-8, initial_scale: Number = 0.0,
    eps_in_sqrt: bool = True, centered: bool = False, momentum: Number | None = None, nesterov: bool = False,
) -> GradientTransformation:  # fmt: skip
    """p <- p - v, v <- learning_rate g / sqrt(nu + eps) + momentum v; ``centered``: nu - mu^2 for nu.

    See :func:`scale_by_rms` and :func:`scale_by_stddev`. Equals ``optax.rmsprop``, and without ``eps_in_sqrt``
    ``torch.optim.RMSprop`` (whose alpha, decay, is 0.99).

    >>> rmsprop(0.1).init({})[0].nu
    {}
    """
    direction = (moments.scale_by_stddev if centered else moments.scale_by_rms)(decay, eps, initial_scale, eps_in_sqrt)
    return chain(direction, _rate("rmsprop", learning_rate), _momentum("rmsprop", momentum, nesterov))


def lion(
    learning_rate: LearningRate, b1: Number = 0.9, b2: Number = 0.99, weight_decay: Number = 1e-3, mask: Mask = None
) -> GradientTransformation:
    """p <- p - learning_rate (sign(b1 mu + (1 - b1) g) + weight_decay p), mu <- b2 mu + (1 - b2) g.

    Equals ``optax.lion``; see :func:`scale_by_lion`.

    >>> lion(0.1).init({})[0].count
    tensor(0)
    """
    return chain(moments.scale_by_lion(b1, b2), add_decayed_weights(weight_decay, mask), _rate("lion", learning_rate))


def sign_sgd(learning_rate: LearningRate) -> GradientTransformation:
    """p <- p - learning_rate sign(g). Equals ``optax.sign_sgd``.

    Source: Bernstein et al. 2018, algorithm 1, arXiv:1802.04434.

    >>> import torch
    >>> sign_sgd(0.1).update([torch.tensor([4.0, -0.5])], sign_sgd(0.1).init({}))[0]
    [tensor([-0.1000,  0.1000])]
    """
    return chain(scale_by_sign(), _rate("sign_sgd", learning_rate))


def lamb(
    learning_rate: LearningRate, b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-6, eps_root: Number = 0.0,
    weight_decay: Number = 0.0, mask: Mask = None,
) -> GradientTransformation:  # fmt: skip
    """p <- p - learning_rate |p| / |u| u for each parameter by itself, u being the direction of :func:`adamw`.

    Equals ``optax.lamb``; see :func:`scale_by_trust_ratio`.
    Source: You et al. 2020, algorithm 2, arXiv:1904.00962.

    >>> lamb(0.1).init({})[0].count
    tensor(0)
    """
    moment, decay = moments.scale_by_adam(b1, b2, eps, eps_root), add_decayed_weights(weight_decay, mask)
    return chain(moment, decay, scale_by_trust_ratio(), _rate("lamb", learning_rate))


def lars(
    learning_rate: LearningRate, weight_decay: Number = 0.0, weight_decay_mask: Mask = None,
    trust_coefficient: Number = 1e-3, eps: Number = 0.0, trust_ratio_mask: Mask = None, momentum: Number = 0.9,
    nesterov: bool = False,
) -> GradientTransformation:  # fmt: skip
    """p <- p - v, v <- learning_rate trust_coefficient |p| / (|u| + eps) u + momentum v, u = g + weight_decay p.

    Equals ``optax.lars``; see :func:`scale_by_trust_ratio`.

    Args:
        trust_ratio_mask: of which parameters the rate is so scaled; by default of all.
    Source: You et al. 2017, algorithm 1, arXiv:1708.03888.

    >>> lars(0.1).init({})[-1].trace
    {}
    """
    ratio = scale_by_trust_ratio(0.0, trust_coefficient, eps)
    ratio = ratio if trust_ratio_mask is None else masked(ratio, trust_ratio_mask)
    decay = add_decayed_weights(weight_decay, weight_decay_mask)
    return chain(decay, ratio, _rate("lars", learning_rate), _momentum("lars", momentum, nesterov))


def adafactor(
    learning_rate: LearningRate | None = None, min_dim_size_to_factor: int = 128, decay_rate: Number = 0.8,
    decay_offset: Number = 0, multiply_by_parameter_scale: bool = True, clipping_threshold: Number | None = 1.0,
    momentum: Number | None = None, weight_decay_rate: Number | None = None, eps: Number = 1e-30, factored: bool = True,
    weight_decay_mask: Mask = None,
) -> GradientTransformation:  # fmt: skip
    """p <- p - (learning_rate max(rms(p), 1e-3) u + weight_decay_rate p), u = g / sqrt(v), clipped to rms(u) <= 1.

    v, the mean of squared gradients, is factored for large matrices; see :func:`scale_by_factored_rms`. ``momentum``
    is the decay of a mean of the updates. Equals ``optax.adafactor``; ``torch.optim.Adafactor`` is another variant.
    Source: Shazeer and Stern 2018, algorithm 4, arXiv:1804.04235.

    >>> adafactor(0.1).init({})[0].count
    tensor(0)
    """
    links = [
        matrices.scale_by_factored_rms(factored, decay_rate, decay_offset, min_dim_size_to_factor, eps),
        identity() if clipping_threshold is None else clip_by_block_rms(clipping_threshold),
        identity() if learning_rate is None else _rate("adafactor", learning_rate, flip_sign=False),
        scale_by_param_block_rms() if multiply_by_parameter_scale else identity(),
        identity() if momentum is None else ema(momentum, debias=False),
        identity() if weight_decay_rate is None else add_decayed_weights(weight_decay_rate, weight_decay_mask),
    ]
    return per_parameter(chain(*links, scale(-1.0)))


def muon(
    learning_rate: LearningRate, ns_coeffs: Sequence[Number] = (3.4445, -4.775, 2.0315), ns_steps: int = 5,
    beta: Number = 0.95, eps: Number = 1e-8, weight_decay: Number = 0.0, weight_decay_mask: Mask = None, *,
    nesterov: bool = True, adam_b1: Number = 0.9, adam_b2: Number = 0.999, adam_eps_root: Number = 0.0,
    adam_weight_decay: Number = 0.0, adam_learning_rate: LearningRate | None = None,
    consistent_rms: Number | None = None, mask: Mask = None, output_axis: int = 1,
) -> GradientTransformation:  # fmt: skip
    """Orthogonalised momentum for matrices, AdamW (with Nesterov's momentum) for the rest.

    p <- p - learning_rate (sqrt(max(1, fan_out / fan_in)) u + weight_decay p), u of :func:`scale_by_muon`

    Equals ``optax.contrib.muon``. ``torch.optim.Muon`` iterates in bfloat16.

    Args:
        weight_decay_mask: a glob or a function, of the matrices alone.
        consistent_rms: for the factor consistent_rms sqrt(max(fan_in, fan_out)); 0.2 matches AdamW's steps.
        mask: which parameters are orthogonalised (``"blocks.*.weight"``, say); by default those of two dimensions.
            Of one with more the last two are the matrix; convolutions are better left to Adam.
        output_axis: which of the two counts the outputs: 1 as in optax, where x W = y, or 0 for the weights of
            :mod:`functorch_gen.nn`, which is the factor of ``torch.optim.Muon``.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982.

    >>> muon(0.1).init({}).inner_states["adam"][0].count
    tensor(0)
    """

    def scaled(u: Tensor) -> Tensor:
        fan_out, fan_in = u.shape[output_axis - 2], u.shape[-1 - output_axis]
        if consistent_rms is None:
            return u * max(1.0, fan_out / max(fan_in, 1)) ** 0.5
        return (u * (consistent_rms * max(fan_in, fan_out) ** 0.5)).to(u.dtype)

    def labels(params: Params) -> Tree:
        is_matrix = tree.map(lambda x: x.ndim == 2, params) if mask is None else resolve_mask("muon", mask, params)
        return tree.map(lambda matrix: "muon" if matrix else "adam", is_matrix)

    nadamw = moments.scale_by_adam(adam_b1, adam_b2, eps, adam_eps_root, nesterov=nesterov)
    rest = learning_rate if adam_learning_rate is None else adam_learning_rate
    transforms = {
        "muon": chain(
            matrices.scale_by_muon(ns_coeffs, ns_steps, beta, eps, nesterov=nesterov),
            stateless("muon", lambda grads, params, **extra: tree.map(scaled, grads)),
            add_decayed_weights(weight_decay, weight_decay_mask),
            _rate("muon", learning_rate),
        ),
        "adam": chain(nadamw, add_decayed_weights(adam_weight_decay), _rate("muon", rest)),
    }
    return partition(transforms, labels)


def polyak_sgd(
    max_learning_rate: Number = 1.0, scaling: LearningRate = 1.0, f_min: Number = 0.0, eps: Number = 0.0,
    variant: str = "sps",
) -> GradientTransformation:  # fmt: skip
    """p <- p - scaling min((value - f_min) / (|u|^2 + eps), max_learning_rate) g, u = scaling g.

    ``update`` needs the loss: ``update(grads, state, params, value=loss)``. Equals ``optax.polyak_sgd``.
    Source: Loizou et al. 2021, eq. 3, arXiv:2002.10542.

    >>> import torch
    >>> tx = polyak_sgd(max_learning_rate=10.0)
    >>> tx.update([torch.tensor([0.5])], tx.init([torch.zeros(1)]), value=torch.tensor(1.0))[0]
    [tensor([-2.])]
    """
    return chain(_rate("polyak_sgd", scaling), scale_by_polyak(f_min, max_learning_rate, eps, variant))
