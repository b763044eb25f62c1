"""State without surgery: composites that hold stateful layers, and programs that train them."""

import copy
import pickle
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen import ema, models, nn, optim, random, tree
from functorch_gen.step import TrainState, init_state, make_step
from functorch_gen.transforms import grad, jit, vmap
from functorch_gen.typing import Key, Layer, Params, State, StatefulLayer, Tree


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(actual: Tree, expected: Tree, tolerance: float = 1e-12) -> None:
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance), actual, expected)


# Sequential.

NET: Any = nn.Sequential(
    nn.Linear(3, 4), nn.BatchNorm1d(4), F.silu, nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2)
)


def test_sequential_with_state_equals_torch():
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 4),
        torch.nn.BatchNorm1d(4),
        torch.nn.SiLU(),
        torch.nn.Identity(),
        torch.nn.Linear(4, 2),
        torch.nn.BatchNorm1d(2),
    )
    params, state = NET.init(random.key(0)), NET.init_state()
    module.load_state_dict({**tree.names(params), **tree.names(state)})
    for train in (True, True, False):
        x = normal(0, 5, 3).float()
        y, state = NET(params, state, x, train=train)
        assert_close(y, module.train(train)(x).detach(), 1e-5)
    assert_close(tree.names(state), dict(module.named_buffers()), 1e-6)


def test_sequential_is_stateful_only_with_a_stateful_member():
    assert isinstance(NET, StatefulLayer)
    assert not nn.is_stateful(nn.Sequential(nn.Linear(3, 4), F.silu))
    assert nn.is_stateful(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4))))


def test_sequential_with_state_is_a_value():
    same = nn.Sequential(*NET.layers)
    assert {same, copy.deepcopy(NET), NET} == {NET}
    small = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert pickle.loads(pickle.dumps(small)) == small
    assert nn.is_stateful(pickle.loads(pickle.dumps(small)))


def test_sequential_with_state_passes_keys_on():
    params, state, x = NET.init(random.key(0)), NET.init_state(), normal(0, 5, 3).float()
    y, _ = NET(params, state, x, train=True)
    noisy, _ = NET(params, state, x, train=True, key=random.key(1))
    again, _ = NET(params, state, x, train=True, key=random.key(1))
    assert torch.equal(noisy, again)
    assert not torch.allclose(noisy, y)


# Composites.


@dataclass(frozen=True)
class Shared:
    """One norm called twice, one that keeps no state, and one frozen: always in evaluation."""

    @property
    def parts(self) -> dict[str, Layer]:
        return {
            "norm": nn.BatchNorm1d(2),
            "batch": nn.BatchNorm1d(2, track_running_stats=False),
            "frozen": nn.BatchNorm1d(2),
        }

    def init(self, key: Key) -> Params:
        return nn.init_parts(self.parts, key)

    def init_state(self) -> State:
        return nn.init_state_parts(self.parts)

    def __call__(
        self, params: Params, state: State, x: Tensor, *, train: bool, key: Key | None = None
    ) -> tuple[Tensor, State]:
        f = nn.Bound(self.parts, params, state=state, key=key, train=train)
        return f.frozen(f.batch(f.norm(f.norm(x) + x)), train=False), f.state


def test_parts_without_state_have_no_entry():
    layer = Shared()
    state = layer.init_state()
    assert sorted(state) == ["frozen", "norm"]
    assert sorted(layer(layer.init(random.key(0)), state, normal(0, 4, 2), train=True)[1]) == ["frozen", "norm"]


def test_a_part_called_twice_moves_its_state_twice_and_a_frozen_one_stays():
    layer, x = Shared(), normal(0, 4, 2)
    params, state = layer.init(random.key(0)), layer.init_state()
    _, new = layer(params, state, x, train=True)
    y, once = nn.BatchNorm1d(2)(params["norm"], state["norm"], x, train=True)
    _, twice = nn.BatchNorm1d(2)(params["norm"], once, y + x, train=True)
    assert_close(new, {"norm": twice, "frozen": state["frozen"]})


# Errors.


