"""Recurrent nets: those of torch.nn, to rounding; and every transform, which those of torch.nn do not have."""

from dataclasses import asdict, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import functorch_gen as fg
from functorch_gen import nn, random, tree
from functorch_gen.transforms.tracing.trace import trace

F64 = torch.float64
BATCH, LENGTH, SIZE, HIDDEN = 3, 4, 2, 3
LENGTHS = torch.tensor([2, 4, 1])

NETS = {
    "RNN": nn.RNN(SIZE, HIDDEN),
    "RNN relu": nn.RNN(SIZE, HIDDEN, nonlinearity="relu"),
    "LSTM": nn.LSTM(SIZE, HIDDEN),
    "LSTM proj_size": nn.LSTM(SIZE, HIDDEN, proj_size=2),
    "GRU": nn.GRU(SIZE, HIDDEN),
}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def draw_params(layer: Any, seed: int = 0) -> Any:
    return tree.cast(layer.init(random.key(seed)), F64)


def draw_state(net: Any, *lead: int) -> Any:
    like = net(draw_params(net), draw(1, *lead, 1, SIZE))[1]
    return tree.map(lambda leaf: draw(2 + leaf.shape[-1], *leaf.shape), like)


def assert_close(actual: Any, expected: Any) -> None:
    # the same sums of a few dozen numbers of order one, in another order
    assert tree.allclose(actual, expected, rtol=1e-12, atol=1e-12)


def weigh(x: Any) -> Tensor:
    """A function without symmetries: weighted sines."""
    y = tree.ravel(x)[0]
    return torch.linspace(0.5, 1.5, y.numel(), dtype=F64) @ torch.sin(y)


# Equal to torch.nn.


def run_torch(module: Any, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
    if lengths is None:
        return module(x, state)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y, last = module(packed, state)
    return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0], last


FORMS = [
    {"num_layers": layers, "bidirectional": both, "bias": bias}
    for layers, both, bias in product((1, 2), (False, True), (True, False))
]


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(f"{k}={v}" for k, v in form.items()))
@pytest.mark.parametrize("name", NETS)
def test_net_equals_torch_in_outputs_states_and_gradients(name: str, form: dict[str, Any], packed: bool) -> None:
    net, lengths = replace(NETS[name], **form), LENGTHS if packed else None
    params, x, state = draw_params(net), draw(0, BATCH, LENGTH, SIZE), draw_state(net, BATCH)
    module = getattr(torch.nn, type(net).__name__)(**asdict(net), dtype=F64)
    module.load_state_dict(params)
    inputs = tree.map(lambda leaf: leaf.clone().requires_grad_(), (x, state))
    expected = run_torch(module, *inputs, lengths)
    assert_close(net(params, x, state, lengths=lengths), tree.map(Tensor.detach, expected))

    names, weights = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(weigh(expected), [*weights, *tree.leaves(inputs)])
    ours = fg.grad(lambda *a: weigh(net(*a, lengths=lengths)), (0, 1, 2))(params, x, state)
    assert_close(ours[0], dict(zip(names, found, strict=False)))
    assert_close(tree.leaves(ours[1:]), list(found[len(names) :]))


@pytest.mark.parametrize("name", NETS)
def test_net_has_the_fields_and_parameters_of_torch(name: str) -> None:
    net = replace(NETS[name], num_layers=2, bidirectional=True)
    module = getattr(torch.nn, type(net).__name__)(**asdict(net))
    shapes = {name: x.shape for name, x in net.init(random.key(0)).items()}
    assert shapes == {name: x.shape for name, x in module.named_parameters()}


def test_init_is_uniform_within_one_over_the_root_of_hidden_size() -> None:
    """1,600 and more draws: mean and variance of U(-b, b) within five standard errors."""
    bound = 1 / 16**0.5
    draws = tree.ravel(nn.LSTM(7, 16).init(random.key(0)))[0].double() / bound
    error = 5 / draws.numel() ** 0.5
    assert draws.abs().max() <= 1
    assert abs(draws.mean()) < error * (1 / 3) ** 0.5
    assert abs(draws.square().mean() - 1 / 3) < error * (4 / 45) ** 0.5


