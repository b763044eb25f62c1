"""Small programs: the overhead of a call, normal numbers, and the memory traffic of an update."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import functorch_gen as fg
from tests.bench.steps import SETTLE
from tests.bench.table import Options, Table, attempt
from tests.bench.timing import interleave

__all__ = ["TRAFFIC", "call_overhead", "normals", "update_traffic"]

LEAVES, LEAF = 350, 4
NORMALS = 1_000_000
PARAMETERS = 50_000_000
TRAFFIC = 10 / 2
"""Least traffic of the update over that of the copy: reads p, g, mu, nu, average and once more g for the norm, writes
p, mu, nu, average; the copy reads one vector and writes one."""


def measure(makers: dict[str, Callable[[], Callable[[], Any]]], options: Options, factor: float, unit: str) -> Table:
    """Builds and times the rows."""
    runs, failures = attempt(makers)
    times = interleave(runs, options.rounds, settle=SETTLE)
    return Table("s", times, failures).scaled(factor, unit)


def chained(step: Callable[[Any], Any], state: Any) -> Callable[[], None]:
    """Calls of a step that is given its state back."""
    held = [state]

    def run() -> None:
        held[0] = step(held[0])

    return run


def call_overhead(options: Options) -> Table:
    """Microseconds of a call that scales 350 donated leaves of 4 floats, or the same numbers as one vector."""

    def shrink(state: Any) -> Any:
        return fg.tree.map(lambda x: x * 0.999, state)

    def ours(state: Any) -> Callable[[], None]:
        run = chained(fg.jit(shrink, donate_argnums=0, backend=options.backend), state)
        run()
        return run

    def jax_form() -> Callable[[], None]:
        import jax
        import jax.numpy as jnp

        step = jax.jit(lambda state: [x * 0.999 for x in state], donate_argnums=0)

        def waited(state: Any) -> Any:
            state = step(state)
            state[-1].block_until_ready()  # the outputs of one program are ready together
            return state

        return chained(waited, [jnp.ones(LEAF) for _ in range(LEAVES)])

    makers = {
        "fg.jit": lambda: ours([torch.ones(LEAF) for _ in range(LEAVES)]),
        "fg.jit, one vector": lambda: ours(torch.ones(LEAVES * LEAF)),
        "JAX": jax_form,
    }
    return measure(makers, options, 1e6, "us")


def normals(options: Options) -> Table:
    """Milliseconds of a million normal numbers."""

    def ours() -> Callable[[], Tensor]:
        draw = fg.jit(lambda key: fg.random.normal(key, (NORMALS,)), backend=options.backend)
        key = fg.random.key(0)
        draw(key)
        return lambda: draw(key)

    def jax_form() -> Callable[[], Any]:
        import jax

        draw, key = jax.jit(lambda key: jax.random.normal(key, (NORMALS,))), jax.random.key(0)
        return lambda: draw(key).block_until_ready()

    makers = {"fg.jit": ours, "torch.randn": lambda: lambda: torch.randn(NORMALS), "JAX": jax_form}
    return measure(makers, options, 1e3, "ms")


def update_traffic(options: Options, parameters: int = PARAMETERS) -> Table:
    """Milliseconds of clip, AdamW and average on one vector, and of a copy of it."""
    tx = fg.optim.chain(fg.optim.clip_by_global_norm(1.0), fg.optim.adamw(1e-3, weight_decay=0.01))
    average = fg.ema.constant(0.999)

    def update(state: Any, grads: Tensor) -> Any:
        params, opt_state, mean = state
        updates, opt_state = tx.update(grads, opt_state, params)
        params = fg.optim.apply_updates(params, updates)
        return params, opt_state, average.update(params, mean)[1]

    def ours() -> Callable[[], None]:
        params, grads = torch.full((parameters,), 0.1), torch.full((parameters,), 1e-3)
        jitted = fg.jit(update, donate_argnums=0, backend=options.backend)
        run = chained(lambda state: jitted(state, grads), (params, tx.init(params), average.init(params)))
        run()
        return run

    def copy() -> Callable[[], Tensor]:
        source, target = torch.ones(parameters), torch.zeros(parameters)
        return lambda: target.copy_(source)

    makers: dict[str, Callable[[], Callable[[], Any]]] = {"fg.jit": ours, "Tensor.copy_": copy}
    return measure(makers, options, 1e3, "ms")
