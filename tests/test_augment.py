"""Augmentations: explicit loops, torch's own grid_sample, exact rotations; every example its own draw."""

import math

import pytest
import torch
from torch.nn import functional as F

from functorch_gen import data, random, tree
from functorch_gen.transforms import grad, jit, vmap

KEY = random.key(0)
F64 = torch.float64
X = random.normal(random.key(1), (5, 2, 6, 7), F64)
TARGET = torch.eye(5, dtype=F64)

# name -> function of (key, images) that gives images
AUGMENTATIONS = {
    "crop": lambda key, x: data.random_crop(key, x, (6, 7), padding=2),
    "flip": data.random_flip,
    "vertical flip": lambda key, x: data.random_flip(key, x, axis="vertical"),
    "erase": lambda key, x: data.random_erase(key, x, 3),
    "affine": lambda key, x: data.random_affine(key, x, degrees=30, translate=0.2, scale=(0.8, 1.2), shear=10),
    "mixup": lambda key, x: data.mixup(key, x, TARGET[: len(x), : len(x)])[0],
    "cutmix": lambda key, x: data.cutmix(key, x, TARGET[: len(x), : len(x)])[0],
}
MIXTURES = {"mixup", "cutmix"}


def many(augment, x, n=4000):
    """One image, augmented many times: -> (n, c, h, w)."""
    return augment(KEY, x.expand(n, *x.shape))


# All of them.


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_is_a_function_of_its_key(name):
    augment = AUGMENTATIONS[name]
    assert torch.equal(augment(KEY, X), augment(KEY, X))
    assert not torch.equal(augment(KEY, X), augment(random.key(8), X))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_under_jit_equals_eager(name):
    augment = AUGMENTATIONS[name]
    jitted = jit(augment, backend="aten")
    for seed in range(3):
        assert torch.allclose(jitted(random.key(seed), X), augment(random.key(seed), X), rtol=1e-14, atol=1e-14)
    assert jitted.traces == 1


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_under_vmap_over_keys_equals_a_loop(name):
    augment = AUGMENTATIONS[name]
    keys = random.split(KEY, 3)
    want = torch.stack([augment(key, X) for key in keys])
    assert torch.allclose(vmap(augment, in_dims=(0, None))(keys, X), want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_augmentation_keeps_the_dtype(name, dtype):
    """float32 and float64 have other draws; those of crops, flips and boxes do not depend on the images' dtype."""
    x = X.to(dtype)
    found = AUGMENTATIONS[name](KEY, x)
    assert found.dtype == dtype
    if name not in ("mixup", "affine"):
        assert torch.equal(found, AUGMENTATIONS[name](KEY, X).to(dtype))


@pytest.mark.parametrize("name", ["crop", "flip", "vertical flip", "erase"])
def test_augmentation_takes_bytes(name):
    x = (X * 50 + 128).clamp(0, 255).to(torch.uint8)
    assert torch.equal(AUGMENTATIONS[name](KEY, x), AUGMENTATIONS[name](KEY, x.double()).to(torch.uint8))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_of_an_empty_batch_is_empty(name):
    assert AUGMENTATIONS[name](KEY, X[:0]).shape == X[:0].shape


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_of_other_axes_is_an_error(name):
    with pytest.raises(ValueError, match=r"expected shape \(b, c, h, w\), got \(2, 6, 7\)"):
        (AUGMENTATIONS[name] if name != "mixup" else AUGMENTATIONS["cutmix"])(KEY, X[0])


# Crop, flip, erase.


def test_random_crop_cuts_windows_and_every_one_equally_often():
    """15 places of a 4 x 3 window with one pixel around a 4 x 5 image; chi-square with 14 degrees of freedom."""
    image = torch.arange(1.0, 21.0).reshape(1, 4, 5)
    padded = F.pad(image, (1, 1, 1, 1), value=-1.0)
    windows = torch.stack([padded[:, i : i + 4, j : j + 3] for i in range(3) for j in range(5)])
    cut = many(lambda key, x: data.random_crop(key, x, (4, 3), padding=1, fill=-1.0), image)
    hits = (cut[:, None] == windows).all((2, 3, 4))
    assert (hits.sum(1) == 1).all()
    counts, expected = hits.sum(0), len(cut) / 15
    assert ((counts - expected) ** 2 / expected).sum() < 36.1  # exceeded with probability 0.001


def test_random_flip_mirrors_with_probability_p():
    image = torch.arange(6.0).reshape(1, 2, 3)
    for axis, mirrored in (("horizontal", image.flip(2)), ("vertical", image.flip(1))):
        found = many(lambda key, x, axis=axis: data.random_flip(key, x, p=0.3, axis=axis), image)
        flipped = (found == mirrored).all((1, 2, 3))
        assert (flipped | (found == image).all((1, 2, 3))).all()
        assert abs(flipped.double().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)
    assert torch.equal(data.random_flip(KEY, X, p=0.0), X)


def test_random_erase_fills_a_square_cut_off_at_the_edges():
    erased = many(lambda key, x: data.random_erase(key, x, 3, fill=7.0), torch.zeros(2, 6, 8)) == 7
    assert torch.equal(erased[:, 0], erased[:, 1])
    rows, columns = erased[:, 0].any(2), erased[:, 0].any(1)
    assert torch.equal(rows[:, :, None] & columns[:, None, :], erased[:, 0])  # a box
    for side in (rows, columns):
        length = side.sum(1)
        edge = side[:, 0] | side[:, -1]
        assert ((length == 3) | (edge & (length < 3))).all()
        first = side.int().argmax(1)
        place = torch.arange(side.shape[1]) - first[:, None]
        assert torch.equal(side, (place >= 0) & (place < length[:, None]))  # without gaps
    assert rows.any(0).all() & columns.any(0).all()


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: data.random_crop(KEY, X, 8), ValueError, r"a size of at most \(6, 7\), got \(8, 8\)"),
        (lambda: data.random_crop(KEY, X, 3, padding=-1), ValueError, "random_crop: expected padding >= 0"),
        (lambda: data.random_crop(KEY, X, 0), ValueError, "random_crop: expected height > 0, got 0"),
        (lambda: data.random_flip(KEY, X, axis="up"), ValueError, "random_flip: expected axis to be one of"),
        (lambda: data.random_flip(KEY, X, p=1.5), ValueError, r"expected p in \[0, 1\], got 1.5"),
        (lambda: data.random_erase(KEY, X, 0), ValueError, "random_erase: expected size > 0, got 0"),
        (lambda: data.random_affine(KEY, X, degrees=-1), ValueError, "random_affine: expected 0 <= degrees"),
        (lambda: data.random_affine(KEY, X, scale=(0.0, 1.0)), ValueError, "random_affine: expected scale > 0"),
        (lambda: data.random_affine(KEY, X, scale=(1.2, 1.0)), ValueError, "random_affine: expected 1.2 <= scale"),
        (lambda: data.affine(X.long()), TypeError, "affine: x: expected a floating-point tensor, got torch.int64"),
        (lambda: data.mixup(KEY, X, torch.arange(5)), TypeError, "mixup: target: expected a floating-point"),
        (lambda: data.cutmix(KEY, X, TARGET[:3]), ValueError, r"cutmix: target: expected shape \(b=5, k\)"),
    ],
    ids=range(12),
)  # fmt: skip
def test_augmentation_of_a_bad_argument_is_an_error(use, error, message):
    with pytest.raises(error, match=message):
        use()


