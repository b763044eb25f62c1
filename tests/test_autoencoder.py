"""Networks of two halves: principal components, modules of torch.nn, codes between them."""

import pytest
import torch
from torch.nn import functional as F

from functorch_gen import nn, optim, random, tree
from functorch_gen.models import Autoencoder, ConvAutoencoder, EncoderDecoder
from functorch_gen.transforms import grad, jit, vmap

F64 = torch.float64


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(random.key(seed), shape, F64)


def test_linear_autoencoder_finds_the_principal_components():
    """Its least squared error is the sum of the variances it leaves out (Baldi and Hornik 1989)."""
    net = Autoencoder(4, 2, hidden_features=())
    x = normal(0, 200, 4) * torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=F64) @ torch.linalg.qr(normal(1, 4, 4))[0]
    x = x - x.mean(0)

    def loss(params):
        return (net(params, x) - x).square().sum(1).mean()

    params, tx = tree.cast(net.init(random.key(2)), F64), optim.adam(0.05)
    state = tx.init(params)
    descend = jit(lambda params, state: tx.update(grad(loss)(params), state, params), backend="aten")
    for _ in range(400):
        updates, state = descend(params, state)
        params = optim.apply_updates(params, updates)
    left_out = torch.linalg.eigvalsh(x.mT @ x / len(x))[:2].sum()
    assert abs(loss(params) / left_out - 1) < 1e-4


def test_conv_autoencoder_equals_torch_modules():
    net = ConvAutoencoder(2, 3, image_size=(8, 4), channels=(4, 5), activation=F.relu)
    params = tree.cast(net.init(random.key(0)), F64)
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, 2, 1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 5, 3, 2, 1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(10, 3),
    ).double()
    decoder = torch.nn.Sequential(
        torch.nn.Linear(3, 10),
        torch.nn.Unflatten(1, (5, 2, 1)),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(5, 4, 4, 2, 1),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(4, 2, 4, 2, 1),
    ).double()
    encoder.load_state_dict(tree.names(params["encoder"]))
    decoder.load_state_dict(tree.names(params["decoder"]))
    x = normal(1, 3, 2, 8, 4)
    code = net.encode(params, x)
    torch.testing.assert_close(code, encoder(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net.decode(params, code), decoder(code), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net(params, x), decoder(encoder(x)), rtol=1e-12, atol=1e-12)


def test_call_is_decode_of_encode_with_the_keys_of_both():
    net, key = Autoencoder(4, 2, (8,), dropout=0.5), random.key(3)
    params, x = net.init(random.key(0)), torch.ones(5, 4)
    code = net.encode(params, x, key=key)
    assert torch.equal(net(params, x, key=key), net.decode(params, code, key=key))
    assert not torch.equal(net(params, x, key=key), net(params, x))


def test_halves_take_leading_axes():
    net = ConvAutoencoder(1, 2, image_size=4, channels=(3,))
    params, x = tree.cast(net.init(random.key(0)), F64), normal(1, 2, 3, 1, 4, 4)
    torch.testing.assert_close(net(params, x), vmap(lambda x: net(params, x))(x), rtol=1e-12, atol=1e-12)


def test_encoder_decoder_refuses_state():
    with pytest.raises(TypeError, match="EncoderDecoder: expected encoder to be a layer without state"):
        EncoderDecoder(nn.BatchNorm1d(3), nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Autoencoder(4, 0), "Autoencoder: expected latent_features >= 1"),
        (lambda: Autoencoder(4, 2, (0,)), "Autoencoder: expected hidden_features >= 1"),
        (lambda: ConvAutoencoder(1, 2, image_size=6), "ConvAutoencoder: expected image_size divisible by 4"),
    ],
    ids=["latent", "hidden", "image"],
)
def test_autoencoders_refuse_bad_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_conv_autoencoder_refuses_another_image():
    net = ConvAutoencoder(1, 2, image_size=8)
    with pytest.raises(ValueError, match=r"ConvAutoencoder: x: expected shape \(..., c=1, h=8, w=8\)"):
        net(net.init(random.key(0)), torch.zeros(2, 1, 4, 4))
