"""Modules that draw: from the key they are given, and from nothing else."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functorch_gen import interop, random


def test_dropout_draws_from_the_key_alone():
    apply, params, state = interop.from_module(nn.Dropout(0.25))
    before = torch.get_rng_state()
    x = torch.ones(20_000)
    first, second = (apply(params, state, x, train=True, key=random.key(i))[0] for i in (0, 1))
    assert torch.equal(first, apply(params, state, x, train=True, key=random.key(0))[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    assert set(first.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (first > 0).double().mean().item() == pytest.approx(0.75, abs=0.012)  # four standard deviations
    assert torch.equal(apply(params, state, x, key=random.key(0))[0], x)


def test_each_dropout_of_a_call_draws_anew():
    twice = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    apply, params, state = interop.from_module(twice)
    y = apply(params, state, torch.ones(4000), train=True, key=random.key(0))[0]
    assert (y > 0).double().mean().item() == pytest.approx(0.25, abs=0.03)  # one half if both drew the same


def test_channel_dropout_drops_channels():
    apply, params, state = interop.from_module(nn.Dropout2d(0.5))
    y = apply(params, state, torch.ones(8, 16, 3, 3), train=True, key=random.key(0))[0]
    channels = y.flatten(2)
    assert torch.equal(channels.amin(-1), channels.amax(-1))
    assert 0 < (y > 0).double().mean() < 1


def test_inplace_dropout_writes_into_its_input():
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = 1.0 * x
            F.dropout(y, 0.5, self.training, inplace=True)
            return y

    apply, params, state = interop.from_module(Net())
    y = apply(params, state, torch.ones(100), train=True, key=random.key(0))[0]
    assert set(y.tolist()) == {0.0, 2.0}


class Drawing(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x + self.draw(x)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (torch.randn_like, random.normal),
        (torch.rand_like, random.uniform),
        (lambda x: torch.randn(2, 3), random.normal),
        (lambda x: torch.rand((2, 3), dtype=torch.float32), random.uniform),
        (lambda x: torch.randn(size=(2, 3)), random.normal),
        (lambda x: torch.empty(2, 3).normal_(1.0, 2.0), lambda *args: 1 + 2 * random.normal(*args)),
        (lambda x: torch.empty(2, 3).uniform_(-1, 3), lambda *args: -1 + 4 * random.uniform(*args)),
        (lambda x: torch.distributions.Normal(x, 1.0).rsample(), random.normal),
    ],
)
def test_draws_come_from_the_key(call, expected):
    apply, params, state = interop.from_module(Drawing(call))
    before, x = torch.get_rng_state(), torch.zeros(2, 3)
    y = apply(params, state, x, key=random.key(5))[0]
    assert torch.equal(y, expected(random.fold_in(random.key(5), 0), (2, 3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_draw_without_a_key_is_an_error():
    apply, params, state = interop.from_module(Drawing(torch.randn_like))
    with pytest.raises(TypeError, match="from_module: expected a key, for forward calls randn_like; got None"):
        apply(params, state, torch.zeros(3))


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (lambda x: x + torch.randint(3, (3,)), "randint"),
        (lambda x: torch.bernoulli(x), "bernoulli"),
        (lambda x: x.clone().exponential_(), "exponential_"),
        (lambda x: F.alpha_dropout(x, 0.5, training=True), "alpha_dropout"),
        (lambda x: F.gumbel_softmax(x), "gumbel_softmax"),
        (lambda x: F.rrelu(x, training=True), "rrelu"),
    ],
)
def test_other_draws_are_errors(forward, name):
    apply, params, state = interop.from_module(Drawing(forward))
    before = torch.get_rng_state()
    with pytest.raises(TypeError, match=rf"from_module: expected a forward .*got {name};"):
        apply(params, state, torch.zeros(3), key=random.key(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_of_a_packed_sequence_is_an_error():
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(3, 2, 2), torch.tensor([3, 1]))
    apply, params, state = interop.from_module(nn.GRU(2, 3, num_layers=2, dropout=0.5))
    assert apply(params, state, packed, train=True)[0][0].data.shape == (4, 3)
    with pytest.raises(TypeError, match=r"from_module: expected gru of a packed sequence to have no dropout, got 0\.5"):
        apply(params, state, packed, train=True, key=random.key(0))