@pytest.mark.parametrize("name", NETS)
def test_init_is_a_function_of_the_key_that_batches(name: str) -> None:
    net, keys = NETS[name], random.split(random.key(0), 3)
    assert tree.equal(fg.vmap(net.init)(keys), tree.stack([net.init(key) for key in keys]))
    assert not tree.equal(net.init(keys[0]), net.init(keys[1]))


def test_net_takes_time_first() -> None:
    net = nn.GRU(SIZE, HIDDEN, bidirectional=True)
    params, x = draw_params(net), draw(0, BATCH, LENGTH, SIZE)
    y, last = net(params, x, lengths=LENGTHS)
    first = replace(net, batch_first=False)
    assert_close(first(params, x.movedim(1, 0), lengths=LENGTHS), (y.movedim(1, 0), last))


@pytest.mark.parametrize("name", NETS)
def test_net_takes_any_leading_axes(name: str) -> None:
    net = replace(NETS[name], num_layers=2, bidirectional=True)
    params, x, lengths = draw_params(net), draw(0, 2, BATCH, LENGTH, SIZE), torch.tensor([[4, 1, 2], [3, 3, 0]])
    state = draw_state(net, 2, BATCH)
    y, last = net(params, x, state, lengths=lengths)
    for i, j in product(range(2), range(BATCH)):
        one = net(params, x[i, j], tree.map(lambda s, i=i, j=j: s[:, i, j], state), lengths=lengths[i, j])
        assert_close(one, (y[i, j], tree.map(lambda s, i=i, j=j: s[:, i, j], last)))


def test_state_may_be_any_pair() -> None:
    net = nn.LSTM(SIZE, HIDDEN)
    params, x, (h, c) = draw_params(net), draw(0, BATCH, LENGTH, SIZE), draw_state(net, BATCH)
    assert tree.equal(net(params, x, [h, c]), net(params, x, (h, c)))


# Lengths.


@pytest.mark.parametrize("name", NETS)
def test_lengths_give_what_each_sequence_alone_gives(name: str) -> None:
    net = replace(NETS[name], num_layers=2, bidirectional=True)
    params, x, state = draw_params(net), draw(0, BATCH, LENGTH, SIZE), draw_state(net, BATCH)
    y, last = net(params, x, state, lengths=LENGTHS)
    for i, n in enumerate(LENGTHS.tolist()):
        one = net(params, x[i, :n], tree.map(lambda s, i=i: s[:, i], state))
        assert_close(one, (y[i, :n], tree.map(lambda s, i=i: s[:, i], last)))
        assert torch.equal(y[i, n:], torch.zeros_like(y[i, n:]))


def test_padding_is_not_read() -> None:
    net = nn.LSTM(SIZE, HIDDEN, 2, bidirectional=True)
    params, x = draw_params(net), draw(0, BATCH, LENGTH, SIZE)
    padded = torch.where(torch.arange(LENGTH)[:, None] < LENGTHS[:, None, None], x, torch.nan)
    gradient = fg.grad(lambda p, x: weigh(net(p, x, lengths=LENGTHS)), (0, 1))
    assert tree.equal(gradient(params, padded), gradient(params, x))


def test_length_zero_keeps_the_first_state_and_lengths_beyond_the_end_are_the_end() -> None:
    net = nn.GRU(SIZE, HIDDEN)
    params, x, state = draw_params(net), draw(0, BATCH, LENGTH, SIZE), draw_state(net, BATCH)
    y, last = net(params, x, state, lengths=torch.tensor([0, 9, 4], dtype=torch.int32))
    whole = net(params, x, state)
    assert torch.equal(last[:, 0], state[:, 0])
    assert_close((y[1:], last[:, 1:]), (whole[0][1:], whole[1][:, 1:]))


def test_net_takes_sequences_of_no_steps() -> None:
    net = nn.GRU(SIZE, HIDDEN, bidirectional=True)
    state = draw_state(net, BATCH)
    y, last = net(draw_params(net), torch.zeros(BATCH, 0, SIZE, dtype=F64), state)
    assert y.shape == (BATCH, 0, 2 * HIDDEN)
    assert torch.equal(last, state)