@dataclass(frozen=True)
class Outer:
    """A composite of composites: paths of two names."""

    train: bool | None = True

    @property
    def parts(self) -> dict[str, Layer]:
        return {"first": nn.Linear(3, 3), "block": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))}

    def __call__(self, params: Params, state: State, x: Tensor) -> tuple[Tensor, State]:
        f = nn.Bound(self.parts, params, state=state, train=self.train)
        return f.block(f.first(x)), f.state


OUTER = Outer()
PARAMS, STATE = nn.init_parts(OUTER.parts, random.key(0)), nn.init_state_parts(OUTER.parts)
NORM = STATE["block"]["1"]
BAD = [
    (Outer(), PARAMS, {}, KeyError, "Bound: expected state for part 'block', got only that of []"),
    (Outer(), PARAMS, None, KeyError, "Bound: expected state for part 'block', got only that of []"),
    (Outer(), PARAMS, {"block": {}}, KeyError, "Bound: expected state for part 'block.1', got only that of []"),
    (
        Outer(),
        PARAMS,
        {"block": {"1": {"running_mean": NORM["running_mean"]}}},
        KeyError,
        "BatchNorm1d: expected state 'block.1.running_var', got only ['running_mean']",
    ),
    (
        Outer(),
        {**PARAMS, "block": {"0": PARAMS["block"]["0"]}},
        STATE,
        KeyError,
        "Bound: expected parameters for part 'block.1', got only those of ['0']",
    ),
    (Outer(), PARAMS, torch.ones(2), TypeError, "Bound: expected state to be a dict of the parts' states, got Tensor"),
    (Outer(), PARAMS, {"block": 3}, TypeError, "Bound: expected state to be a dict of the parts' states, got int"),
    (
        Outer(None),
        PARAMS,
        STATE,
        TypeError,
        "expected train=True or train=False for the stateful part 'block', got none",
    ),
]


