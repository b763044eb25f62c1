"""What the tests of optimizers share: a small nonconvex problem, trajectories, the distance of trees."""

import torch
from torch.func import grad

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


def trajectory(tx, steps=100, dtype=torch.float64):
    params, loss = problem(dtype)
    state, found = tx.init(params), []
    for _ in range(steps):
        updates, state = tx.update(grad(loss)(params), state, params)
        params = optim.apply_updates(params, updates)
        found.append(params)
    return found


def gap(a, b):
    """Largest difference between two trees, or two trajectories."""
    return max((x - y).abs().max().item() for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def descend(tx, loss, params, state):
    updates, state = tx.update(grad(loss)(params), state, params)
    return optim.apply_updates(params, updates), state