# Dropout.


def test_dropout_falls_between_layers_and_only_with_a_key() -> None:
    net = nn.GRU(SIZE, 64, num_layers=2, dropout=0.5)
    params, x, key = draw_params(net), draw(0, LENGTH, SIZE), random.key(0)
    first, second = nn.GRU(SIZE, 64), nn.GRU(64, 64)
    below, above = ({n.replace(f"_l{i}", "_l0"): p for n, p in params.items() if f"_l{i}" in n} for i in range(2))
    hidden = first(below, x)[0]
    dropped = nn.Bound({"dropout": nn.Dropout(0.5)}, {}, key=key).dropout(hidden)
    assert_close(net(params, x, key=key)[0], second(above, dropped)[0])
    assert_close(net(params, x)[0], second(above, hidden)[0])
    assert not torch.equal(dropped, hidden)


def test_net_draws_only_where_something_may_drop() -> None:
    assert nn.draws(nn.LSTM(2, 3, 2, dropout=0.1))
    assert not nn.draws(nn.LSTM(2, 3, 1, dropout=0.1))
    assert not nn.draws(nn.LSTM(2, 3, 2))


# Transforms, which torch.nn's own nets do not have.


def slope(fun: Any, x: Any, v: Any) -> Any:
    """The derivative along v by central differences of fourth order, to about 1e-11 / 1e-3."""
    at = lambda h: fun(tree.add_scaled(x, v, h))
    h = 1e-3
    near, far = tree.sub(at(h), at(-h)), tree.sub(at(2 * h), at(-2 * h))
    return tree.scale(tree.sub(tree.scale(near, 8.0), far), 1 / (12 * h))


def loss(net: Any) -> Any:
    return lambda params, x, lengths=LENGTHS: weigh(net(params, x, lengths=lengths))


X, V = draw(7, BATCH, LENGTH, SIZE), draw(8, BATCH, LENGTH, SIZE)
SMOOTH = {
    "RNN": nn.RNN(SIZE, 2, 2),
    "LSTM": nn.LSTM(SIZE, 2, proj_size=1),
    "GRU": nn.GRU(SIZE, 2, bidirectional=True),
}
over_smooth = pytest.mark.parametrize("net", SMOOTH.values(), ids=SMOOTH)


@over_smooth
def test_net_jvp_and_second_derivatives_are_slopes(net: Any) -> None:
    f, params, v = loss(net), draw_params(net), draw_params(net, 1)
    x_slope, p_slope = slope(lambda x: f(params, x), X, V), slope(lambda p: fg.grad(f)(p, X), params, v)
    # truncation h^4 f^(5) / 30, near 1e-12, and rounding 1e-16 / h
    close = {"rtol": 1e-8, "atol": 1e-9}
    assert tree.allclose(fg.jvp(lambda x: f(params, x), (X,), (V,))[1], x_slope, **close)
    assert tree.allclose(fg.hvp(lambda p: f(p, X), (params,), (v,)), p_slope, **close)
    twice = fg.grad(lambda p: tree.vdot(fg.grad(f)(p, X), v))(params)
    assert tree.allclose(twice, p_slope, **close)


@over_smooth
def test_net_hessian_is_its_columns(net: Any) -> None:
    """One column after another by grad of the slope of the loss, against all at once."""
    flat, unravel = tree.ravel(draw_params(net))
    f = lambda p: loss(net)(unravel(p), X)
    columns = [fg.grad(lambda p, e=e: fg.grad(f)(p) @ e)(flat) for e in torch.eye(flat.numel(), dtype=F64)]
    assert_close(fg.hessian(f)(flat), torch.stack(columns, 1))


@over_smooth
def test_net_jacobians_agree(net: Any) -> None:
    f = lambda x: net(draw_params(net), x, lengths=LENGTHS)
    assert_close(fg.jacrev(f)(X), fg.jacfwd(f)(X))