@pytest.mark.parametrize(("layer", "params", "state", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bound_names_the_path_of_what_is_missing(layer, params, state, error, message):
    with pytest.raises(error, match=re.escape(message)):
        layer(params, state, torch.ones(4, 3))


def test_a_stateful_layer_called_without_train_says_so():
    layer = nn.BatchNorm1d(3)
    call: Any = layer
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'train'"):
        call(layer.init(random.key(0)), layer.init_state(), torch.ones(4, 3))


@dataclass(frozen=True)
class Forgetful:
    """Has a state, and does not return it."""

    def init(self, key: Key) -> Params:
        return {}

    def init_state(self) -> State:
        return {"calls": torch.zeros(())}

    def __call__(self, params: Params, state: State, x: Tensor, *, train: bool, key: Key | None = None) -> Tensor:
        return x


def test_bound_refuses_a_part_that_does_not_return_its_state():
    parts = {"a": Forgetful()}
    with pytest.raises(TypeError, match=re.escape("Bound: expected part 'a' to return (y, state), got Tensor")):
        nn.Bound(parts, {}, state=nn.init_state_parts(parts), train=True).a(torch.ones(2))


# Training.

CNN = models.CNN(1, 3, (4, 6), dropout=0.2)


STRIPES = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
PATTERNS = torch.stack([STRIPES.expand(4, 4), STRIPES[:, None].expand(4, 4), torch.outer(STRIPES, STRIPES)])


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Stripes down, stripes across or squares, with as much noise."""
    labels = [torch.randint(3, (8,), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    return [((normal(seed, 8, 1, 4, 4) + PATTERNS[label, None]).to(dtype), label) for seed, label in enumerate(labels)]


def cross_entropy(params: Params, state: State, key: Key, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, State]:
    x, label = batch
    logits, state = CNN(params, state, x, train=True, key=key)
    return F.cross_entropy(logits, label), state


def start(tx: Any, average: Any = None, dtype: torch.dtype = torch.float32) -> TrainState:
    params, state = tree.cast((CNN.init(random.key(0)), CNN.init_state()), dtype)
    return init_state(params, tx, random.key(1), state=state, ema=average)


@pytest.mark.parametrize("backend", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_donated_jitted_step_trains_parameters_state_and_average_as_eager_code_does(backend):
    """float64: what differs is the order of sums, 1e-16, times the steps and the curvature."""
    tx, average = optim.adamw(0.01), ema.constant(0.9)
    step = make_step(cross_entropy, tx, ema=average, stateful=True)
    compiled = jit(step, donate_argnums=0, backend=backend)
    eager, donated = (start(tx, average, torch.float64) for _ in range(2))
    for batch in batches(4, torch.float64):
        eager, metrics = step(eager, batch)
        donated, found = compiled(donated, batch)
        assert_close(found, metrics, 1e-8)
    assert_close(donated, eager, 1e-8)
    assert compiled.traces == 1
    assert eager.state["block0"]["norm"]["num_batches_tracked"].item() == 4
    assert tree.structure(eager.ema.average) == tree.structure(eager.params)  # the state is not averaged


def test_a_cnn_learns_what_its_batches_show():
    """The best rule errs once in 200, chance twice in three."""
    tx = optim.adam(0.02)
    step, train_state = jit(make_step(cross_entropy, tx, stateful=True), donate_argnums=0, backend="aten"), start(tx)
    for batch in batches(100):
        train_state, _ = step(train_state, batch)
    x, label = (torch.cat(part) for part in zip(*batches(120)[100:], strict=True))
    logits, _ = CNN(train_state.params, train_state.state, x, train=False)  # with the running statistics
    assert (logits.argmax(-1) == label).double().mean() > 0.8


def example_loss(params: Params, state: State, x: Tensor, label: Tensor, net: Any) -> tuple[Tensor, State]:
    logits, state = net(params, state, x, train=True)
    return F.cross_entropy(logits, label), state


def test_gradients_of_examples_of_models_where_each_example_is_its_own_batch():
    """vmap over 8 models of vmap over examples of grads: statistics over the pixels; one new state for each example."""
    net = models.CNN(1, 3, (4,))
    members = [tree.cast((net.init(key), net.init_state()), torch.float64) for key in random.split(random.key(0), 8)]
    x, label = batches(1, torch.float64)[0]
    one = grad(lambda p, s, x, label: example_loss(p, s, x, label, net), has_aux=True)
    found = vmap(vmap(one, (None, None, 0, 0)), (0, 0, None, None))(*tree.stack(members), x, label)
    loop = [tree.stack([one(*member, *pair) for pair in zip(x, label, strict=True)]) for member in members]
    assert_close(found, tree.stack(loop))
    assert found[1]["block0"]["norm"]["running_mean"].shape == (8, 8, 4)  # models, examples, channels


def test_gradients_of_examples_of_models_where_the_examples_are_the_batch():
    """The same with a named axis: they add up to the gradient of the batch, and the state is the batch's."""
    net, plain = models.CNN(1, 3, (4,), axis_name="batch"), models.CNN(1, 3, (4,))
    members = [tree.cast((net.init(key), net.init_state()), torch.float64) for key in random.split(random.key(0), 8)]
    x, label = batches(1, torch.float64)[0]
    one = grad(lambda p, s, x, label: example_loss(p, s, x, label, net), has_aux=True)
    examples = vmap(one, (None, None, 0, 0), (0, None), axis_name="batch")
    gradients, states = vmap(examples, (0, 0, None, None))(*tree.stack(members), x, label)

    def whole(params: Params, state: State) -> tuple[Tensor, State]:
        logits, state = plain(params, state, x, train=True)
        return F.cross_entropy(logits, label, reduction="sum"), state

    wanted, wanted_states = tree.stack([grad(whole, has_aux=True)(*member) for member in members])
    assert_close(tree.map(lambda g: g.sum(1), gradients), wanted, 1e-11)
    assert_close(states, wanted_states)


def test_ensemble_trains_in_one_jitted_step():
    """vmap of the whole stateful step over 4 models equals a loop."""
    tx = optim.sgd(0.1, momentum=0.9)
    step = make_step(cross_entropy, tx, stateful=True)
    (batch,) = batches(1, torch.float64)
    states = []
    for key in random.split(random.key(0), 4):
        params, state = tree.cast((CNN.init(key), CNN.init_state()), torch.float64)
        states.append(init_state(params, tx, key, state=state))
    stacked, _ = jit(vmap(step, (0, None)), backend="aten")(tree.stack(states), batch)
    assert_close(stacked, tree.stack([step(state, batch)[0] for state in states]), 1e-10)
