"""Rows of networks: autoencoders, the residual classifier."""

from rows.layers import from_model
from rows.state import from_stateful

from functorch_gen import models

CASES = [
    from_model("Autoencoder", models.Autoencoder(3, 2, hidden_features=(3,)), lambda d: (d(2, 3),)),
    from_model("ConvAutoencoder", models.ConvAutoencoder(1, 2, 4, channels=(2,)), lambda d: (d(1, 1, 4, 4),)),
    from_stateful("models.ResNet", models.ResNet(1, 2, (1,), (2,), "cifar"), 2, 1, 3, 3),
]