@over_smooth
def test_per_example_gradients_equal_a_loop(net: Any) -> None:
    params = draw_params(net)
    batched = fg.vmap(fg.grad(loss(net)), (None, 0, 0))(params, X, LENGTHS)
    one_by_one = [fg.grad(loss(net))(params, x, n) for x, n in zip(X, LENGTHS, strict=True)]
    assert_close(batched, tree.stack(one_by_one))


@over_smooth
def test_ensemble_equals_a_loop(net: Any) -> None:
    members = [draw_params(net, seed) for seed in range(3)]
    together = fg.vmap(lambda p: net(p, X, lengths=LENGTHS))(tree.stack(members))
    assert_close(together, tree.stack([net(p, X, lengths=LENGTHS) for p in members]))


STACKS = {
    "value": lambda f: f,
    "grad": lambda f: fg.grad(f, (0, 1)),
    "jvp": lambda f: lambda p, x, n: fg.jvp(lambda x: f(p, x, n), (x,), (V,)),
    "grad of grad": lambda f: fg.grad(lambda p, x, n: tree.norm(fg.grad(f, (0, 1))(p, x, n)), (0, 1)),
    "hvp": lambda f: lambda p, x, n: fg.hvp(lambda p: f(p, x, n), (p,), (p,)),
    "hessian": lambda f: lambda p, x, n: fg.hessian(lambda x: f(p, x, n[:2]))(x[:2, :2]),
    "vmap(grad)": lambda f: fg.vmap(fg.grad(f), (None, 0, 0)),
    "jacrev": lambda f: lambda p, x, n: fg.jacrev(fg.vmap(f, (None, 0, 0)))(p, x, n),
    "grad(remat)": lambda f: fg.grad(fg.remat(f), (0, 1)),
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(
    "net",
    [pytest.param(net, marks=[] if name == "LSTM" else [pytest.mark.slow], id=name) for name, net in SMOOTH.items()],
)
def test_jitted_stack_equals_eager(net: Any, stack: str) -> None:
    params, fun = draw_params(net), STACKS[stack](loss(net))
    jitted = fg.jit(fun, backend="aten")
    assert_close(jitted(params, X, LENGTHS), fun(params, X, LENGTHS))
    assert_close(jitted(params, V, LENGTHS.flip(0)), fun(params, V, LENGTHS.flip(0)))


@pytest.mark.parametrize("stack", ["grad", *[pytest.param(s, marks=pytest.mark.slow) for s in ("jvp", "vmap(grad)")]])
def test_stack_equals_eager_under_torch_compile(stack: str) -> None:
    net = nn.LSTM(SIZE, 2, bidirectional=stack != "vmap(grad)")  # Dynamo is slow
    torch._dynamo.reset()
    params, fun = draw_params(net), STACKS[stack](loss(net))
    compiled = torch.compile(fun, fullgraph=True, backend="aot_eager")
    assert_close(compiled(params, X, LENGTHS), fun(params, X, LENGTHS))


@pytest.mark.slow
def test_gradient_equals_eager_under_inductor() -> None:
    net = nn.LSTM(SIZE, HIDDEN, 2, bidirectional=True)
    params, fun = draw_params(net), fg.grad(loss(net), (0, 1))
    assert_close(fg.jit(fun)(params, X, LENGTHS), fun(params, X, LENGTHS))


def test_gradient_with_a_dropout_key_replays_under_remat_and_jit() -> None:
    net = nn.LSTM(SIZE, HIDDEN, 2, dropout=0.5)
    params, key = draw_params(net), random.key(3)
    f = lambda p, key: weigh(net(p, X, key=key))
    expected = fg.grad(f)(params, key)
    assert_close(fg.grad(fg.remat(f))(params, key), expected)
    assert_close(fg.jit(fg.grad(f), backend="aten")(params, key), expected)


def traced(fun: Any, *args: Any) -> torch.fx.GraphModule:
    leaves, treedef = tree.flatten(args)
    return trace(lambda *leaves: fun(*tree.unflatten(treedef, leaves)), leaves).graph


def nodes_of(graph: torch.fx.GraphModule) -> int:
    """How many nodes a traced graph has, those of its loops' bodies among them."""
    return sum(len(module.graph.nodes) for module in graph.modules() if isinstance(module, torch.fx.GraphModule))


@over_smooth
def test_program_of_a_gradient_does_not_grow_with_the_length(net: Any) -> None:
    gradient, params = fg.grad(loss(net)), draw_params(net)
    sizes = [nodes_of(traced(gradient, params, draw(0, BATCH, n, SIZE), LENGTHS)) for n in (LENGTH, 10 * LENGTH)]
    assert sizes[0] == sizes[1]


def products(graph: torch.fx.GraphModule) -> int:
    return sum(node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for node in graph.graph.nodes)


def test_loop_of_a_net_holds_only_the_product_with_the_state() -> None:
    """The products with the inputs are one, outside of the loop."""
    net = nn.LSTM(SIZE, HIDDEN)
    graph = traced(lambda p, x: net(p, x)[0], draw_params(net), X)
    (body,) = [module for name, module in graph.named_modules() if name.startswith("scan_body")]
    assert (products(graph), products(body)) == (1, 1)


# Errors.

LSTM, GRU = nn.LSTM(SIZE, HIDDEN, 2), nn.GRU(SIZE, HIDDEN)
P, Q = draw_params(LSTM), draw_params(GRU)
H = draw(0, 2, BATCH, HIDDEN)

ERRORS = {
    "features": (lambda: LSTM(P, X[..., :1]), r"LSTM: x: expected shape \(..., l, input_size=2\), got \(3, 4, 1\)"),
    "no time": (lambda: GRU(Q, X[0, 0]), r"GRU: x: expected shape \(..., l, input_size=2\), got \(2,\)"),
    "time first": (
        lambda: nn.GRU(SIZE, HIDDEN, batch_first=False)(Q, X[..., :1]),
        r"GRU: x: expected shape \(l, n2, input_size=2\), got \(3, 4, 1\)",
    ),
    "state": (lambda: LSTM(P, X, (H, H[:1])), r"LSTM: state c: expected shape \(2, 3, 3\), got \(1, 3, 3\)"),
    "state of GRU": (lambda: GRU(Q, X, H), r"GRU: state h: expected shape \(1, 3, 3\), got \(2, 3, 3\)"),
    "lengths": (lambda: LSTM(P, X, lengths=LENGTHS[:2]), r"LSTM: lengths: expected shape \(3,\), got \(2,\)"),
    "input_size": (lambda: nn.LSTM(0, 3), "LSTM: expected input_size >= 1, got 0"),
    "num_layers": (lambda: nn.GRU(2, 3, 0), "GRU: expected num_layers >= 1, got 0"),
    "dropout": (lambda: nn.RNN(2, 3, dropout=1.5), "RNN: expected 0 <= dropout <= 1, got 1.5"),
    "proj_size": (lambda: nn.LSTM(2, 3, proj_size=3), "LSTMCell: expected proj_size < hidden_size=3, got 3"),
    "nonlinearity": (
        lambda: nn.RNN(2, 3, nonlinearity="gelu"),
        "RNNCell: expected nonlinearity to be one of 'tanh', 'relu', got 'gelu'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_sizes_are_errors_that_name_the_argument(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_errors_that_name_the_argument() -> None:
    for call, message in [
        (lambda: LSTM(P, X, H), r"LSTM: state: expected a pair of tensors \(h, c\), got Tensor"),
        (lambda: LSTM(P, X, lengths=LENGTHS.double()), "LSTM: lengths: expected an integer tensor, got torch.float64"),
        (lambda: LSTM(P, X, lengths=[2, 4, 1]), "LSTM: lengths: expected a tensor"),
        (lambda: GRU(Q, [1.0]), "GRU: x: expected a tensor"),
        (lambda: nn.LSTM(2.0, 3), "LSTM: expected input_size to be an int"),
    ]:
        with pytest.raises(TypeError, match=message):
            call()


def test_missing_parameters_are_named() -> None:
    with pytest.raises(KeyError, match="weight_hh_l1"):
        LSTM({name: p for name, p in P.items() if name != "weight_hh_l1"}, X)
