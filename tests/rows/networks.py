"""Rows of networks: autoencoders, the residual classifier; a network in mixed precision."""

import torch
from rows.layers import from_model
from rows.state import from_stateful
from zoo_case import from_draw

from functorch_gen import models, nn
from functorch_gen.transforms import autocast

CASES = [
    from_model("Autoencoder", models.Autoencoder(3, 2, hidden_features=(3,)), lambda d: (d(2, 3),)),
    from_model("ConvAutoencoder", models.ConvAutoencoder(1, 2, 4, channels=(2,)), lambda d: (d(1, 1, 4, 4),)),
    from_stateful("models.ResNet", models.ResNet(1, 2, (1,), (2,), "cifar"), 2, 1, 3, 3),
    from_model("EncoderDecoder", models.EncoderDecoder(nn.Linear(2, 1), nn.Linear(1, 2)), lambda d: (d(2, 2),)),
    # In float64, which torch leaves as it is: the derivatives are those of the function itself.
    from_draw(
        "autocast",
        autocast(lambda w, x: torch.tanh(x @ w).square().mean(-1)),
        lambda d: (d(3, 2), d(2, 3)),
        dtype="choosing the dtype is what it is for",
    ),
]
