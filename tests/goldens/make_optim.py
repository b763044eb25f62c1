"""Writes optim.json: trajectories and schedules of optax 0.2.8 in float64 (jax 0.10.2): ``python make_optim.py``."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

jax.config.update("jax_enable_x64", True)

STEPS = (1, 10, 50)

SCHEDULES = {
    "constant": optax.constant_schedule(0.3),
    "linear": optax.linear_schedule(0.1, 0.7, 20),
    "linear_begin": optax.linear_schedule(0.7, 0.1, 20, 5),
    "cosine": optax.cosine_decay_schedule(0.4, 30, 0.1),
    "warmup_cosine": optax.warmup_cosine_decay_schedule(0.01, 0.2, 10, 40, 0.02),
    "no_warmup_cosine": optax.warmup_cosine_decay_schedule(0.01, 0.2, 0, 40, 0.02),
    "joined": optax.join_schedules([optax.constant_schedule(1.0), optax.linear_schedule(1.0, 0.0, 8)], [12]),
}

OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "nesterov": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.03),
    "adam_eps": optax.adam(0.03, b1=0.8, b2=0.95, eps=1e-3, eps_root=1e-4),
    # optax counts in int32, which would make the schedule float32
    "adam_schedule": optax.adam(lambda count: SCHEDULES["warmup_cosine"](count.astype(float))),
    "adamw": optax.adamw(0.03, weight_decay=0.2),
    "adamw_mask": optax.adamw(0.03, weight_decay=0.2, mask={"bias": False, "weight": True}),
    "clip_norm_adam": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.03)),
    "clip_norm_sgd": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.05)),
    "clip_sgd": optax.chain(optax.clip(0.1), optax.sgd(0.05)),
    "l2_trace": optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.5), optax.scale(-0.05)),
}


def problem():
    """A small nonconvex fit, of numbers that both libraries compute alike."""
    x = jnp.sin(jnp.arange(12.0)).reshape(4, 3)
    y = jnp.cos(jnp.arange(8.0)).reshape(4, 2)
    params = {"bias": jnp.zeros(2), "weight": 0.5 * jnp.cos(1.7 * jnp.arange(6.0)).reshape(3, 2)}

    def loss(params):
        fit = jnp.sum((jnp.tanh(x @ params["weight"] + params["bias"]) - y) ** 2)
        return fit + 0.1 * jnp.sum(jnp.cos(3 * params["weight"]))

    return params, loss


def trajectory(tx):
    params, loss = problem()
    state, found = tx.init(params), []
    for step in range(1, max(STEPS) + 1):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        if step in STEPS:
            found.append({name: leaf.tolist() for name, leaf in params.items()})
    return found


def main():
    goldens = {
        "steps": STEPS,
        "trajectories": {name: trajectory(tx) for name, tx in OPTIMIZERS.items()},
        "schedules": {name: [float(f(step)) for step in range(50)] for name, f in SCHEDULES.items()},
    }
    Path(__file__).with_name("optim.json").write_text(json.dumps(goldens) + "\n")


if __name__ == "__main__":
    main()
