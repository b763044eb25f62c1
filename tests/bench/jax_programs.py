"""The programs in JAX, by hand, in the layouts XLA likes: images (b, h, w, c), kernels (h, w, in, out), (in, out)."""

import math
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else it looks for accelerators

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from functorch_gen import tree
from tests.bench.programs import Batch, Program

__all__ = ["LOSSES", "batch_of", "params_of"]

Weights = dict[str, Any]
_TABLES = ("label", "tokens", "positions")  # embeddings are looked up by row


def params_of(program: Program) -> Weights:
    """The initial weights, transposed."""

    def convert(path: str, x: Any) -> Array:
        x = jnp.array(x.numpy())
        if x.ndim == 4:
            return jnp.transpose(x, (2, 3, 1, 0))
        return x.T if x.ndim == 2 and path.split(".")[-2] not in _TABLES else x

    return tree.map_with_path(convert, program.params)


def batch_of(batch: Batch) -> dict[str, Array]:
    """The batch, images transposed."""
    return {name: jnp.array((x.permute(0, 2, 3, 1) if x.ndim == 4 else x).numpy()) for name, x in batch.items()}


def linear(p: Weights, x: Array) -> Array:
    return x @ p["weight"] + p["bias"]


def mlp_loss(sizes: dict[str, Any]) -> Callable[[Weights, Any], Array]:
    def loss(params: Weights, batch: Any) -> Array:
        x = batch["x"]
        for i in range(sizes["layers"]):
            x = linear(params[str(2 * i)], jax.nn.relu(x) if i else x)
        return optax.softmax_cross_entropy_with_integer_labels(x, batch["label"]).mean()

    return loss


def conv(p: Weights, x: Array, stride: int = 1) -> Array:
    same = [(p["weight"].shape[0] // 2,) * 2] * 2
    y = lax.conv_general_dilated(x, p["weight"], (stride, stride), same, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + p["bias"]


def group_norm(p: Weights, x: Array, groups: int) -> Array:
    b, h, w, c = x.shape
    y = x.reshape(b, h, w, groups, c // groups)
    mean = y.mean((1, 2, 4), keepdims=True)
    variance = jnp.square(y - mean).mean((1, 2, 4), keepdims=True)
    y = (y - mean) * lax.rsqrt(variance + 1e-5)
    return y.reshape(b, h, w, c) * p["weight"] + p["bias"]


def res_block(p: Weights, x: Array, embed: Array, groups: int) -> Array:
    scale, shift = jnp.split(linear(p["embed"], embed)[:, None, None, :], 2, axis=-1)
    h = conv(p["conv1"], jax.nn.silu(group_norm(p["norm1"], x, groups)))
    h = jax.nn.silu((1 + scale) * group_norm(p["norm2"], h, groups) + shift)
    return (conv(p["skip"], x) if "skip" in p else x) + conv(p["conv2"], h)


def time_features(t: Array, features: int) -> Array:
    half = features // 2
    angles = 1000.0 * t[:, None] * jnp.exp(-math.log(10000.0) / half * jnp.arange(half))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def unet_loss(sizes: dict[str, Any]) -> Callable[[Weights, Any], Array]:
    groups, levels = sizes["groups"], sizes["levels"]

    def net(p: Weights, x: Array, t: Array, label: Array) -> Array:
        embed = linear(p["time2"], jax.nn.silu(linear(p["time1"], time_features(t, sizes["base_channels"]))))
        embed = jax.nn.silu(embed + p["label"]["weight"][label])
        h, skips = conv(p["stem"], x), []
        for level in range(levels):
            h = conv(p[f"shrink{level}"], h, stride=2) if level else h
            h = res_block(p[f"down{level}"]["block0"], h, embed, groups)
            skips.append(h)
        for name in ("block0", "block1"):
            h = res_block(p["middle"][name], h, embed, groups)
        for level in reversed(range(levels)):
            h = res_block(p[f"up{level}"]["block0"], jnp.concatenate([h, skips[level]], -1), embed, groups)
            h = conv(p[f"grow{level}"], h.repeat(2, axis=1).repeat(2, axis=2)) if level else h
        return conv(p["head"], jax.nn.silu(group_norm(p["norm"], h, groups)))

    def loss(params: Weights, batch: Any) -> Array:
        angle = (0.5 * math.pi * batch["t"])[:, None, None, None]
        x_t = jnp.cos(angle) * batch["image"] + jnp.sin(angle) * batch["noise"]
        return jnp.square(net(params, x_t, batch["t"], batch["label"]) - batch["noise"]).mean()

    return loss


def layer_norm(p: Weights, x: Array) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * p["weight"] + p["bias"]


def transformer_block(p: Weights, x: Array, heads: int) -> Array:
    b, n, d = x.shape
    q, k, v = jnp.split(linear(p["qkv"], layer_norm(p["norm1"], x)).reshape(b, n, 3 * heads, d // heads), 3, axis=2)
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + linear(p["out"], y.reshape(b, n, d))
    return x + linear(p["down"], jax.nn.gelu(linear(p["up"], layer_norm(p["norm2"], x)), approximate=False))


def gpt_loss(sizes: dict[str, Any]) -> Callable[[Weights, Any], Array]:
    def loss(params: Weights, batch: Any) -> Array:
        tokens, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        x = params["tokens"]["weight"][tokens] + params["positions"]["weight"][: tokens.shape[1]]
        for i in range(sizes["num_layers"]):
            x = transformer_block(params[f"block{i}"], x, sizes["num_heads"])
        logits = layer_norm(params["norm"], x) @ params["head"]["weight"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return loss


LOSSES: dict[str, Callable[[dict[str, Any]], Callable[[Weights, Any], Array]]] = {
    "mlp": mlp_loss,
    "unet": unet_loss,
    "gpt": gpt_loss,
}