# Affine maps.


@pytest.mark.parametrize("turns", [0, 1, 2, 3, -1])
def test_affine_by_right_angles_is_rot90(turns):
    x = X[:, :, :, :6]
    assert torch.allclose(data.affine(x, degrees=90.0 * turns), torch.rot90(x, turns, (-2, -1)), rtol=0, atol=1e-12)


def test_affine_by_half_a_turn_is_both_flips():
    assert torch.allclose(data.affine(X, degrees=180.0), X.flip(-1, -2), rtol=0, atol=1e-12)


def test_affine_of_nothing_is_the_identity():
    assert torch.equal(data.affine(X), X)
    assert torch.equal(data.random_affine(KEY, X), X)


def test_affine_moves_to_the_right_and_down():
    found = data.affine(X, translate=(2.0, -1.0), fill=9.0)
    want = torch.full_like(X, 9.0)
    want[:, :, :-1, 2:] = X[:, :, 1:, :-2]
    assert torch.equal(found, want)


def test_affine_enlarges_about_the_centre():
    """By 3, of an odd size: the middle third's pixels come three apart."""
    x = X[:, :, :5, :5]
    found = data.affine(x, scale=torch.full((5,), 3.0, dtype=F64))
    assert torch.allclose(found[:, :, 2, 2], x[:, :, 2, 2])
    assert torch.allclose(found[:, :, 2, 1], (2 * x[:, :, 2, 2] + x[:, :, 2, 1]) / 3)


def test_affine_shear_leans_to_the_right_as_it_goes_down():
    found = data.affine(X[:, :, :5], shear=45.0)
    for row in range(5):
        want = data.affine(X[:, :, row : row + 1], translate=(float(row - 2), 0.0))
        assert torch.allclose(found[:, :, row : row + 1], want, rtol=0, atol=1e-12)


def reference(x, degrees, translate, scale, shear):
    """torch's affine_grid and grid_sample: the matrix inverted numerically, in their units of half a side."""
    h, w = x.shape[-2:]
    angle, lean = torch.deg2rad(degrees), torch.tan(torch.deg2rad(shear))
    rotation = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], -1).reshape(-1, 2, 2)
    lean = torch.stack([torch.ones_like(lean), lean, torch.zeros_like(lean), torch.ones_like(lean)], -1)
    inverse = torch.linalg.inv(scale[:, None, None] * rotation @ lean.reshape(-1, 2, 2))
    half = torch.tensor([w / 2, h / 2], dtype=x.dtype)
    shift = -(inverse @ torch.stack(translate, -1)[:, :, None])[:, :, 0] / half
    theta = torch.cat([inverse * half / half[:, None], shift[:, :, None]], -1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, "bilinear", "zeros", align_corners=False)


