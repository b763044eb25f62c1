"""The table of pure functions that ``tests/laws`` and the table of compositions run over; areas have files in ``rows``.

A row is a function and a factory of its arguments, float64 trees in general position. What does not hold for a row is
named in ``skip`` with the reason: a law; "derivatives", which are no slopes; "table", where others stand for it. A cell
of the table that must raise an error has it in ``errors``.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rows import (
    attention,
    attention_more,
    augment,
    axes,
    combinators,
    control,
    custom,
    flow_matching,
    gan,
    layers,
    layers_more,
    lm,
    losses,
    networks,
    numerics,
    ode,
    optimizers,
    programs,
    recurrent,
    samplers,
    schedules,
    state,
    vae,
)
from rows import diffusion as diffusion_more
from torch import Tensor
from zoo_case import ALIKE, Case, Draw, from_draw

from functorch_gen import diffusion, ema, exact, metrics, noise, optim, random, step, tree
from functorch_gen.transforms import checkpoint_name, dots_saveable, grad, remat, save_only_these_names, scan
from functorch_gen.typing import Tree

ROWS = [
    layers,
    layers_more,
    attention,
    attention_more,
    recurrent,
    state,
    networks,
    losses,
    optimizers,
    combinators,
    schedules,
    augment,
    control,
    custom,
    axes,
    numerics,
    programs,
    diffusion_more,
    samplers,
    ode,
    flow_matching,
    gan,
    vae,
    lm,
]


def over(law: str, cases: list[Case] | None = None, quick: set[str] | None = None) -> pytest.MarkDecorator:
    """Runs a test over the rows that do not skip the law; those that are not ``quick``, by name, are slow tests."""
    rows = [case for case in (CASES if cases is None else cases) if law not in case.skip]
    unknown = (quick or set()) - {case.name for case in rows}
    if unknown:
        raise ValueError(f"zoo.over: expected names of rows in quick, got {sorted(unknown)}")
    slow = [quick is not None and case.name not in quick for case in rows]
    params = [
        pytest.param(case, marks=[pytest.mark.slow] if late else []) for case, late in zip(rows, slow, strict=True)
    ]
    return pytest.mark.parametrize("case", params, ids=str)


# Reasons that several rows share.
DTYPE_IS_AN_ARGUMENT = "the dtype is an argument"
EIGH = "torch's forward rule of eigh has NaN for its derivative in reverse mode"
IN_FLOAT64 = "computes in float64 and returns it, whatever comes in"


# Trees.


def two_trees(draw: Draw) -> tuple[Tree, ...]:
    return draw.params(), draw.params()


TREES = [
    from_draw("tree.add", tree.add, two_trees, table=ALIKE),
    from_draw("tree.mul", tree.mul, two_trees, table=ALIKE),
    from_draw("tree.scale", tree.scale, lambda d: (d.params(), d()), table=ALIKE),
    from_draw("tree.add_scaled", tree.add_scaled, lambda d: (d.params(), d.params(), d()), table=ALIKE),
    from_draw("tree.lerp", tree.lerp, lambda d: (d.params(), d.params(), d())),
    from_draw(
        "tree.where", lambda c, a, b: tree.where(c > 0, a, b), lambda d: (d(), d.params(), d.params()), table=ALIKE
    ),
    from_draw("tree.clip", lambda x: tree.clip(x, -1.0, 0.5), lambda d: (d.params(),)),
    from_draw("tree.vdot", tree.vdot, two_trees),
    from_draw("tree.norm", tree.norm, lambda d: (d.params(),)),
    from_draw("tree.sum", tree.sum, lambda d: (d.params(),), table=ALIKE),
    from_draw("tree.stack", lambda a, b: tree.stack([a, b]), two_trees),
    from_draw("tree.unstack", tree.unstack, lambda d: ({"a": d(3, 2), "b": d(3)},), table=ALIKE),
    from_draw("tree.ravel", lambda x: tree.ravel(x)[1](torch.sin(tree.ravel(x)[0])), lambda d: (d.params(),)),
    from_draw("tree.names", lambda x: tree.from_names(tree.names(x), like=x), lambda d: (d.params(),), table=ALIKE),
    from_draw("tree.partition", lambda x: tree.partition(x, ["w", "*.b"])[0], lambda d: (d.params(),)),
]

# Random numbers.


def draws(name: str, sample: Callable[..., Tensor], *args: Any) -> Case:
    return from_draw(f"random.{name}", lambda key: sample(key, *args), lambda d: (d.key(),), dtype=DTYPE_IS_AN_ARGUMENT)


RANDOM = [
    draws("split", random.split, 3),
    draws("fold_in", random.fold_in, 5),
    draws("bits", random.bits, (2, 3)),
    draws("uniform", random.uniform, (2, 3)),
    draws("normal", random.normal, (2, 3)),
    draws("bernoulli", random.bernoulli, 0.3, (5,)),
    draws("randint", random.randint, (5,), 0, 9),
    draws("permutation", random.permutation, 6),
    draws("truncated_normal", random.truncated_normal, -1.0, 2.0, (3,)),
    draws("exponential", random.exponential, (3,)),
    draws("laplace", random.laplace, (3,)),
    draws("gumbel", random.gumbel, (3,)),
    draws("rademacher", random.rademacher, (3,)),
    draws("orthogonal", random.orthogonal, 3),
    from_draw("random.categorical", lambda key, logits: random.categorical(key, logits), lambda d: (d.key(), d(2, 4))),
]

# Optimizers, averages, training steps.


def from_optimizer(name: str, tx: optim.GradientTransformation, **skip: str) -> Case:
    """Two updates, so that the second starts from moments that are not zero."""

    def fun(params: Tree, first: Tree, second: Tree) -> Tree:
        updates, state = tx.update(first, tx.init(params), params)
        params = optim.apply_updates(params, updates)
        updates, state = tx.update(second, state, params)
        return optim.apply_updates(params, updates)

    return from_draw(f"optim.{name}", fun, lambda d: (d.params(), d.params(), d.params()), **skip)


def averaged(name: str, tx: ema.EMA) -> Case:
    return from_draw(f"ema.{name}", lambda a, b: tx.update(b, tx.init(a))[0], two_trees)


def squared_error(params: Tree, key: Tensor, batch: Tensor) -> Tensor:
    noisy = batch + 0.1 * random.normal(key, batch.shape, batch.dtype)
    return torch.tanh(noisy @ params["w"] + params["b"]).square().mean()


TX = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1))
EMA = ema.constant(0.9)
STEP = step.make_step(squared_error, TX, EMA)


def train(params: Tree, key: Tensor, batch: Tensor) -> Tree:
    state, found = STEP(step.init_state(params, TX, key, ema=EMA), batch)
    return state.params, ema.average(state.ema), found


TRAINING = [
    from_draw("optim.apply_updates", optim.apply_updates, two_trees),
    from_optimizer("sgd", optim.sgd(0.1), table=ALIKE),
    from_optimizer("sgd with momentum", optim.sgd(0.1, momentum=0.9, nesterov=True)),
    from_optimizer("adam", optim.adam(0.1)),
    from_optimizer("adamw", optim.adamw(optim.warmup_cosine_decay_schedule(0.0, 0.1, 2, 5), weight_decay=0.1)),
    from_optimizer("clip_by_global_norm", optim.clip_by_global_norm(0.5)),
    from_optimizer("clip", optim.clip(0.5), table=ALIKE),
    from_optimizer("flatten", optim.flatten(optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.1)))),
    averaged("constant", ema.constant(0.9)),
    averaged("warmup", ema.warmup(0.99)),
    from_draw("step.make_step", train, lambda d: ({"w": d(3, 2), "b": d(2)}, d.key(), d(4, 3))),
]

# Noise, objectives, samplers.

SCHEDULES = {
    "VPLinear": noise.VPLinear(),
    "VPCosine": noise.VPCosine(),
    "EDM": noise.EDM(sigma_max=5.0),
    "FlowMatching": noise.FlowMatching(),
}


def network(w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x_t, t: torch.tanh(x_t @ w) * (1 + t[:, None])


def scheduled(name: str, schedule: noise.NoiseSchedule, **skip: str) -> Case:
    def fun(x: Tensor, draw: Tensor, t: Tensor) -> Tree:
        return noise.mix(schedule, x, draw, t), noise.log_snr(schedule, t), noise.rates(schedule, t)

    return from_draw(f"noise.{name}", fun, lambda d: (d(2, 3), d(2, 3), d.times(2)), **skip)


def objective(kind: str, schedule: str, weighting: Any, **skip: str) -> Case:
    prediction = diffusion.Prediction(kind)

    def fun(w: Tensor, x: Tensor, draw: Tensor, t: Tensor) -> Tree:
        options: dict[str, Any] = {"schedule": SCHEDULES[schedule], "prediction": prediction}
        losses = diffusion.loss_at(network(w), x, draw, t, weighting=weighting, **options)
        return losses, diffusion.denoiser(network(w), **options)(x, t)

    return from_draw(f"diffusion.loss_at {kind}", fun, lambda d: (d(3, 3), d(2, 3), d(2, 3), d.times(2)), **skip)


def random_objective(w: Tensor, key: Tensor, x: Tensor) -> Tensor:
    return diffusion.loss(network(w), key, x, schedule=SCHEDULES["VPCosine"])


def sampled(name: str, sample: Callable[..., Tensor], schedule: str, **options: Any) -> Case:
    def fun(w: Tensor, key: Tensor, x_t: Tensor) -> Tensor:
        denoise = diffusion.denoiser(network(w), schedule=SCHEDULES[schedule])
        start = {"schedule": SCHEDULES[schedule], "steps": 3, "x_t": x_t, "dtype": x_t.dtype}
        return sample(key, denoise, x_t.shape, **start, **options)

    return from_draw(f"diffusion.{name}", fun, lambda d: (d(2, 2), d.key(), d(3, 2)))


def guided(w: Tensor, u: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    return diffusion.guide(network(w), network(u), 1.5)(x_t, t)


DIFFUSION = [
    *[scheduled(name, SCHEDULES[name]) for name in ("VPCosine", "EDM")],
    *[scheduled(name, SCHEDULES[name], table=ALIKE) for name in ("VPLinear", "FlowMatching")],
    objective("eps", "VPLinear", "uniform"),
    objective("x", "VPCosine", "snr", table=ALIKE),
    objective("v", "VPCosine", "min_snr"),
    objective("flow", "FlowMatching", "uniform", table=ALIKE),
    objective("edm", "EDM", "edm"),
    from_draw("diffusion.loss", random_objective, lambda d: (d(3, 3), d.key(), d(4, 3))),
    from_draw("diffusion.guide", guided, lambda d: (d(3, 3), d(3, 3), d(2, 3), d.times(2))),
    sampled("sample_ddpm", diffusion.sample_ddpm, "VPLinear"),
    sampled("sample_ddim", diffusion.sample_ddim, "VPCosine", eta=0.5),
    sampled("sample_euler", diffusion.sample_euler, "FlowMatching"),
    sampled("sample_heun", diffusion.sample_heun, "EDM"),
    sampled("sample_dpmpp_2m", diffusion.sample_dpmpp_2m, "VPCosine"),
]

# Closed forms and metrics.


def covariance(root: Tensor) -> Tensor:
    return root @ root.mT + torch.eye(root.shape[-1], dtype=root.dtype)


def from_exact(name: str, build: Callable[..., Any], args: Callable[[Draw], tuple[Tensor, ...]]) -> Case:
    def fun(x_t: Tensor, alpha: Tensor, sigma: Tensor, *parts: Tensor) -> Tree:
        data = build(*parts)
        return data.log_prob(x_t, alpha, sigma), data.score(x_t, alpha, sigma), data.denoise(x_t, alpha, sigma)

    return from_draw(f"exact.{name}", fun, lambda d: (d(3, 2), d.times(), d.times(), *args(d)))


def mixture(weights: Tensor, means: Tensor, roots: Tensor) -> exact.GaussianMixture:
    return exact.GaussianMixture(weights.softmax(0), means, covariance(roots))


EXACT = [
    from_exact("Gaussian", exact.Gaussian, lambda d: (d(2), d.times(2))),
    from_exact(
        "MultivariateGaussian",
        lambda mean, root: exact.MultivariateGaussian(mean, covariance(root)),
        lambda d: (d(2), d(2, 2)),
    ),
    from_exact("GaussianMixture", mixture, lambda d: (d(2), d(2, 2), d(2, 2, 2))),
    from_draw("metrics.sliced_wasserstein", metrics.sliced_wasserstein, lambda d: (d.key(), d(4, 2), d(5, 2))),
    from_draw("metrics.mmd", lambda x, y: metrics.mmd(x, y, bandwidth=1.5), lambda d: (d(4, 2), d(5, 2))),
    from_draw("metrics.moments", metrics.moments, lambda d: (d(5, 2),), dtype=IN_FLOAT64),
    from_draw("metrics.frechet_distance", metrics.frechet_distance, lambda d: (d(5, 2), d(6, 2)), derivatives=EIGH),
    from_draw("metrics.nearest_distance", metrics.nearest_distance, lambda d: (d(4, 2), d(5, 2))),
]

# Control flow and rematerialisation.


def recurrent(params: Tree, h: Tensor, xs: Tensor) -> Tree:
    return scan(lambda h, x: (torch.tanh(h @ params["w"] + x), {"h": h * params["b"]}), h, xs, reverse=True)


def rows_and_columns(total: Tensor, xs: Tensor) -> Tree:
    def row(total: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return scan(lambda h, x: (torch.sin(h + x * total), h), total, x)

    return scan(remat(row), total, xs)


def layers(params: Tree, x: Tensor) -> Tensor:
    def layer(x: Tensor, w: Tensor) -> tuple[Tensor, None]:
        return torch.tanh(checkpoint_name(x @ w, "product")), None

    named, dots = remat(layer, save_only_these_names("product")), remat(layer, dots_saveable)
    return scan(dots, named(x, params["first"])[0], params["rest"])[0]


CONTROL = [
    from_draw("scan", recurrent, lambda d: ({"w": d(3, 3), "b": d(3)}, d(3), d(4, 3))),
    from_draw("scan of scan", rows_and_columns, lambda d: (d(), d(2, 3))),
    from_draw("scan of remat", layers, lambda d: ({"first": d(3, 3), "rest": d(2, 3, 3)}, d(2, 3))),
]

# A gradient is a function too: the laws hold for it as well.
TRANSFORMED = [
    from_draw("grad of a loss", grad(squared_error), lambda d: ({"w": d(3, 2), "b": d(2)}, d.key(), d(4, 3))),
]

CASES = [*TREES, *RANDOM, *TRAINING, *DIFFUSION, *EXACT, *CONTROL, *TRANSFORMED]
CASES += [case for module in ROWS for case in module.CASES]


# What the table of compositions takes.


def differentiable(case: Case) -> bool:
    """Whether it has floating inputs and floating outputs."""
    args = case.args(0)
    return bool(floating(args)) and bool(floating(case.fun(*args)))


def floating(x: Tree) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(x) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


DIFFERENTIABLE = [case for case in CASES if "derivatives" not in case.skip and differentiable(case)]
"""Rows whose derivatives are slopes."""

TABLE = [case for case in DIFFERENTIABLE if "table" not in case.skip]
"""The rows of the table of compositions."""


def assert_trees_close(actual: Tree, expected: Tree, *, rtol: float, atol: float) -> None:
    """Equal structures, shapes and dtypes; values within the tolerances. Names the path."""

    def check(path: str, x: Any, y: Any) -> None:
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda message: f"{path}: {message}")

    tree.map_with_path(check, actual, expected)
