"""Writes schedules.json: optax 0.2.8 in float64 (jax 0.10.2): ``python make_schedules.py``.

Schedules: 1,000 values each, as the base64 text of the compressed bytes of a float64 array. Clipping, noise and the
plateau: what the transformations of ``LEAVES`` or of a series of losses give.
"""

import base64
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

jax.config.update("jax_enable_x64", True)

CYCLES = [
    {"init_value": 0.01, "peak_value": 0.3, "warmup_steps": 20, "decay_steps": 150, "end_value": 0.02},
    {"init_value": 0.02, "peak_value": 0.2, "warmup_steps": 0, "decay_steps": 300, "exponent": 1.5},
    {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 10, "decay_steps": 250},
]

SCHEDULES = {
    "constant": optax.constant_schedule(0.3),
    "linear": optax.linear_schedule(0.1, 0.7, 20),
    "linear_begin": optax.linear_schedule(0.7, 0.1, 500, 5),
    "cosine_short": optax.cosine_decay_schedule(0.4, 30, 0.1),
    "warmup_cosine_short": optax.warmup_cosine_decay_schedule(0.01, 0.2, 10, 40, 0.02),
    "no_warmup_cosine": optax.warmup_cosine_decay_schedule(0.01, 0.2, 0, 40, 0.02),
    "joined": optax.join_schedules([optax.constant_schedule(1.0), optax.linear_schedule(1.0, 0.0, 8)], [12]),
    "polynomial": optax.polynomial_schedule(0.3, 0.01, 2.5, 600, 100),
    "cosine": optax.cosine_decay_schedule(0.4, 700, 0.1, 1.3),
    "exponential": optax.exponential_decay(0.5, 130, 0.4, 50, end_value=0.02),
    "exponential_growth": optax.exponential_decay(0.01, 100, 1.7, end_value=0.5),
    "staircase": optax.exponential_decay(0.5, 130, 0.4, 50, staircase=True),
    "piecewise_constant": optax.piecewise_constant_schedule(0.7, {100: 0.3, 500: 0.2, 501: 1.5}),
    "piecewise_linear": optax.piecewise_interpolate_schedule("linear", 0.7, {100: 0.3, 0: 1.2, 500: 2.0}),
    "piecewise_cosine": optax.piecewise_interpolate_schedule("cosine", 0.7, {100: 0.3, 500: 2.0}),
    "linear_onecycle": optax.linear_onecycle_schedule(900, 0.6),
    "cosine_onecycle": optax.cosine_onecycle_schedule(777, 0.6, 0.25, 10.0, 1e3),
    "warmup_constant": optax.warmup_constant_schedule(0.05, 0.3, 120),
    "warmup_cosine": optax.warmup_cosine_decay_schedule(0.01, 0.2, 100, 800, 0.02, 0.7),
    "warmup_exponential": optax.warmup_exponential_decay_schedule(0.01, 0.2, 100, 90, 0.5, 30, True, 0.01),
    "sgdr": optax.sgdr_schedule(CYCLES),
}

LEAVES = {  # layouts of torch; optax is given those of jax, outputs last
    "bias": 0.7 * np.cos(np.arange(3.0)),
    "scalar": np.asarray(1.3),
    "column": np.sin(np.arange(4.0)).reshape(4, 1),
    "matrix": np.cos(1.7 * np.arange(12.0)).reshape(3, 4) * np.array([[1.0], [0.01], [3.0]]),
    "kernel": np.sin(2.3 * np.arange(36.0)).reshape(3, 2, 3, 2),
    "zero": np.zeros((2, 3)),
}


def jaxs_layout(x):
    return x if x.ndim < 2 else np.moveaxis(x, 0, -1)


def torchs_layout(x):
    return x if x.ndim < 2 else np.moveaxis(x, -1, 0)


def transformed(tx, change=lambda x: x, back=lambda x: x):
    grads = {name: jnp.asarray(change(x)) for name, x in LEAVES.items()}
    params = {name: jnp.asarray(change(np.cos(3 * x) - 0.9)) for name, x in LEAVES.items()}
    updates, _ = tx.update(grads, tx.init(params), params)
    return {name: back(np.asarray(x)).tolist() for name, x in updates.items()}


def noisy():
    grads = {name: jnp.asarray(x) for name, x in LEAVES.items()}
    tx, found = optax.add_noise(0.3, 0.55, jax.random.key(7)), []
    state = tx.init(grads)
    for _ in range(3):
        updates, state = tx.update(grads, state)
        found.append({name: np.asarray(x).tolist() for name, x in updates.items()})
    return found


PLATEAUS = {
    "plain": {"factor": 0.5, "patience": 3},
    "cooldown": {"factor": 0.3, "patience": 2, "cooldown": 4, "rtol": 0.0, "atol": 0.05, "min_scale": 0.02},
    "mean": {"factor": 0.5, "patience": 2, "accumulation_size": 3, "rtol": 0.01, "cooldown": 1},
}


def losses():
    t = np.arange(200.0)
    return 1 / (1 + 0.1 * np.minimum(t, 60)) + 0.05 * np.cos(2.1 * t)


def scales(options):
    tx = optax.contrib.reduce_on_plateau(**options)
    state, found = tx.init(jnp.ones(1)), []
    for loss in losses():
        updates, state = tx.update(jnp.ones(1), state, value=loss)
        found.append(float(updates[0]))
    return found


def packed(values):
    return base64.b64encode(zlib.compress(np.asarray(values, "<f8").tobytes(), 9)).decode()


def main():
    goldens = {
        # of floats: optax's counts are int32, which would make the schedules float32
        "schedules": {name: packed([float(f(float(step))) for step in range(1000)]) for name, f in SCHEDULES.items()},
        "clip_by_block_rms": transformed(optax.clip_by_block_rms(0.4)),
        "adaptive_grad_clip": transformed(optax.adaptive_grad_clip(0.3, 0.01), jaxs_layout, torchs_layout),
        "centralize": transformed(optax.centralize()),
        "add_noise": noisy(),
        "plateaus": {name: packed(scales(options)) for name, options in PLATEAUS.items()},
    }
    Path(__file__).with_name("schedules.json").write_text(json.dumps(goldens) + "\n")


if __name__ == "__main__":
    main()
