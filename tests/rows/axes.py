"""Rows: collectives over the named axis of a vmap."""

from zoo_case import from_draw

import functorch_gen as fg


def scaled(x):
    """Each example divided by the norm over all of them."""
    return fg.vmap(lambda row: row / (1 + fg.psum(row * row, "batch")).sqrt(), axis_name="batch")(x)


def normalised(x):
    """Batch statistics, without their affine map."""

    def one(row):
        mean = fg.pmean(row, "batch")
        variance = fg.pmean((row - mean) ** 2, "batch")
        return (row - mean) / (variance + 0.1).sqrt()

    return fg.vmap(one, axis_name="batch")(x)


def attracted(x):
    """Each example's sum of Gaussian kernels to all examples."""

    def one(row):
        distances = ((fg.all_gather(row, "batch") - row) ** 2).sum(-1)
        return (-distances / 2).exp().sum()

    return fg.vmap(one, axis_name="batch")(x)


CASES = [
    from_draw("psum in vmap", scaled, lambda d: (d(4, 2),)),
    from_draw("pmean in vmap", normalised, lambda d: (d(4, 2),)),
    from_draw("all_gather in vmap", attracted, lambda d: (d(4, 2),)),
]
