"""Writes combinators.json: wrappers of optax 0.2.8 in float64 (jax 0.10.2): ``python make_combinators.py``."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from make_optim import problem
from optax import contrib

jax.config.update("jax_enable_x64", True)

STEPS = (1, 2, 7, 50)


def warmup(count):
    # optax counts in int32, which would make the schedule float32
    return optax.linear_schedule(0.0, 0.1, 10)(jnp.asarray(count).astype(float))


def fall(count):
    return optax.linear_schedule(0.1, 0.01, 30)(jnp.asarray(count).astype(float))


WRAPPERS = {
    "ema": optax.chain(optax.ema(0.8), optax.scale(-0.05)),
    "ema_biased": optax.chain(optax.ema(0.8, debias=False), optax.scale(-0.05)),
    "multi_steps": optax.MultiSteps(optax.adam(0.05), 3, accumulator_dtype=jnp.float64),
    "multi_steps_schedule": optax.MultiSteps(optax.sgd(0.05), lambda n: 1 + n % 3, accumulator_dtype=jnp.float64),
    "lookahead": optax.lookahead(optax.sgd(0.05, momentum=0.9), sync_period=5, slow_step_size=0.4),
    "schedule_free_sgd": contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9),
    "schedule_free_adam": contrib.schedule_free(optax.adam(warmup, b1=0.0), warmup, b1=0.95),
    "schedule_free_fall": contrib.schedule_free(optax.sgd(fall), fall, b1=0.5),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(warmup, b1=0.8, weight_decay=0.1),
    "partition": optax.partition({"a": optax.adam(0.05), "b": optax.sgd(0.02, 0.9)}, {"bias": "a", "weight": "b"}),
    "masked": optax.chain(optax.masked(optax.trace(0.7), {"bias": False, "weight": True}), optax.scale(-0.03)),
    "freeze": optax.chain(optax.adam(0.05), optax.freeze({"bias": True, "weight": False})),
}


def quadratic():
    """Ill-conditioned: curvatures from 0.1 to 20."""
    curvature = {"bias": jnp.array([0.1, 1.0]), "weight": jnp.array([[0.5, 20.0], [3.0, 0.3], [7.0, 0.1]])}
    params = jax.tree.map(jnp.ones_like, curvature)
    return params, lambda params: sum(jnp.sum(curvature[name] * params[name] ** 2) / 2 for name in params)


def rosenbrock():
    params = {"bias": jnp.array([-0.5, 0.3]), "weight": jnp.zeros((3, 2))}

    def loss(params):
        x = jnp.concatenate([params["bias"], params["weight"].reshape(-1)])
        return jnp.sum((1 - x[:-1]) ** 2 + 5 * (x[1:] - x[:-1] ** 2) ** 2) / 10

    return params, loss


def trajectory(name, problem):
    tx = WRAPPERS[name]
    params, loss = problem()
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    fast = lambda params: params.fast if name == "lookahead" else params

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(fast(params)), state, params)
        return optax.apply_updates(params, updates), state

    state, found = tx.init(params), []
    for n in range(1, max(STEPS) + 1):
        params, state = step(params, state)
        if n in STEPS:
            found.append({key: leaf.tolist() for key, leaf in fast(params).items()})
    if name.startswith("schedule_free"):
        average = contrib.schedule_free_eval_params(state, params)
        found.append({key: leaf.tolist() for key, leaf in average.items()})
    return found


def main():
    problems = {"fit": problem, "quadratic": quadratic, "rosenbrock": rosenbrock}
    found = {name: {at: trajectory(name, make) for at, make in problems.items()} for name in WRAPPERS}
    Path(__file__).with_name("combinators.json").write_text(json.dumps({"steps": STEPS, "trajectories": found}) + "\n")


if __name__ == "__main__":
    main()
