"""Linear regression in four ways that agree: NumPy and torch with gradients by hand, ``grad`` and sgd, closed form.

python examples/linear_regression.py    # ten seconds; scikit-learn's diabetes data; a table and four pictures

The loss is the mean squared error, its gradient by hand 2/n X^T (X w - y), the closed form the solution of
X^T X w = X^T y. Features and target are standardised, and a column of ones is the bias.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import numpy as np
import torch
from torch import Tensor

import functorch_gen as fg


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/linear_regression"  # folder of the results
    steps: int = 2000  # of gradient descent
    momentum: float = 0.9  # of one more run, beside the plain ones
    train: int = 342  # of the 442 examples; the others are the test
    backend: str = "inductor"  # or aten: no generated code


class Data(NamedTuple):
    """float64: as exact as NumPy's."""

    x: Tensor  # (n, d), the last column ones
    y: Tensor  # (n,)
    x_test: Tensor
    y_test: Tensor
    names: list[str]  # of the columns


def load_data(config: Config) -> Data:
    """Standardised by the training part."""
    from sklearn.datasets import load_diabetes

    raw: Any = load_diabetes(scaled=False)
    x, y = torch.from_numpy(raw.data).double(), torch.from_numpy(raw.target).double()
    order = fg.random.permutation(fg.random.key(0), len(x))
    (x, x_test), (y, y_test) = (part[order].tensor_split([config.train]) for part in (x, y))
    x, x_test = ((part - x.mean(0)) / x.std(0) for part in (x, x_test))
    y, y_test = ((part - y.mean()) / y.std() for part in (y, y_test))
    x, x_test = (torch.cat([part, torch.ones(len(part), 1, dtype=x.dtype)], dim=1) for part in (x, x_test))
    return Data(x, y, x_test, y_test, [*raw.feature_names, "bias"])


def error(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error: (d,), (n, d), (n,) -> ()."""
    return (x @ w - y).square().mean()


# Each of these returns the weights before each step and at the end, (steps + 1, d).


def numpy_by_hand(data: Data, rate: float, steps: int) -> Tensor:
    """NumPy, and the gradient's formula."""
    x, y = data.x.numpy(), data.y.numpy()
    path = np.zeros((steps + 1, x.shape[1]))
    for i in range(steps):
        path[i + 1] = path[i] - rate * 2 / len(x) * x.T @ (x @ path[i] - y)
    return torch.from_numpy(path)


def torch_by_hand(data: Data, rate: float, steps: int) -> Tensor:
    """torch, and the gradient's formula."""
    x, y = data.x, data.y
    path = [torch.zeros(x.shape[1], dtype=x.dtype)]
    for _ in range(steps):
        path.append(path[-1] - rate * 2 / len(x) * x.T @ (x @ path[-1] - y))
    return torch.stack(path)


def grad_and_sgd(tx: fg.optim.GradientTransformation, backend: str) -> Callable[[Data, float, int], Tensor]:
    """``grad`` and an optimizer; the loop is one compiled program."""

    def loss_fn(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return error(params["weight"], x, y)

    def run(x: Tensor, y: Tensor, length: int) -> Tensor:
        def step(carry: Any, _: None) -> tuple[Any, Tensor]:
            params, state = carry
            updates, state = tx.update(fg.grad(loss_fn)(params, x, y), state, params)
            return (fg.optim.apply_updates(params, updates), state), params["weight"]

        params = {"weight": torch.zeros(x.shape[1], dtype=x.dtype)}
        (params, _), path = fg.scan(step, (params, tx.init(params)), length=length)
        return torch.cat([path, params["weight"][None]])

    compiled = fg.jit(run, static_argnums=2, backend=backend)
    return lambda data, rate, steps: compiled(data.x, data.y, steps)


def closed_form(data: Data, rate: float, steps: int) -> Tensor:
    """Least squares, without a step: (1, d)."""
    return torch.linalg.lstsq(data.x, data.y[:, None]).solution.T


def measure(data: Data, path: Tensor, seconds: float, best: Tensor) -> dict[str, float]:
    """What the table says of a way to the weights."""
    w = path[-1]
    return {
        "seconds": seconds,
        "training error": error(w, data.x, data.y).item(),
        "test error": error(w, data.x_test, data.y_test).item(),
        "distance to the closed form": (w - best).norm().item(),
    }


def draw(data: Data, paths: dict[str, Tensor], out: Path) -> None:
    """Convergence, weights over the steps, predictions, and the error over two of the weights."""
    best, descents = paths["closed form"][-1], {name: p for name, p in paths.items() if name != "closed form"}
    least = error(best, data.x, data.y)
    excess = {
        name: (fg.vmap(error, in_dims=(0, None, None))(path, data.x, data.y) - least).clamp(min=1e-16)
        for name, path in descents.items()
    }
    fg.plot.curves(excess, out / "convergence.png", title="convergence", y_label="error above the least")
    plain = descents["grad and sgd"]
    weights = {name: plain[:, i] for i, name in enumerate(data.names)}
    fg.plot.curves(weights, out / "weights.png", log=False, title="weights of grad and sgd", y_label="weight")
    fg.plot.scatter(data.y_test, data.x_test @ best, out / "predictions.png", title="closed form, test examples")
    i, j = data.names.index("s1"), data.names.index("s2")

    def slice_of_error(pair: Tensor) -> Tensor:
        columns = torch.stack([data.x[:, i], data.x[:, j]], dim=1)
        return error(best, data.x, data.y + columns @ (best[[i, j]] - pair))

    fg.plot.landscape(
        slice_of_error,
        out / "landscape.png",
        x_range=(-1.0, 0.5),
        y_range=(-0.5, 0.9),
        paths={"sgd": plain[:, [i, j]], "momentum": descents["grad and sgd, momentum"][:, [i, j]]},
        minimum=(best[i].item(), best[j].item()),
        title="error, the other weights at their best",
        x_label="weight of s1",
        y_label="weight of s2",
    )


def main(config: Config) -> dict[str, dict[str, float]]:
    """Runs every way twice and times the second run; writes pictures and metrics; returns the table."""
    out, data = fg.train.check_writable(config.out), load_data(config)
    curvature = 2 / len(data.x) * torch.linalg.eigvalsh(data.x.T @ data.x).max().item()
    rate, backend = 1 / curvature, config.backend
    ways: dict[str, Callable[[Data, float, int], Tensor]] = {
        "NumPy by hand": numpy_by_hand,
        "torch by hand": torch_by_hand,
        "grad and sgd": grad_and_sgd(fg.optim.sgd(rate), backend),
        "grad and sgd, momentum": grad_and_sgd(fg.optim.sgd(rate, config.momentum, nesterov=True), backend),
        "closed form": closed_form,
    }
    best, paths, table = closed_form(data, rate, 0)[-1], {}, {}
    for name, way in ways.items():
        way(data, rate, config.steps)  # compiles
        begin = time.perf_counter()
        paths[name] = way(data, rate, config.steps)
        table[name] = measure(data, paths[name], time.perf_counter() - begin, best)
    draw(data, paths, out)
    (out / "metrics.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(command_line.table(main(settings)))
    print(f"convergence.png, landscape.png, predictions.png, weights.png and metrics.json are in {settings.out}")
