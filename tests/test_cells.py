"""Recurrent cells: those of torch.nn, to rounding."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen import nn, random, tree

CELLS = {
    "RNN": nn.RNNCell(2, 3),
    "RNN relu": nn.RNNCell(2, 3, nonlinearity="relu"),
    "LSTM": nn.LSTMCell(2, 3),
    "LSTM proj_size": nn.LSTMCell(2, 3, proj_size=1),
    "GRU": nn.GRUCell(2, 3),
}
TORCH = [name for name in CELLS if name != "LSTM proj_size"]  # torch's cell has no projection, its net has


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(cell: Any, *lead: int) -> tuple[Any, ...]:
    """Parameters, an input and a state."""
    params, x = tree.cast(cell.init(random.key(0)), torch.float64), draw(0, *lead, 2)
    return params, x, tree.map(lambda leaf: draw(1 + leaf.shape[-1], *leaf.shape), cell(params, x))


def weigh(x: Any) -> Tensor:
    """A function without symmetries: weighted sines."""
    y = tree.ravel(x)[0]
    return torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype) @ torch.sin(y)


def assert_close(actual: Any, expected: Any) -> None:
    # the same sums of a few dozen numbers of order one, in another order
    assert tree.allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", TORCH)
def test_cell_equals_torch_in_values_and_gradients(name: str, bias: bool) -> None:
    cell = replace(CELLS[name], bias=bias)
    params, x, state = arguments(cell, 4)
    fields = {field: value for field, value in asdict(cell).items() if field != "proj_size"}
    module = getattr(torch.nn, type(cell).__name__)(**fields, dtype=torch.float64)
    module.load_state_dict(params)
    inputs = tree.map(lambda leaf: leaf.clone().requires_grad_(), (x, state))
    expected = module(*inputs)
    assert_close(cell(params, x, state), tree.map(Tensor.detach, expected))

    names, weights = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(weigh(expected), [*weights, *tree.leaves(inputs)])
    ours = fg.grad(lambda *a: weigh(cell(*a)), (0, 1, 2))(params, x, state)
    assert_close(ours[0], dict(zip(names, found, strict=False)))
    assert_close(tree.leaves(ours[1:]), list(found[len(names) :]))


@pytest.mark.parametrize("name", CELLS)
def test_cell_takes_any_leading_axes(name: str) -> None:
    cell = CELLS[name]
    params, x, state = arguments(cell, 2, 3)
    one_by_one = [
        tree.stack([cell(params, x[i, j], tree.map(lambda s, i=i, j=j: s[i, j], state)) for j in range(3)])
        for i in range(2)
    ]
    assert_close(cell(params, x, state), tree.stack(one_by_one))


@pytest.mark.parametrize("name", CELLS)
def test_cell_without_state_starts_from_zeros(name: str) -> None:
    params, x, state = arguments(CELLS[name], 4)
    assert_close(CELLS[name](params, x), CELLS[name](params, x, tree.zeros_like(state)))


@pytest.mark.parametrize("name", TORCH)
def test_cell_has_the_fields_and_parameters_of_torch(name: str) -> None:
    fields = {field: value for field, value in asdict(CELLS[name]).items() if field != "proj_size"}
    module = getattr(torch.nn, type(CELLS[name]).__name__)(**fields)
    shapes = {name: x.shape for name, x in CELLS[name].init(random.key(0)).items()}
    assert shapes == {name: x.shape for name, x in module.named_parameters()}


@pytest.mark.parametrize("name", CELLS)
def test_a_net_is_its_cell_in_a_loop(name: str) -> None:
    cell = CELLS[name]
    params, _, state = arguments(cell, 4)
    xs = draw(9, 5, 4, 2)
    net = getattr(nn, type(cell).__name__.removesuffix("Cell"))(**{**asdict(cell), "batch_first": False})
    y, last = net({f"{name}_l0": p for name, p in params.items()}, xs, tree.map(lambda s: s[None], state))
    outputs = []
    for x in xs:
        state = cell(params, x, state)
        outputs.append(tree.leaves(state)[0])
    assert_close((y, tree.map(lambda s: s[0], last)), (torch.stack(outputs), state))


def test_cell_refuses_wrong_sizes() -> None:
    gru, lstm = CELLS["GRU"], CELLS["LSTM"]
    params, x, state = arguments(gru, 4)
    for call, error, message in [
        (lambda: gru(params, x[:, :1]), ValueError, r"GRUCell: x: expected shape \(..., input_size=2\), got \(4, 1\)"),
        (lambda: gru(params, [0.0]), TypeError, "GRUCell: x: expected a tensor of shape"),
        (lambda: gru(params, x, state[:2]), ValueError, r"GRUCell: state h: expected shape \(4, 3\), got \(2, 3\)"),
        (
            lambda: lstm(arguments(lstm)[0], x, state),
            TypeError,
            r"LSTMCell: state: expected a pair of tensors \(h, c\)",
        ),
        (lambda: nn.LSTMCell(2.0, 3), TypeError, "LSTMCell: expected input_size to be an int"),
        (lambda: nn.LSTMCell(2, 3, proj_size=-1), ValueError, "LSTMCell: expected proj_size >= 0, got -1"),
        (lambda: nn.RNNCell(2, 0), ValueError, "RNNCell: expected hidden_size >= 1, got 0"),
    ]:
        with pytest.raises(error, match=message):
            call()
