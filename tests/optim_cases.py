"""What the tests of optimizers share: three problems, trajectories, distances, the table of optimizers."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import grad_and_value

from functorch_gen import optim, tree

EXACT = 1e-12  # float64 rounding over 100 steps; the figure, measured below 3e-15


def problem(dtype=torch.float64):
    """The small nonconvex fit of goldens/make_optim.py: parameters and loss."""
    numbers = torch.arange(12, dtype=torch.float64)
    x, y = numbers.sin().reshape(4, 3).to(dtype), numbers[:8].cos().reshape(4, 2).to(dtype)
    weight = (0.5 * (1.7 * numbers[:6]).cos()).reshape(3, 2)
    params = {"bias": torch.zeros(2, dtype=dtype), "weight": weight.to(dtype)}

    def loss(params):
        fit = ((torch.tanh(x @ params["weight"] + params["bias"]) - y) ** 2).sum()
        return fit + 0.1 * torch.cos(3 * params["weight"]).sum()

    return params, loss


def quadratic():
    """Curvatures from 1e-4 to 1e3."""
    numbers = torch.arange(8, dtype=torch.float64)
    params = {"a": numbers[:2].cos(), "b": numbers[:6].sin().reshape(2, 3)}

    def loss(params):
        x = torch.cat([params["a"], params["b"].reshape(-1)])
        return 0.5 * (10.0 ** (numbers - 4) * (x - 0.3) ** 2).sum()

    return params, loss


def nested():
    """A nested tree; the second row of one matrix, and one whole vector, have no gradient."""
    numbers = torch.arange(8, dtype=torch.float64)
    scale, unused = torch.tensor(0.7, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    params = {
        "blocks": [{"scale": scale, "weight": numbers.cos().reshape(2, 4)}, {"unused": unused}],
        "head": {"weight": (1 + numbers[:4]).sin().reshape(4, 1)},
    }

    def loss(params):
        first, scale = params["blocks"][0]["weight"][0], params["blocks"][0]["scale"]
        out = torch.tanh(scale * first) @ params["head"]["weight"]
        return ((out - 1) ** 2).sum() + 0.1 * (first**4).sum()

    return params, loss


PROBLEMS = {"fit": problem, "quadratic": quadratic, "nested": nested}


def descend(tx, loss, params, state):
    grads, value = grad_and_value(loss)(params)
    updates, state = tx.update(grads, state, params, value=value)
    return optim.apply_updates(params, updates), state


def trajectory(tx, steps=100, dtype=torch.float64, start=None):
    params, loss = problem(dtype) if start is None else start()
    state, found = tx.init(params), []
    for _ in range(steps):
        params, state = descend(tx, loss, params, state)
        found.append(params)
    return found


def gap(a, b):
    """Largest difference between two trees, or two trajectories."""
    return max((x - y).abs().max().item() for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


# The table. A new optimizer gets every law by one line here, and its trajectories by one in goldens/make_optim.py.


@dataclass(frozen=True)
class Row:
    """An optimizer, with numbers at which every one of them matters."""

    make: Callable[..., optim.GradientTransformation]
    numbers: Mapping[str, float] = field(default_factory=dict)  # by name, besides the learning rate
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate: str = "learning_rate"  # what the learning rate is called
    by_element: bool = True

    def __call__(self, rate, numbers=None) -> optim.GradientTransformation:
        return self.make(**{self.rate: rate}, **(self.numbers if numbers is None else numbers), **self.settings)


MOMENTS = {"b1": 0.8, "b2": 0.95, "eps": 1e-3}
ROOT = {**MOMENTS, "eps_root": 1e-4}
DECAY = {"weight_decay": 0.1}
ALL = {
    "sgd": Row(optim.sgd, {"momentum": 0.7}),
    "adam": Row(optim.adam, ROOT),
    "adamw": Row(optim.adamw, ROOT | DECAY),
    "nadam": Row(optim.nadam, ROOT),
    "radam": Row(optim.radam, ROOT | {"threshold": 4.5}),
    "adamax": Row(optim.adamax, MOMENTS),
    "amsgrad": Row(optim.amsgrad, ROOT),
    "adabelief": Row(optim.adabelief, ROOT),
    "adan": Row(optim.adan, ROOT | DECAY | {"b3": 0.9}),
    "adagrad": Row(optim.adagrad, {"initial_accumulator_value": 0.1, "eps": 1e-3}),
    "adadelta": Row(optim.adadelta, {"rho": 0.8, "eps": 1e-2} | DECAY),
    "rmsprop": Row(optim.rmsprop, {"decay": 0.8, "eps": 1e-2, "initial_scale": 0.1, "momentum": 0.5}),
    "rmsprop centered": Row(optim.rmsprop, {"decay": 0.8, "eps": 1e-2}, {"centered": True, "eps_in_sqrt": False}),
    "lion": Row(optim.lion, {"b1": 0.8, "b2": 0.9} | DECAY),
    "sign_sgd": Row(optim.sign_sgd),
    "lamb": Row(optim.lamb, ROOT | DECAY, by_element=False),
    "lars": Row(optim.lars, {"trust_coefficient": 0.1, "eps": 1e-2, "momentum": 0.5} | DECAY, by_element=False),
    "adafactor": Row(
        optim.adafactor,
        {"decay_rate": 0.7, "clipping_threshold": 0.9, "momentum": 0.5, "weight_decay_rate": 0.01, "eps": 1e-6},
        {"min_dim_size_to_factor": 2},
        by_element=False,
    ),
    "muon": Row(
        optim.muon,
        {"beta": 0.8, "eps": 1e-3, "weight_decay": 0.1, "adam_b1": 0.8, "adam_b2": 0.9, "adam_eps_root": 1e-4},
        {"ns_steps": 3},
        by_element=False,
    ),
    "polyak_sgd": Row(
        optim.polyak_sgd, {"scaling": 0.9, "f_min": -5.0, "eps": 0.1}, rate="max_learning_rate", by_element=False
    ),
}


def names_of_all() -> set[str]:
    """The optimizers of ``optim.optimizers``: what the table must hold."""
    from functorch_gen.optim import optimizers

    return {name for name in optimizers.__all__ if inspect.isfunction(getattr(optimizers, name))}
