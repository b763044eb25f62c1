"""Differentiable augmentation: each image its own draw, the formulas of DiffAugment, gradients that pass."""

from functools import partial

import pytest
import torch

from functorch_gen import data, gan, random
from functorch_gen.transforms import grad

KEY = random.key(0)


def images(b=5, c=3):
    return random.normal(random.key(1), (b, c, 4, 4), torch.float64)


def test_brightness_adds_one_number_to_an_image():
    x = images(2000)
    change = gan.random_brightness(KEY, x, strength=0.5) - x
    each = change.flatten(1)
    torch.testing.assert_close(each, each[:, :1].expand_as(each), rtol=0, atol=1e-14)
    assert each[:, 0].abs().max() <= 0.5
    assert abs(each[:, 0].var() / (1 / 12) - 1) < 0.1  # uniform on [-1/2, 1/2]: 4 standard errors are 0.08


@pytest.mark.parametrize(("change", "axes"), [(gan.random_saturation, (1,)), (gan.random_contrast, (1, 2, 3))],
                         ids=["saturation", "contrast"])  # fmt: skip
def test_distances_from_the_mean_are_scaled_by_one_number(change, axes):
    x = images()
    y = change(KEY, x, strength=0.7)
    torch.testing.assert_close(y.mean(axes), x.mean(axes), rtol=1e-12, atol=1e-14)
    ratio = ((y - y.mean(axes, keepdim=True)) / (x - x.mean(axes, keepdim=True))).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-10, atol=0)
    assert ((ratio - 1).abs() <= 0.7).all()
    assert ratio[:, 0].unique().numel() == 5


def test_augment_gives_each_change_a_key_of_its_own():
    x = images()
    first, second = random.split(KEY)
    crop = partial(data.random_crop, size=4, padding=1)
    found = gan.augment(KEY, x, gan.random_contrast, crop)
    torch.testing.assert_close(found, crop(second, gan.random_contrast(first, x)), rtol=0, atol=0)
    assert torch.equal(gan.augment(KEY, x), x)


def test_gradients_pass_to_the_generator():
    """In the pixels that are kept by moving and cutting, times the contrast."""
    x = images(4, 1)
    parts = (partial(data.random_crop, size=4, padding=1), partial(data.random_erase, size=2))
    slope = grad(lambda x: gan.augment(KEY, x, *parts).sum())(x)
    kept = gan.augment(KEY, torch.ones_like(x), *parts)
    assert set(slope.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(slope.sum((1, 2, 3)), kept.sum((1, 2, 3)), rtol=0, atol=0)


def test_wrong_images_are_refused():
    with pytest.raises(ValueError, match=r"random_brightness: x: expected shape \(b, c, h, w\), got \(4, 4\)"):
        gan.random_brightness(KEY, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="random_contrast: expected 0 <= strength"):
        gan.random_contrast(KEY, images(), strength=-1.0)
    with pytest.raises(TypeError, match=r"random_saturation: x: expected a floating-point tensor, got torch\.int64"):
        gan.random_saturation(KEY, torch.zeros(1, 1, 2, 2, dtype=torch.int64))
