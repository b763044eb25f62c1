"""torch modules as pure functions, and back."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functorch_gen as fg
from functorch_gen import interop, random, tree
from functorch_gen.transforms import grad, hvp, jit, jvp, remat, vmap

ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # the same sums in another order, in float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(module: nn.Module) -> nn.Module:
    """The module in float64, with parameters and floating buffers that no default hides."""
    module.double()
    for i, x in enumerate([*module.parameters(), *module.buffers()]):
        if x.is_floating_point():
            x.data = 0.5 * draw(i, *x.shape) if isinstance(x, nn.Parameter) else draw(i, *x.shape).exp()
    return module


def close(found: Any, expected: Any) -> None:
    tree.map(lambda x, y: torch.testing.assert_close(x, y, **ROUNDING), found, expected)


# Modules that are hard for functional_call.


class Residual(nn.Module):
    """A small ResNet, whose normalisation is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm = self.again = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv1(x)))
        return self.head((h + self.again(self.conv2(h))).mean((2, 3)))


class Language(nn.Module):
    """Embedding and output share their matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.embed(tokens))))


class Recording(nn.Module):
    """Assigns a buffer, and leaves things lying about."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(2), persistent=False)
        self.parts = [nn.Linear(2, 2)]  # hidden from torch
        self.part = self.parts[0]
        self.run = self.hidden

    def hidden(self, x: Tensor) -> Tensor:
        return self.parts[0](x)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = x.mean(0)
        self.last = self.run(x)
        return self.last


