"""Rows of data: augmentations as functions of (key, images), mixtures of examples, windows of series."""

from zoo_case import ALIKE, from_draw

from functorch_gen import data

# Draws of random_affine lie in general position: no pixel falls on the grid, where the interpolation has kinks.
CASES = [
    from_draw(
        "data.random_crop", lambda key, x: data.random_crop(key, x, 3, padding=1), lambda d: (d.key(), d(2, 1, 3, 3))
    ),
    from_draw("data.random_flip", data.random_flip, lambda d: (d.key(), d(3, 1, 2, 3)), table=ALIKE),
    from_draw(
        "data.random_erase",
        lambda key, x: data.random_erase(key, x, 2),
        lambda d: (d.key(), d(2, 1, 3, 3)),
        table=ALIKE,
    ),
    from_draw(
        "data.affine",
        lambda x, degrees, shear: data.affine(x, degrees=20 * degrees, shear=10 * shear, translate=(0.3, -0.4)),
        lambda d: (d(2, 1, 3, 3), d.times(2), d.times(2)),
    ),
    from_draw(
        "data.random_affine",
        lambda key, x: data.random_affine(key, x, degrees=30.0, translate=0.2, scale=(0.8, 1.2), shear=10.0),
        lambda d: (d.key(), d(2, 1, 3, 3)),
        table=ALIKE,
    ),
    from_draw(
        "data.batch_indices",
        lambda key, step: data.batch_indices(key, 7, 3, step),
        lambda d: (d.key(), d.labels(4)),
        table=ALIKE,
    ),
    from_draw(
        "data.weighted_indices",
        lambda key, weights, step: data.weighted_indices(key, weights, 3, step),
        lambda d: (d.key(), d.times(5), d.labels(4)),
        table=ALIKE,
    ),
    from_draw("data.mixup", data.mixup, lambda d: (d.key(), d(3, 2), d(3, 2))),
    from_draw("data.cutmix", data.cutmix, lambda d: (d.key(), d(2, 1, 3, 3), d(2, 2)), table=ALIKE),
    from_draw("data.windows", lambda x: data.windows(x, 2, stride=2, horizon=1), lambda d: (d(6, 2),)),
]
