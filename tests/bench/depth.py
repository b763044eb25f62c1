"""A gradient step of residual blocks: as a scan over stacked parameters, and as a Python loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import functorch_gen as fg
from functorch_gen.nn import Bound, LayerNorm, Linear, init_parts
from functorch_gen.typing import Key, Layer, Params

__all__ = ["ResidualBlock", "depth_step", "forward"]

WIDTH, BATCH_SIZE = 64, 32


@dataclass(frozen=True)
class ResidualBlock:
    """x + down(gelu(up(norm(x)))): (b, d) -> (b, d)."""

    width: int

    @property
    def parts(self) -> dict[str, Layer]:
        d = self.width
        return {"norm": LayerNorm(d), "up": Linear(d, d), "down": Linear(d, d)}

    def init(self, key: Key) -> Params:
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        f = Bound(self.parts, params)
        return x + f.down(F.gelu(f.up(f.norm(x))))


def forward(form: str, block: ResidualBlock, params: Any, x: Tensor) -> Tensor:
    """All blocks; ``params`` are stacked for the scan, a list for the loop."""
    if form == "scan":
        x, _ = fg.scan(lambda x, p: (block(p, x), None), x, params)
        return x
    for p in params:
        x = block(p, x)
    return x


def depth_step(form: str, layers: int, backend: str = "inductor") -> Callable[[], Tensor]:
    """Mean square of the output, its gradient and a step of SGD, compiled with the parameters donated."""
    block = ResidualBlock(WIDTH)
    each = [block.init(key) for key in fg.random.split(fg.random.key(0), layers)]
    params = fg.tree.stack(each) if form == "scan" else each
    x = fg.random.normal(fg.random.key(1), (BATCH_SIZE, WIDTH))
    tx = fg.optim.sgd(1e-3)

    def step(params: Any, opt_state: Any, x: Tensor) -> Any:
        loss, grads = fg.value_and_grad(lambda p: forward(form, block, p, x).square().mean())(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return fg.optim.apply_updates(params, updates), opt_state, loss

    jitted, state = fg.jit(step, donate_argnums=(0, 1), backend=backend), [params, tx.init(params)]

    def run() -> Tensor:
        *state[:], loss = jitted(*state, x)
        return loss

    return run
