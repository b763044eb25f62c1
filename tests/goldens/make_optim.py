"""Writes optim.json: float64 trajectories of optax 0.2.8 (jax 0.10.2) on three problems: ``python make_optim.py``."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

jax.config.update("jax_enable_x64", True)

STEPS = (1, 10, 50)

WARMUP_COSINE = optax.warmup_cosine_decay_schedule(0.01, 0.2, 10, 40, 0.02)


def adafactor(**arguments: Any) -> Any:
    return optax.adafactor(**arguments, dtype_momentum=jnp.float64)  # float32 by default


# By arguments that both libraries take: what it is called here, optax's function, its arguments.
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (optax.sgd, {"learning_rate": 5e-4}),
    "sgd nesterov": (optax.sgd, {"learning_rate": 5e-4, "momentum": 0.9, "nesterov": True}),
    "adam": (optax.adam, {"learning_rate": 0.03}),
    "adam eps": (optax.adam, {"learning_rate": 0.03, "b1": 0.8, "b2": 0.95, "eps": 1e-3, "eps_root": 1e-4}),
    "adamw": (optax.adamw, {"learning_rate": 0.03, "weight_decay": 0.2}),
    "nadam": (optax.nadam, {"learning_rate": 0.03}),
    "nadam eps": (optax.nadam, {"learning_rate": 0.01, "b1": 0.7, "b2": 0.9, "eps": 1e-3, "eps_root": 1e-4}),
    "radam": (optax.radam, {"learning_rate": 1e-3}),
    "radam threshold": (optax.radam, {"learning_rate": 1e-3, "b1": 0.5, "b2": 0.9, "eps_root": 1e-4, "threshold": 6.0}),
    "radam never rectified": (optax.radam, {"learning_rate": 1e-4, "b2": 0.5}),
    "adamax": (optax.adamax, {"learning_rate": 0.03}),
    "adamax eps": (optax.adamax, {"learning_rate": 0.01, "b1": 0.5, "b2": 0.8, "eps": 1e-2}),
    "amsgrad": (optax.amsgrad, {"learning_rate": 0.03}),
    "amsgrad b2": (optax.amsgrad, {"learning_rate": 0.03, "b2": 0.7, "eps_root": 1e-4}),
    "adabelief": (optax.adabelief, {"learning_rate": 0.01}),
    "adabelief eps": (optax.adabelief, {"learning_rate": 0.03, "b1": 0.8, "b2": 0.9, "eps": 1e-6, "eps_root": 1e-6}),
    "adan": (optax.adan, {"learning_rate": 0.03}),
    "adan decay": (optax.adan, {"learning_rate": 0.03, "b1": 0.9, "b2": 0.8, "b3": 0.95, "weight_decay": 0.2}),
    "adagrad": (optax.adagrad, {"learning_rate": 0.1}),
    "adagrad from zero": (optax.adagrad, {"learning_rate": 0.1, "initial_accumulator_value": 0.0, "eps": 1e-5}),
    "adadelta": (optax.adadelta, {"learning_rate": 1.0}),
    "adadelta decay": (optax.adadelta, {"learning_rate": 0.3, "rho": 0.8, "eps": 1e-4, "weight_decay": 0.1}),
    "rmsprop": (optax.rmsprop, {"learning_rate": 0.01}),
    "rmsprop momentum": (
        optax.rmsprop,
        {"learning_rate": 0.01, "initial_scale": 1.0, "eps_in_sqrt": False, "momentum": 0.5, "nesterov": True},
    ),
    "rmsprop centered": (optax.rmsprop, {"learning_rate": 0.003, "decay": 0.8, "eps": 1e-4, "centered": True}),
    "lion": (optax.lion, {"learning_rate": 0.01}),
    "lion decay": (optax.lion, {"learning_rate": 0.01, "b1": 0.8, "b2": 0.9, "weight_decay": 0.3}),
    "sign_sgd": (optax.sign_sgd, {"learning_rate": 0.01}),
    "lamb": (optax.lamb, {"learning_rate": 0.01}),
    "lamb decay": (optax.lamb, {"learning_rate": 0.01, "b1": 0.8, "eps_root": 1e-4, "weight_decay": 0.2}),
    "lars": (optax.lars, {"learning_rate": 0.05}),
    "lars decay": (
        optax.lars,
        {"learning_rate": 0.05, "weight_decay": 0.1, "trust_coefficient": 0.01, "eps": 1e-3, "nesterov": True},
    ),
    "adafactor": (adafactor, {"learning_rate": 0.01}),
    "adafactor factored": (
        adafactor,
        {"learning_rate": 0.03, "min_dim_size_to_factor": 2, "momentum": 0.9, "weight_decay_rate": 0.01},
    ),
    "adafactor bare": (
        adafactor,
        {
            "min_dim_size_to_factor": 2,
            "decay_rate": 0.7,
            "multiply_by_parameter_scale": False,
            "clipping_threshold": 0.01,
            "eps": 1e-8,
        },
    ),
    "muon": (optax.contrib.muon, {"learning_rate": 0.02}),
    "muon decay": (
        optax.contrib.muon,
        {
            "learning_rate": 0.02,
            "ns_steps": 3,
            "beta": 0.8,
            "weight_decay": 0.1,
            "nesterov": False,
            "adam_b1": 0.8,
            "adam_weight_decay": 0.2,
            "adam_learning_rate": 0.01,
            "consistent_rms": 0.2,
        },
    ),
    "polyak_sgd": (optax.polyak_sgd, {"max_learning_rate": 5e-4}),
    "polyak_sgd sps+": (
        optax.polyak_sgd,
        {"max_learning_rate": 0.01, "scaling": 2.0, "f_min": 0.5, "eps": 0.1, "variant": "sps+"},
    ),
}

# Those that test_optim.py writes down itself, on the first problem.
CHAINS = {
    # optax counts in int32, which would make the schedule float32
    "adam_schedule": optax.adam(lambda count: WARMUP_COSINE(count.astype(float))),
    "adamw_mask": optax.adamw(0.03, weight_decay=0.2, mask={"bias": False, "weight": True}),
    "clip_norm_adam": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.03)),
    "clip_norm_sgd": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.05)),
    "clip_sgd": optax.chain(optax.clip(0.1), optax.sgd(0.05)),
    "l2_trace": optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.5), optax.scale(-0.05)),
    "lars_mask": optax.lars(
        0.05, 0.1, {"bias": False, "weight": True}, trust_ratio_mask={"bias": False, "weight": True}
    ),
    "param_block_rms": optax.chain(optax.scale_by_param_block_rms(0.3), optax.sgd(0.05)),
    "trust_ratio_min_norm": optax.chain(optax.scale_by_trust_ratio(0.7, 0.1), optax.sgd(0.5)),
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


def quadratic():
    """Curvatures from 1e-3 to 1e3."""
    curvature = 10.0 ** (jnp.arange(8.0) - 4)
    params = {"a": jnp.cos(jnp.arange(2.0)), "b": jnp.sin(jnp.arange(6.0)).reshape(2, 3)}

    def loss(params):
        x = jnp.concatenate([params["a"], params["b"].reshape(-1)])
        return 0.5 * jnp.sum(curvature * (x - 0.3) ** 2)

    return params, loss


def nested():
    """A nested tree; the second row of one matrix, and one whole vector, have no gradient."""
    params = {
        "blocks": [
            {"scale": jnp.float64(0.7), "weight": jnp.cos(jnp.arange(8.0)).reshape(2, 4)},
            {"unused": jnp.ones(2)},
        ],
        "head": {"weight": jnp.sin(1 + jnp.arange(4.0)).reshape(4, 1)},
    }

    def loss(params):
        first, scale = params["blocks"][0]["weight"][0], params["blocks"][0]["scale"]
        out = jnp.tanh(scale * first) @ params["head"]["weight"]
        return jnp.sum((out - 1) ** 2) + 0.1 * jnp.sum(first**4)

    return params, loss


PROBLEMS = {"fit": problem, "quadratic": quadratic, "nested": nested}


def trajectory(tx, make):
    params, loss = make()
    tx = optax.with_extra_args_support(tx)
    state, found = tx.init(params), []

    @jax.jit
    def descend(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    for step in range(1, max(STEPS) + 1):
        params, state = descend(params, state)
        if step in STEPS:
            found.append(jax.tree.map(lambda leaf: leaf.tolist(), params))
    return found


def main():
    goldens = {
        "steps": STEPS,
        "optimizers": {
            name: {
                "arguments": arguments,
                "trajectories": {key: trajectory(make(**arguments), start) for key, start in PROBLEMS.items()},
            }
            for name, (make, arguments) in OPTIMIZERS.items()
        },
        "chains": {name: trajectory(tx, problem) for name, tx in CHAINS.items()},
    }
    Path(__file__).with_name("optim.json").write_text(json.dumps(goldens) + "\n")


if __name__ == "__main__":
    main()
