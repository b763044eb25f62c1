"""Inverse error function by polynomials, which Inductor vectorises; ``torch.erfinv`` it does not.

With w = -log(1 - x^2), erfinv(x) / x is a polynomial in w where w is small and in sqrt(w) in the tails.

Source: Giles 2012, "Approximating the erfinv function", GPU Computing Gems, Jade edition. XLA has the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["erfinv"]

_CENTRAL32 = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_TAIL32 = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)
_CENTRAL64 = (
    -3.64441206401782e-21,
    -1.6850591381820166e-19,
    1.28584807152564e-18,
    1.1157877678025181e-17,
    -1.333171662854621e-16,
    2.0972767875968562e-17,
    6.637638134358324e-15,
    -4.054566272975207e-14,
    -8.151934197605472e-14,
    2.6335093153082323e-12,
    -1.2975133253453532e-11,
    -5.415412054294628e-11,
    1.0512122733215323e-09,
    -4.112633980346984e-09,
    -2.9070369957882005e-08,
    4.2347877827932404e-07,
    -1.3654692000834679e-06,
    -1.3882523362786469e-05,
    0.00018673420803405714,
    -0.000740702534166267,
    -0.006033670871430149,
    0.24015818242558962,
    1.6536545626831027,
)
_MIDDLE64 = (
    2.2137376921775787e-09,
    9.075656193888539e-08,
    -2.7517406297064545e-07,
    1.8239629214389228e-08,
    1.5027403968909828e-06,
    -4.013867526981546e-06,
    2.9234449089955446e-06,
    1.2475304481671779e-05,
    -4.7318229009055734e-05,
    6.828485145957318e-05,
    2.4031110387097894e-05,
    -0.0003550375203628475,
    0.0009532893797373805,
    -0.0016882755560235047,
    0.002491442096107851,
    -0.003751208507569241,
    0.005370914553590064,
    1.0052589676941592,
    3.0838856104922208,
)
_TAIL64 = (
    -2.7109920616438573e-11,
    -2.555641816996525e-10,
    1.5076572693500548e-09,
    -3.789465440126737e-09,
    7.61570120807834e-09,
    -1.496002662714924e-08,
    2.914795345090108e-08,
    -6.771199775845234e-08,
    2.2900482228026655e-07,
    -9.9298272942317e-07,
    4.526062597223154e-06,
    -1.968177810553167e-05,
    7.599527703001776e-05,
    -0.00021503011930044477,
    -0.00013871931833623122,
    1.0103004648645344,
    4.849906401408584,
)


def erfinv(x: Tensor) -> Tensor:
    """Inverse error function of x in (-1, 1); half precisions are computed in ``float32``.

    >>> torch.allclose(torch.erf(erfinv(torch.tensor([-0.5, 0.0, 0.999]))), torch.tensor([-0.5, 0.0, 0.999]))
    True
    """
    if x.dtype == torch.float64:
        return _erfinv64(x)
    return _erfinv32(x.to(torch.float32)).to(x.dtype)


def _erfinv32(x: Tensor) -> Tensor:
    w = -torch.log1p(-x * x)
    central = w < 5
    root = torch.sqrt(torch.where(central, 5, w))  # no infinite slope at w = 0
    return x * torch.where(central, _horner(_CENTRAL32, w - 2.5), _horner(_TAIL32, root - 3))


def _erfinv64(x: Tensor) -> Tensor:
    w = -torch.log((1 - x) * (1 + x))  # as Giles; XLA's log1p(-x * x) loses six digits where x is near 1
    central, middle = w < 6.25, w < 16
    root = torch.sqrt(torch.where(central, 6.25, w))
    tail = torch.where(middle, _horner(_MIDDLE64, root - 3.25), _horner(_TAIL64, root - 5))
    return x * torch.where(central, _horner(_CENTRAL64, w - 3.125), tail)


def _horner(coefficients: Sequence[float], w: Tensor) -> Tensor:
    """The polynomial whose coefficients are given from the highest power down."""
    y = coefficients[0] * w + coefficients[1]
    for c in coefficients[2:]:
        y = y * w + c
    return y