class LastOnly(nn.Module):
    """The output of a module that also returns its state."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0]


class Attend(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.net, self.need_weights = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True), need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, x, x, need_weights=self.need_weights)[0]


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2)), (2, 3)),
    "ResNet": (Residual, (3, 2, 4, 4)),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, activation="gelu", batch_first=True),
        (2, 3, 4),
    ),
    "attention": (lambda: Attend(False), (2, 3, 4)),
    "attention weights": (lambda: Attend(True), (2, 3, 4)),
    "LSTM": (lambda: LastOnly(nn.LSTM(2, 3, 2, dropout=0.2, batch_first=True, bidirectional=True)), (2, 4, 2)),
    "LSTM proj": (lambda: LastOnly(nn.LSTM(2, 4, proj_size=3)), (4, 2, 2)),
    "GRU": (lambda: LastOnly(nn.GRU(2, 3, bias=False)), (4, 2, 2)),
    "RNN": (lambda: LastOnly(nn.RNN(2, 3, nonlinearity="relu", batch_first=True)), (2, 4, 2)),
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), (2, 2, 3)),
    "GroupNorm": (lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4)), (2, 2, 3)),
    "InstanceNorm": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)),
        (2, 2, 4),
    ),
    "BatchNorm without statistics": (lambda: nn.BatchNorm1d(2, track_running_stats=False), (3, 2, 2)),
    "dropout2d": (lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.Dropout2d(0.4)), (2, 2, 3, 3)),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)), (2, 3)),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (2, 3)),
}


@pytest.fixture(params=MODULES)
def case(request) -> tuple[nn.Module, Tensor]:
    make, shape = MODULES[request.param]
    return drawn(make()), draw(100, *shape)


def without_dropout(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return module


# Values.


@pytest.mark.parametrize("train", [False, True])
def test_apply_equals_the_module_and_returns_its_buffers(case, train):
    module, x = case
    apply, params, state = interop.from_module(module)
    y, new = apply(params, state, x, train=train)
    reference = without_dropout(copy.deepcopy(module)).train(train)
    close(y, reference(x))
    named = dict(reference.named_buffers())
    close(tree.names(new), named)


def test_apply_changes_nothing(case):
    module, x = case
    before = copy.deepcopy(module.state_dict())
    apply, params, state = interop.from_module(module)
    given = tree.map(torch.clone, (params, state))
    apply(params, state, x, train=True, key=random.key(0))
    assert tree.equal((params, state), given)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    assert module.training
    assert all(x.requires_grad for x in module.parameters())


def test_params_are_copies_nested_by_name():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    _, params, state = interop.from_module(module)
    assert sorted(tree.names(params)) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert sorted(state["1"]) == ["num_batches_tracked", "running_mean", "running_var"]
    params["0"]["weight"].zero_()
    assert module[0].weight.count_nonzero() == 6
    assert not params["0"]["weight"].requires_grad


# Transforms.


@pytest.mark.parametrize("key", [None, random.key(3)], ids=["no key", "key"])
def test_derivatives_are_slopes(case, key):
    module, x = case
    apply, params, state = interop.from_module(module)
    fixed = module if any("spectral" in type(m).__name__.lower() for m in module.modules()) else None
    train = fixed is None  # the power iteration moves with the weights, as a constant

    def loss(params):
        return apply(params, state, x, train=train, key=key)[0].sin().sum()

    flat, unravel = tree.ravel(params)
    v, h = unravel(draw(1, *flat.shape) / flat.numel() ** 0.5), 1e-5
    up, down = tree.add_scaled(params, v, h), tree.add_scaled(params, v, -h)
    slope = (loss(up) - loss(down)) / (2 * h)
    gradient = grad(loss)(params)
    # Truncation h^2 f''' / 6 and rounding 1e-16 / h, of values near one.
    torch.testing.assert_close(tree.vdot(gradient, v), slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(jvp(loss, (params,), (v,))[1], tree.vdot(gradient, v), **ROUNDING)
    curve = hvp(loss, (params,), (v,))
    slopes = tree.scale(tree.sub(grad(loss)(up), grad(loss)(down)), 1 / (2 * h))
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7), curve, slopes)
    close(grad(lambda p: tree.vdot(grad(loss)(p), v))(params), curve)
    close(grad(lambda p: jvp(loss, (p,), (v,))[1])(params), curve)
    close(grad(remat(loss))(params), gradient)
    close(jit(grad(loss), backend="aten")(params), gradient)


def test_vmap_over_examples_and_over_models_are_loops(case):
    module, x = case
    apply, params, state = interop.from_module(module)
    keys = random.split(random.key(0), 2)
    xs = torch.stack([x, x.flip(0)])

    def one(params, state, key, x):
        y, new = apply(params, state, x, train=True, key=key)
        return y, new, grad(lambda p: apply(p, state, x, train=True, key=key)[0].sin().sum())(params)

    expected = tree.stack([one(params, state, key, x) for key, x in zip(keys, xs, strict=True)])
    close(vmap(lambda key, x: one(params, state, key, x))(keys, xs), expected)
    models = tree.stack([params, tree.scale(params, 0.5)])
    expected = tree.stack([one(p, state, keys[0], x) for p in tree.unstack(models)])
    close(vmap(lambda p, s: one(p, s, keys[0], x), in_dims=(0, 0))(models, tree.stack([state, state])), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(2, 4, 2, batch_first=True, bidirectional=True),
        lambda: nn.LSTM(2, 4, proj_size=3, bias=False, batch_first=True),
        lambda: nn.GRU(2, 3, 2, batch_first=True),
    ],
)
def test_last_states_of_recurrent_nets_are_torchs(make):
    module, x = drawn(make()), draw(0, 2, 4, 2)
    apply, params, state = interop.from_module(module)
    expected = tree.map(torch.Tensor.detach, module(x))
    close(apply(params, state, x)[0], expected)
    close(jit(lambda p, x: apply(p, state, x)[0], backend="aten")(params, x), expected)


@pytest.mark.parametrize("name", ["MLP", "ResNet", "attention"])
def test_torch_compile_traces_the_whole(name):
    make, shape = MODULES[name]
    apply, params, state = interop.from_module(drawn(make()))
    x, key = draw(0, *shape), random.key(0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: apply(*args, train=True, key=key), fullgraph=True, backend="aot_eager")
    close(compiled(params, state, x), apply(params, state, x, train=True, key=key))
    torch._dynamo.reset()


def test_statistics_have_derivatives_and_may_be_closed_over():
    apply, params, state = interop.from_module(drawn(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))
    x, var = draw(0, 4, 2), state["1"]["running_var"]

    def loss(params, var):
        return apply(params, {"1": {**state["1"], "running_var": var}}, x)[0].square().sum()

    close(grad(remat(lambda p: loss(p, var)))(params), grad(loss)(params, var))
    centred = apply(params, state, x)[0] - params["1"]["bias"]
    expected = -(apply(params, state, x)[0] * centred).sum(0) / (var + 1e-5)  # of (var + eps)^(-1/2)
    close(grad(loss, argnums=1)(params, var), expected)


# Structure: ties, shared parts, hidden references.


def test_tied_parameter_is_one_leaf_with_the_sum_of_the_gradients():
    module = drawn(Language())
    apply, params, state = interop.from_module(module)
    tokens = torch.tensor([[0, 1, 4]])
    assert sorted(tree.names(params)) == ["embed.weight", "inner.bias", "inner.weight"]
    module(tokens).sin().sum().backward()
    gradient = grad(lambda p: apply(p, state, tokens)[0].sin().sum())(params)
    close(gradient["embed"]["weight"], module.embed.weight.grad)


def test_shared_part_keeps_its_statistics_once():
    apply, params, state = interop.from_module(Residual())
    assert sorted(state) == ["norm"]
    assert "again" not in params
    new = apply(params, state, torch.ones(2, 2, 4, 4), train=True)[1]
    assert new["norm"]["num_batches_tracked"].item() == 2


def test_what_forward_leaves_lying_about_stays_in_the_call():
    module = Recording()
    apply, params, state = interop.from_module(module)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    y, new = apply(params, state, x)
    close(y, module.part(x).detach())
    assert new["calls"].item() == 1
    assert new["mean"].tolist() == [2.0, 3.0]
    assert state["calls"].item() == 0
    assert not hasattr(module, "last")
    doubled = tree.scale(params, 2.0)
    close(apply(doubled, state, x)[0], 2 * y)  # the hidden reference sees the given parameters


def test_calls_from_threads_do_not_meet():
    apply, params, state = interop.from_module(drawn(Residual()))
    xs = [draw(i, 2, 2, 4, 4) for i in range(8)]
    scaled = [tree.scale(params, 1.0 + i) for i in range(8)]
    expected = [apply(p, state, x, train=True) for p, x in zip(scaled, xs, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda p, x: apply(p, state, x, train=True), scaled, xs))
    close(found, expected)


def test_function_pickles():
    apply, params, state = interop.from_module(drawn(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))
    x = draw(0, 4, 2)
    again = pickle.loads(pickle.dumps(apply))
    close(again(params, state, x, train=True), apply(params, state, x, train=True))


# Errors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, s: (p["0"].pop("bias"), s), "expected a leaf at '0.bias' in params, got none"),
        (lambda p, s: (p["0"].update(extra=torch.ones(1)), s), "expected no leaf at '0.extra' in params, got one"),
        (
            lambda p, s: (p["0"].update(bias=torch.ones(1)), s),
            r"expected shape \(3,\) at '0.bias' in params, got \(1,\)",
        ),
        (lambda p, s: s["1"].pop("running_var"), "expected a leaf at '1.running_var' in state, got none"),
    ],
)
def test_wrong_trees_name_the_path(change, message):
    apply, params, state = interop.from_module(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    change(params, state)
    with pytest.raises(ValueError, match=f"from_module: {message}"):
        apply(params, state, torch.ones(4, 2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: len, TypeError, "expected a torch.nn.Module, got builtin_function_or_method"),
        (lambda: nn.Embedding(3, 2, max_norm=1.0), ValueError, "expected max_norm=None at '', got 1.0"),
        (lambda: torch.compile(nn.Linear(2, 2)), TypeError, "expected a module that is not compiled yet at ''"),
    ],
)
def test_modules_that_cannot_be_pure_are_errors(make, error, message):
    with pytest.raises(error, match=f"from_module: {message}"):
        interop.from_module(make())


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_uninitialised_parameters_are_an_error():
    with pytest.raises(ValueError, match="from_module: expected initialised parameters, got none at 'weight'"):
        interop.from_module(nn.LazyLinear(3))


# to_module.

MLP = fg.nn.MLP(3, (4,), 2, activation=torch.tanh)


def mlp_params() -> dict[str, Any]:
    return tree.cast(MLP.init(random.key(0)), torch.float64)


def test_to_module_has_the_names_and_values_of_the_tree():
    params = mlp_params()
    module, x = interop.to_module(MLP, params), draw(0, 5, 3)
    close(dict(module.state_dict()), tree.names(params))
    close(module(x).detach(), MLP(params, x))
    assert all(x.requires_grad for x in module.parameters())
    module.get_parameter("0.weight").data.zero_()
    assert params["0"]["weight"].count_nonzero() > 0


def test_to_module_trains_as_the_function_does():
    params, x, y = mlp_params(), draw(0, 5, 3), draw(1, 5, 2)
    module = interop.to_module(MLP, params)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        optimizer.step()
        params = tree.add_scaled(params, grad(lambda p: (MLP(p, x) - y).square().mean())(params), -0.1)
    close({name: x.detach() for name, x in module.named_parameters()}, tree.names(params))


def test_to_module_survives_state_dict_deepcopy_and_pickle():
    module, x = interop.to_module(MLP, mlp_params()), draw(0, 5, 3)
    other = interop.to_module(MLP, tree.zeros_like(mlp_params()))
    other.load_state_dict(module.state_dict())
    for copied in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        close(copied(x), module(x))


def test_to_module_of_from_module_is_the_module(case):
    module, x = case
    apply, params, state = interop.from_module(module)
    again = interop.to_module(apply, params, state)
    assert sorted(again.state_dict()) == sorted({*tree.names(params), *tree.names(state)})
    for train in (True, False):  # the second reads the statistics of the first
        reference = without_dropout(module).train(train)
        close(again.train(train)(x), reference(x))
    close(dict(again.named_buffers()), dict(module.named_buffers()))


def test_to_module_takes_a_key_through_its_arguments():
    apply, params, _ = interop.from_module(nn.Dropout(0.5))
    module = interop.to_module(apply, params)
    assert set(module(torch.ones(50), key=random.key(0)).tolist()) == {0.0, 2.0}


def test_to_module_keeps_ties_and_goes_back():
    shared = torch.ones(2, dtype=torch.float64)
    module = interop.to_module(lambda p, x: p["a"] * x + p["b"][0], {"a": shared, "b": [shared]})
    assert len(list(module.parameters())) == 1
    apply, params, state = interop.from_module(module)
    assert list(params) == ["a"]
    assert apply({"a": 2 * shared}, state, shared)[0].tolist() == [4.0, 4.0]


@pytest.mark.parametrize(
    ("params", "state", "error", "message"),
    [
        ({"n": torch.tensor(1)}, None, TypeError, "params at 'n': expected a floating.*, got torch.int64"),
        ({"w": torch.ones(1)}, {"w": torch.ones(1)}, ValueError, "expected 'w' in params or in state, got it in both"),
        ({}, {"step": 3}, TypeError, "expected a tensor in state at 'step', got int"),
    ],
)
def test_to_module_names_the_path_of_an_error(params, state, error, message):
    with pytest.raises(error, match=f"to_module: {message}"):
        interop.to_module(MLP, params, state)
