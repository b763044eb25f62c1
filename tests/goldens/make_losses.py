"""Writes losses.json: losses of optax 0.2.8 and their gradients in float64 (jax 0.10.2): ``python make_losses.py``."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

jax.config.update("jax_enable_x64", True)


def wave(*shape, phase=0.0, scale=1.0):
    """Numbers in general position."""
    size = 1
    for n in shape:
        size *= n
    return scale * jnp.sin(1.7 * jnp.arange(float(size)) + phase).reshape(shape)


def simplex(*shape, phase=0.0):
    return jax.nn.softmax(2 * wave(*shape, phase=phase), -1)


def ntxent(x, y):
    """The loss of all views of the batch; the labels tell which belong together."""
    index = jnp.arange(x.shape[0])
    return optax.losses.ntxent(jnp.concatenate([x, y]), jnp.concatenate([index, index]), 0.3)


def ctc(logits):
    input_lengths, label_lengths = jnp.array([7, 5, 7]), jnp.array([3, 2, 0])
    padding = jnp.arange(7) >= input_lengths[:, None]
    label_padding = jnp.arange(3) >= label_lengths[:, None]
    labels = jnp.array([[1, 1, 3], [2, 1, 0], [0, 0, 0]])
    return optax.losses.ctc_loss(logits, padding.astype(float), labels, label_padding.astype(float), log_epsilon=-1e30)


LABELS = jnp.array([2, 0, 4])
SIGNS = jnp.where(wave(3, 4, phase=2.0) > 0, 1.0, -1.0)

# name: (loss, its arguments); losses with more axes are summed or averaged as ours are
LOSSES = {
    "log_cosh": (lambda x, y: optax.log_cosh(x, y).mean(1), [wave(3, 4, scale=3.0), wave(3, 4, phase=1.0)]),
    "hinge_loss": (lambda x: optax.losses.hinge_loss(x, SIGNS).mean(1), [wave(3, 4, scale=2.0)]),
    "multiclass_hinge_loss": (lambda x: optax.losses.multiclass_hinge_loss(x, LABELS), [wave(3, 5)]),
    "sigmoid_focal_loss": (
        lambda x: optax.sigmoid_focal_loss(x, (SIGNS + 1) / 2, alpha=0.25, gamma=1.5).mean(1),
        [wave(3, 4, scale=4.0)],
    ),
    "sigmoid_focal_loss soft": (
        lambda x, t: optax.sigmoid_focal_loss(x, t, gamma=2.0).mean(1),
        [wave(3, 4, scale=4.0), simplex(3, 4)],
    ),
    "cosine_distance": (optax.cosine_distance, [wave(3, 4), wave(3, 4, phase=1.0)]),
    "cross_entropy": (
        lambda x, t: optax.softmax_cross_entropy(x, optax.smooth_labels(t, 0.1)),
        [wave(3, 5, scale=3.0), simplex(3, 5)],
    ),
    "kl_div": (optax.losses.kl_divergence, [jnp.log(simplex(3, 5)), simplex(3, 5, phase=1.0)]),
    "ntxent": (ntxent, [wave(3, 4), wave(3, 4, phase=1.0)]),
    "ctc_loss": (ctc, [wave(3, 7, 4, scale=2.0)]),
}


def golden(loss, args):
    argnums = tuple(range(len(args)))
    gradients = jax.grad(lambda *args: loss(*args).sum(), argnums)(*args)
    return {
        "args": [x.tolist() for x in args],
        "value": loss(*args).tolist(),
        "gradients": [x.tolist() for x in gradients],
    }


def main():
    goldens = {name: golden(loss, args) for name, (loss, args) in LOSSES.items()}
    goldens["signs"] = SIGNS.tolist()
    Path(__file__).with_name("losses.json").write_text(json.dumps(goldens) + "\n")


if __name__ == "__main__":
    main()
