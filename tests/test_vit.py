"""ViT: torch.nn's modules with its parameters, its initial distribution, and derivatives of every image."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from functorch_gen import models, nn, random, tree
from functorch_gen.transforms import grad, hvp, jit, vmap
from functorch_gen.typing import Params

SIZES: dict[str, Any] = {"in_channels": 2, "num_classes": 3, "image_size": (4, 6), "patch_size": 2}
SIZES |= {"num_layers": 2, "num_heads": 2, "embed_dim": 4}
TORCHS = {"attention": "self_attn", "mlp.0": "linear1", "mlp.2": "linear2"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


def drawn(vit: models.ViT) -> Params:
    """float64 parameters in general position: no weight is one, no bias zero."""
    named = tree.names(vit.init(random.key(0)))
    return tree.from_names({name: draw(*x.shape, seed=i) for i, (name, x) in enumerate(named.items())})


def torchs(params: Params) -> dict[str, Tensor]:
    """A block's parameters by torch's names."""
    names = tree.names(params)
    for ours, theirs in TORCHS.items():
        names = {name.replace(ours, theirs) if name.startswith(ours) else name: x for name, x in names.items()}
    return names


def reference(vit: models.ViT, params: Params, x: Tensor) -> Tensor:
    """Patch by patch, then ``torch.nn.TransformerEncoder`` without a mask."""
    weight, bias = params["patches"]["weight"], params["patches"]["bias"]
    patches = [
        torch.einsum("bcpq,ecpq->be", x[:, :, i : i + 2, j : j + 2], weight) + bias
        for i in range(0, 4, 2)
        for j in range(0, 6, 2)
    ]
    if vit.pool == "token":
        patches = [params["token"].expand(len(x), -1), *patches]
    h = torch.stack(patches, 1) + params["positions"]["weight"]
    for i in range(vit.num_layers):
        e = vit.embed_dim
        block = torch.nn.TransformerEncoderLayer(
            e, vit.num_heads, 4 * e, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
        )
        block.load_state_dict(torchs(params[f"block{i}"]))
        h = block(h)
    h = torch.nn.functional.layer_norm(h, (vit.embed_dim,), params["norm"]["weight"], params["norm"]["bias"])
    h = h[:, 0] if vit.pool == "token" else h.mean(1)
    return (h @ params["head"]["weight"].T + params["head"]["bias"]).detach()


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_vit_equals_torchs_encoder(pool: str) -> None:
    vit = models.ViT(**SIZES, pool=pool)
    params, x = drawn(vit), draw(3, 2, 4, 6)
    torch.testing.assert_close(vit(params, x), reference(vit, params, x), rtol=1e-12, atol=1e-12)
    assert vit(params, x[:0]).shape == (0, 3)
    assert ("token" in params) == (pool == "token")


def test_vit_starts_with_the_deviations_of_its_docstring() -> None:
    """Within five standard errors, std / sqrt(2 n)."""
    vit = models.ViT(
        3, 10, image_size=8, patch_size=2, num_layers=1, num_heads=4, embed_dim=32, gated=True, qk_norm=True
    )
    for name, x in tree.names(vit.init(random.key(0))).items():
        if name.endswith("bias") or name == "token" or "norm" in name:
            assert torch.equal(x, torch.full_like(x, float("norm" in name and name.endswith("weight")))), name
        else:
            assert abs(float(x.std()) / 0.02 - 1) < 5 / math.sqrt(2 * x.numel()), name


def test_vit_takes_norms_without_parameters() -> None:
    def norm(width: int) -> nn.LayerNorm:
        return nn.LayerNorm(width, elementwise_affine=False)

    free, usual, x = models.ViT(**SIZES, norm=norm), models.ViT(**SIZES), torch.ones(2, 2, 4, 6)
    params, both = free.init(random.key(0)), usual.init(random.key(0))
    torch.testing.assert_close(free(params, x), usual(both, x))
    assert tree.names(params).keys() == {name for name in tree.names(both) if "norm" not in name}


def test_vit_has_gradients_and_curvature_of_each_image() -> None:
    """A batch's are those of its images."""
    vit = models.ViT(**{**SIZES, "num_layers": 1}, norm=nn.RMSNorm, gated=True, qk_norm=True)
    params, x = tree.scale(drawn(vit), 0.5), draw(2, 2, 4, 6)

    def energy(params: Params, x: Tensor) -> Tensor:
        return vit(params, x[None]).sin().sum()

    each = jit(vmap(grad(energy), (None, 0)), backend="aten")(params, x)
    whole = grad(lambda params: vit(params, x).sin().sum())(params)
    torch.testing.assert_close(tree.map(lambda g: g.sum(0), each), whole, rtol=1e-10, atol=1e-12)
    t, step = draw(2, 4, 6, seed=8), 1e-5
    slope = (grad(energy, 1)(params, x[0] + step * t) - grad(energy, 1)(params, x[0] - step * t)) / (2 * step)
    curved = hvp(lambda x: energy(params, x), (x[0],), (t,))
    torch.testing.assert_close(curved, slope, rtol=1e-6, atol=1e-6)


def test_vit_drops_only_with_a_key() -> None:
    vit, dropped = models.ViT(**SIZES), models.ViT(**SIZES, dropout=0.3)
    params, x = drawn(vit), draw(3, 2, 4, 6)
    assert torch.equal(dropped(params, x), vit(params, x))
    assert not torch.equal(dropped(params, x, key=random.key(0)), vit(params, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 4}, r"expected image_size divisible by patch_size=4, got \(4, 6\)"),
        ({"pool": "max"}, "expected pool to be one of 'token', 'mean', got 'max'"),
        ({"num_heads": 3}, "expected embed_dim divisible by num_heads=3, got 4"),
        ({"dropout": 2.0}, "expected 0 <= dropout <= 1, got 2.0"),
    ],
    ids=["patch", "pool", "heads", "dropout"],
)
def test_vit_refuses_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ViT: {message}"):
        models.ViT(**{**SIZES, **options})


def test_vit_refuses_an_image_of_another_size() -> None:
    vit = models.ViT(**SIZES)
    with pytest.raises(ValueError, match=r"ViT: x: expected shape \(b, c=2, h=4, w=6\), got \(1, 2, 6, 4\)"):
        vit(vit.init(random.key(0)), torch.zeros(1, 2, 6, 4))
