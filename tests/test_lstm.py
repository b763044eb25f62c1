"""LSTMModel: the same parts put together by torch.nn, padding, dropout, text piece by piece."""

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import functorch_gen as fg
from functorch_gen import models, random, tree

TOKENS = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([2, 4, 1])


def draw_params(model: models.LSTMModel) -> fg.typing.Params:
    return tree.cast(model.init(random.key(0)), torch.float64)


class Reference(torch.nn.Module):
    """The model of the parts of torch.nn."""

    def __init__(self, model: models.LSTMModel):
        super().__init__()
        sides = 2 if model.bidirectional else 1
        self.readout, self.sides = model.readout, sides
        self.embedding = torch.nn.Embedding(model.num_embeddings, model.embed_dim)
        self.lstm = torch.nn.LSTM(
            model.embed_dim, model.hidden_size, model.num_layers, batch_first=True, bidirectional=model.bidirectional
        )
        self.head = torch.nn.Linear(sides * model.hidden_size, model.out_features)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(x), lengths, batch_first=True, enforce_sorted=False)
        y, (h, _) = self.lstm(packed)
        if self.readout == "all":
            return self.head(pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0])
        return self.head(torch.cat(list(h[-self.sides :]), -1))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("readout", ["last", "all"])
def test_lstm_model_equals_torch_in_values_and_gradients(readout: str, bidirectional: bool) -> None:
    """To 1e-12 in float64: the same sums in another order."""
    model = models.LSTMModel(5, 3, 2, 4, num_layers=2, bidirectional=bidirectional, readout=readout)
    params, module = draw_params(model), Reference(model).double()
    module.load_state_dict(tree.names(params))
    expected = module(TOKENS, LENGTHS)
    expected.sin().sum().backward()
    found = model(params, TOKENS, lengths=LENGTHS)
    grads = fg.grad(lambda p: model(p, TOKENS, lengths=LENGTHS).sin().sum())(params)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    wanted = {name: p.grad for name, p in module.named_parameters()}
    assert tree.allclose(tree.names(grads), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("readout", ["last", "all"])
def test_lstm_model_does_not_read_the_padding(readout: str) -> None:
    model = models.LSTMModel(5, 3, 2, 4, bidirectional=True, readout=readout)
    params = draw_params(model)
    other = torch.where(torch.arange(4) < LENGTHS[:, None], TOKENS, (TOKENS + 1) % 5)
    y, z = (model(params, x, lengths=LENGTHS) for x in (TOKENS, other))
    assert torch.equal(y, z)


def test_lstm_model_runs_on_from_a_state() -> None:
    model = models.LSTMModel(5, 5, 2, 4, num_layers=2, readout="all")
    params, state, pieces = draw_params(model), None, []
    for piece in TOKENS.split(1, dim=1):
        y, state = model.run(params, piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), model(params, TOKENS), rtol=1e-12, atol=1e-12)


def test_lstm_model_drops_only_with_a_key() -> None:
    model, plain = (models.LSTMModel(5, 3, 2, 4, dropout=p) for p in (0.5, 0.0))
    params, key = draw_params(model), random.key(1)
    assert torch.equal(model(params, TOKENS), plain(params, TOKENS))
    assert torch.equal(model(params, TOKENS, key=key), model(params, TOKENS, key=key))
    assert not torch.equal(model(params, TOKENS, key=key), model(params, TOKENS))


def test_lstm_model_learns_the_token_that_comes_after() -> None:
    """A cycle of five tokens: the likelihood of what follows comes within 1 % of one."""
    model = models.LSTMModel(5, 5, 8, 16, readout="all")
    text = torch.arange(13) % 5
    tx = fg.optim.adam(0.05)

    def loss(params: fg.typing.Params) -> Tensor:
        return torch.nn.functional.cross_entropy(model(params, text[:-1]), text[1:])

    def step(carry: fg.typing.Tree, _: None) -> tuple[fg.typing.Tree, Tensor]:
        params, state = carry
        value, grads = fg.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (fg.optim.apply_updates(params, updates), state), value

    params = model.init(random.key(0))
    losses = fg.jit(lambda carry: fg.scan(step, carry, length=60)[1], backend="aten")((params, tx.init(params)))
    assert losses[-1] < 0.01 < losses[0]


def test_lstm_model_refuses_wrong_fields() -> None:
    for fields, message in [
        ({"num_embeddings": 0}, "LSTMModel: expected num_embeddings >= 1, got 0"),
        ({"readout": "mean"}, "LSTMModel: expected readout to be one of 'last', 'all', got 'mean'"),
        ({"dropout": 2.0}, "LSTMModel: expected 0 <= dropout <= 1, got 2.0"),
        ({"num_layers": 0}, "LSTMModel: expected num_layers >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            models.LSTMModel(**{"num_embeddings": 5, "out_features": 2, **fields})