def settings(seed):
    u = random.uniform(random.key(seed), (5, 5), F64)
    return 360 * u[0] - 180, (4 * u[1] - 2, 4 * u[2] - 2), 0.5 + u[3], 60 * u[4] - 30


@pytest.mark.parametrize("seed", range(4))
def test_affine_equals_grid_sample(seed):
    degrees, translate, scale, shear = settings(seed)
    found = data.affine(X, degrees=degrees, translate=translate, scale=scale, shear=shear)
    assert torch.allclose(found, reference(X, degrees, translate, scale, shear), rtol=0, atol=1e-12)


def test_affine_derivatives_equal_those_of_grid_sample():
    """Of the images and of all settings."""
    args = (X, *settings(0))
    weights = random.normal(random.key(2), X.shape, F64)

    def ours(x, degrees, translate, scale, shear):
        return (weights * data.affine(x, degrees=degrees, translate=translate, scale=scale, shear=shear)).sum()

    found = grad(ours, argnums=(0, 1, 2, 3, 4))(*args)
    want = grad(lambda *args: (weights * reference(*args)).sum(), argnums=(0, 1, 2, 3, 4))(*args)
    assert tree.allclose(found, want, rtol=1e-10, atol=1e-10)


def test_affine_fills_what_lies_outside():
    x = torch.full((1, 1, 4, 4), 3.0)
    assert torch.allclose(data.affine(x, degrees=33.0, translate=(9.0, 0.0), fill=3.0), x)
    assert (data.affine(x, translate=(9.0, 0.0), fill=2.0) == 2.0).all()


def test_affine_in_bfloat16_is_computed_in_float32():
    x = X.bfloat16()
    want = data.affine(x.float(), degrees=20.0, translate=(0.3, 0.1)).bfloat16()
    assert torch.equal(data.affine(x, degrees=20.0, translate=(0.3, 0.1)), want)


def test_random_affine_draws_within_its_ranges():
    """A dot at (right, down) = (2, 0) from the centre of 9 x 9 is found again by its centre of mass."""
    x = torch.zeros(1, 9, 9, dtype=F64)
    x[0, 4, 6] = 1.0

    def centre(images):
        mass = images.sum((1, 2, 3))
        place = torch.arange(9, dtype=F64) - 4
        return (images.sum((1, 2)) * place).sum(-1) / mass, (images.sum((1, 3)) * place).sum(-1) / mass

    right, down = centre(many(lambda key, x: data.random_affine(key, x, translate=0.2), x))
    for offset in (right - 2, down):  # uniform on [-1.8, 1.8]
        assert offset.abs().max() <= 1.8 + 1e-12
        assert abs(offset.mean()) < 4 * 1.8 / math.sqrt(3 * 4000)
        assert abs(offset.var() - 1.8**2 / 3) < 0.1
    assert abs(torch.corrcoef(torch.stack([right, down]))[0, 1]) < 4 / math.sqrt(4000)


# Mixtures.


def test_mixup_mixes_inputs_and_targets_with_one_share():
    x, target = data.mixup(KEY, X, TARGET)
    assert torch.allclose(x, torch.einsum("ij,jchw->ichw", target, X), rtol=1e-14, atol=1e-14)
    assert torch.allclose(target.sum(1), torch.ones(5, dtype=F64))
    share = torch.diagonal(data.mixup(KEY, torch.zeros(3000, 1), torch.eye(3000))[1])
    assert abs(share.mean() - 0.5) < 4 / math.sqrt(12 * 3000)
    assert abs(share.var() - 1 / 12) < 0.01


def test_cutmix_pastes_a_box_and_counts_its_pixels():
    n = 200
    images = torch.arange(float(n))[:, None, None, None].expand(n, 2, 8, 12)
    x, target = data.cutmix(KEY, images, torch.eye(n))
    own = x == images
    other = torch.where(own, -1.0, x).amax((1, 2, 3))  # the image that is pasted
    for i in range(n):
        pasted = ~own[i, 0]
        assert torch.equal(pasted, ~own[i, 1])
        assert torch.equal(pasted, pasted.any(1)[:, None] & pasted.any(0)[None])
        want = torch.zeros(n)
        want[i] = own[i, 0].float().mean()
        if pasted.any():
            assert (x[i, 0][pasted] == other[i]).all()
            want[int(other[i])] += pasted.float().mean()
        assert torch.allclose(target[i], want, atol=1e-6)


def test_cutmix_boxes_have_uniform_areas_where_they_are_not_cut_off():
    """E[area inside] = E[side * E[part inside]]^2 by quadrature over centre and side, both sides from one area."""
    n = 3000
    _, target = data.cutmix(KEY, torch.zeros(n, 1, 64, 64), torch.eye(n))
    area = 1 - torch.diagonal(target)
    grid = (torch.arange(400, dtype=F64) + 0.5) / 400
    side = grid.sqrt()[:, None]
    inside = ((grid + side / 2).clamp(max=1) - (grid - side / 2).clamp(min=0)).mean(1)  # by area, over centres
    assert abs(area.double().mean() - (inside**2).mean()) < 4 * area.std() / math.sqrt(n) + 0.01  # and pixels of 1/64
