"""Six two-dimensional distributions with known densities: what a density model loses on them is an absolute number.

==============  =========================================================================================
moons           two half circles of radius 1, normal noise of 0.1: ``make_moons(noise=0.1)`` of scikit-learn
8 gaussians     on a circle of radius 2, standard deviation 0.2
checkerboard    uniform on 8 of the 16 squares of [-4, 4]^2
2 spirals       one and a half turns each out to radius pi, uniform in area, normal noise of 0.1
rings           four circles of radius 0.75 to 3, normal noise of 0.1
pinwheel        five arms, each a normal distribution twisted by an angle that grows with the radius
==============  =========================================================================================
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import functorch_gen as fg

TARGETS = ("moons", "8 gaussians", "checkerboard", "2 spirals", "rings", "pinwheel")


class Target(Protocol):
    """A distribution on the plane."""

    def sample(self, key: Tensor, n: int) -> Tensor:
        """n draws: -> (n, 2)."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats: (n, 2) -> (n,)."""
        ...


class Trace(NamedTuple):
    """Points of a curve, so close that with normal noise around them they are the curve."""

    points: Tensor  # (k, 2)
    weights: Tensor  # (k,), of sum 1
    std: float  # of the noise

    def sample(self, key: Tensor, n: int) -> Tensor:
        """n draws: -> (n, 2)."""
        key_point, key_noise = fg.random.split(key)
        index = fg.random.choice(key_point, len(self.points), (n,), p=self.weights)
        return self.points[index] + self.std * fg.random.normal(key_noise, (n, 2), self.points.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats: (n, 2) -> (n,)."""
        dx, dy = x[:, :1] - self.points[:, 0], x[:, 1:] - self.points[:, 1]
        log_joint = self.weights.log() - 0.5 * (dx**2 + dy**2) / self.std**2
        return log_joint.logsumexp(1) - math.log(2 * math.pi * self.std**2)


class Checkerboard(NamedTuple):
    """Uniform on the squares of side 2 in [-4, 4]^2 whose indices have an even sum."""

    def sample(self, key: Tensor, n: int) -> Tensor:
        """n draws: -> (n, 2)."""
        key_place, key_row = fg.random.split(key)
        place = 4 * fg.random.uniform(key_place, (n, 2))
        column, height = place[:, 0].floor(), place[:, 1] % 1
        row = 2 * fg.random.randint(key_row, (n,), 0, 2) + column % 2
        return 2 * torch.stack([place[:, 0], row + height], 1) - 4

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats: (n, 2) -> (n,)."""
        index = (x / 2).floor()
        inside = (x.abs() < 4).all(1) & (index.sum(1) % 2 == 0)
        return torch.where(inside, -math.log(32), -math.inf)


class Pinwheel(NamedTuple):
    """x = R(2 pi k / 5 + exp(r) / 4) y with y ~ N((1, 0), diag(0.3, 0.05)^2) scaled by 2, r = \\|y\\|, k one of 5."""

    std: tuple[float, float] = (0.3, 0.05)
    arms: int = 5
    rate: float = 0.25
    size: float = 2.0

    def sample(self, key: Tensor, n: int) -> Tensor:
        """n draws: -> (n, 2)."""
        key_arm, key_noise = fg.random.split(key)
        y = torch.tensor([1.0, 0.0]) + torch.tensor(self.std) * fg.random.normal(key_noise, (n, 2))
        arm = fg.random.randint(key_arm, (n,), 0, self.arms)
        return self.size * rotate(y, 2 * math.pi * arm / self.arms + self.rate * y.norm(dim=1).exp())

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats: (n, 2) -> (n,). Turning by an angle that depends on the radius keeps areas."""
        x = x / self.size
        back = -self.rate * x.norm(dim=1).exp()
        arms = [rotate(x, back - 2 * math.pi * k / self.arms) for k in range(self.arms)]
        std = torch.tensor(self.std, dtype=x.dtype)
        squared = (((torch.stack(arms) - torch.tensor([1.0, 0.0], dtype=x.dtype)) / std) ** 2).sum(-1)
        area = 2 * math.pi * math.prod(self.std) * self.arms * self.size**2
        return (-0.5 * squared).logsumexp(0) - math.log(area)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Each point by its angle about the origin: (n, 2), (n,) -> (n, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], 1)


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    """-> (k, 2)."""
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


def midpoints(n: int) -> Tensor:
    """Of n equal parts of [0, 1]: (n,) float64."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def trace(points: Tensor, std: float, weights: Tensor | None = None) -> Trace:
    """A :class:`Trace` in float32, by default with equal weights."""
    weights = torch.ones(len(points), dtype=torch.float64) if weights is None else weights
    return Trace(points.float(), (weights / weights.sum()).float(), std)


def moons() -> Trace:
    """Scikit-learn's, equally likely at every angle."""
    angle = math.pi * midpoints(200)
    upper = polar(torch.ones_like(angle), angle)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    return trace(torch.cat([upper, lower]), 0.1)


def spirals() -> Trace:
    """Two arms, one the other turned by half a turn."""
    part = midpoints(320)
    arm = polar(math.pi * part, 3 * math.pi * part)
    return trace(torch.cat([arm, -arm]), 0.1, torch.cat([part, part]))


def rings() -> Trace:
    """Equally likely."""
    angle = 2 * math.pi * midpoints(200)
    return trace(torch.cat([polar(torch.full_like(angle, radius), angle) for radius in (0.75, 1.5, 2.25, 3)]), 0.1)


def make_target(name: str) -> Target:
    """One of ``TARGETS``."""
    circle = polar(torch.full((8,), 2.0), 2 * math.pi * torch.arange(8) / 8)
    makers: dict[str, Callable[[], Target]] = {
        "moons": moons,
        "8 gaussians": lambda: trace(circle, 0.2),
        "checkerboard": Checkerboard,
        "2 spirals": spirals,
        "rings": rings,
        "pinwheel": Pinwheel,
    }
    return makers[name]()


def grid(n: int, edge: float = 5.0) -> Tensor:
    """Midpoints of n x n equal squares of [-edge, edge]^2, in rows from the top: (n n, 2)."""
    axis = (edge * (2 * midpoints(n) - 1)).float()
    y, x = torch.meshgrid(axis.flip(0), axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def histogram(x: Tensor, n: int, edge: float = 5.0) -> Tensor:
    """Density of points (m, 2) in the squares of :func:`grid`: (n n,)."""
    column, row = ((x * torch.tensor([1.0, -1.0]) + edge) / (2 * edge) * n).floor().long().unbind(1)
    inside = (column >= 0) & (column < n) & (row >= 0) & (row < n)
    counts = torch.bincount((row * n + column)[inside], minlength=n * n)
    return counts / len(x) * (n / (2 * edge)) ** 2


def entropy(target: Target, n: int = 150) -> Tensor:
    """-integral of p log p over [-5, 5]^2, in nats, by the midpoint rule, which is exact for normal noise: -> ()."""
    log_p = target.log_prob(grid(n)).double()
    return torch.special.entr(log_p.exp()).sum() * (10 / n) ** 2
