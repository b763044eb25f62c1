"""Composition: what ``parts`` and ``Bound`` do with parameters, keys and state."""

import zlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from functorch_gen import nn, random, tree
from functorch_gen.typing import Key, Layer, Params, State, StatefulLayer


@dataclass(frozen=True)
class Recorder:
    """A layer that returns the key it is called with."""

    def init(self, key: Key) -> Params:
        return {}

    def __call__(self, params: Params, x: Any, *, key: Key | None = None) -> Any:
        return key


@dataclass(frozen=True)
class Counter:
    """A stateful layer: scales its input by the number of calls while training."""

    def init(self, key: Key) -> Params:
        return {"scale": torch.ones(())}

    def init_state(self) -> State:
        return {"calls": torch.zeros(())}

    def __call__(
        self, params: Params, state: State, x: Tensor, *, train: bool, key: Key | None = None
    ) -> tuple[Tensor, State]:
        calls = state["calls"] + train
        return params["scale"] * calls * x, {"calls": calls}


@dataclass(frozen=True)
class Block:
    """Composite and stateful: two counters, one called twice."""

    @property
    def parts(self) -> dict[str, Layer]:
        return {"first": Counter(), "second": Counter(), "dropout": nn.Dropout(0.5)}

    def init(self, key: Key) -> Params:
        return nn.init_parts(self.parts, key)

    def init_state(self) -> State:
        return nn.init_state_parts(self.parts)

    def __call__(
        self, params: Params, state: State, x: Tensor, *, train: bool, key: Key | None = None
    ) -> tuple[Tensor, State]:
        f = nn.Bound(self.parts, params, state=state, key=key, train=train)
        return f.second(f.first(f.first(x))), f.state


def name_key(key: Key, name: str) -> Key:
    return random.fold_in(key, zlib.crc32(name.encode()))


def test_init_parts_draws_each_part_from_the_checksum_of_its_name() -> None:
    params = nn.init_parts({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}, random.key(0))
    expected = {name: nn.Linear(3, 2).init(name_key(random.key(0), name)) for name in "ab"}
    assert tree.equal(params, expected)


def test_init_parts_of_a_part_does_not_change_when_parts_are_added_or_reordered() -> None:
    few = nn.init_parts({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)}, random.key(0))
    many = nn.init_parts({"c": nn.Linear(5, 5), "b": nn.Linear(2, 2), "a": nn.Linear(3, 2)}, random.key(0))
    assert tree.equal(few, {name: many[name] for name in "ab"})


def test_init_parts_leaves_no_empty_dicts() -> None:
    parts = {"norm": nn.GroupNorm(1, 2, affine=False), "act": nn.Sequential(nn.Dropout()), "out": nn.Linear(2, 1)}
    params = nn.init_parts(parts, random.key(0))
    assert list(params) == ["out"]
    assert tree.structure(tree.from_names(tree.names(params))) == tree.structure(params)


def test_bound_calls_a_part_with_its_parameters() -> None:
    parts = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}
    params, x = nn.init_parts(parts, random.key(0)), torch.ones(5, 3)
    f = nn.Bound(parts, params)
    assert torch.equal(f.b(f.a(x)), parts["b"](params["b"], parts["a"](params["a"], x)))


def test_bound_passes_inputs_and_options_on() -> None:
    layer, x, context = nn.MultiHeadAttention(4, 2), torch.ones(3, 4), random.normal(random.key(1), (5, 4))
    parts = {"attend": layer}
    params = nn.init_parts(parts, random.key(0))
    y = nn.Bound(parts, params).attend(x, context, is_causal=True)
    assert torch.equal(y, layer(params["attend"], x, context, is_causal=True))


def test_bound_gives_call_n_of_a_part_the_key_of_its_name_and_n() -> None:
    f = nn.Bound({"a": Recorder(), "3": Recorder()}, {}, key=random.key(5))
    found = [f.a(0), f["3"](0), f.a(0)]
    expected = [random.fold_in(name_key(random.key(5), name), n) for name, n in (("a", 0), ("3", 0), ("a", 1))]
    assert tree.equal(found, expected)


def test_bound_without_key_passes_none() -> None:
    assert nn.Bound({"a": Recorder()}, {}).a(0) is None


def test_bound_gives_no_key_to_parts_that_do_not_draw() -> None:
    """The key is not even looked at: a graph of layers without draws holds no key arithmetic."""
    parts = {"a": nn.Linear(2, 2), "b": nn.Dropout(0.0)}
    params = nn.init_parts(parts, random.key(0))
    key_not_to_be_read: Any = object()
    f = nn.Bound(parts, params, key=key_not_to_be_read)
    assert f.b(f.a(torch.ones(2))).shape == (2,)


def test_bound_lets_the_caller_choose_a_key() -> None:
    f = nn.Bound({"a": Recorder()}, {}, key=random.key(0))
    assert torch.equal(f.a(0, key=random.key(9)), random.key(9))
    assert f.a(0, key=None) is None


def test_bound_threads_state_through_repeated_calls() -> None:
    block = Block()
    state = block.init_state()
    y, new = block(block.init(random.key(0)), state, torch.tensor(5.0), train=True)
    assert y.item() == 5.0 * 1 * 2 * 1  # the first counter counts 1, then 2; the second 1
    assert {name: s["calls"].item() for name, s in new.items()} == {"first": 2.0, "second": 1.0}
    assert tree.equal(state, block.init_state())  # the old state is untouched


def test_bound_threads_the_state_of_nested_composites() -> None:
    parts = {"block": Block(), "head": nn.Identity()}
    state = nn.init_state_parts(parts)
    f = nn.Bound(parts, nn.init_parts(parts, random.key(0)), state=state, train=True)
    f.head(f.block(torch.tensor(5.0)))
    assert {name: s["calls"].item() for name, s in f.state["block"].items()} == {"first": 2.0, "second": 1.0}


def test_bound_in_evaluation_leaves_the_state() -> None:
    block = Block()
    state = {"first": {"calls": torch.tensor(3.0)}, "second": {"calls": torch.tensor(2.0)}}
    y, new = block(block.init(random.key(0)), state, torch.tensor(1.0), train=False)
    assert y.item() == 18.0
    assert tree.equal(new, state)


def test_bound_state_passes_through_vmap_and_grad() -> None:
    block, x = Block(), torch.arange(3.0)
    params, state = block.init(random.key(0)), block.init_state()

    def loss(params: Params, x: Tensor) -> tuple[Tensor, State]:
        return block(params, state, x, train=True)

    gradients, states = vmap(grad(loss, has_aux=True), (None, 0))(params, x)
    assert gradients["first"]["scale"].tolist() == [0.0, 4.0, 8.0]  # y = s1^2 s2 2 x
    assert states["first"]["calls"].tolist() == [2.0, 2.0, 2.0]


def test_init_state_parts_skips_stateless_parts() -> None:
    assert list(nn.init_state_parts(Block().parts)) == ["first", "second"]


def test_bound_refuses_a_part_it_has_not() -> None:
    with pytest.raises(AttributeError, match="Bound: expected one of the parts a, b, got 'c'"):
        _ = nn.Bound({"a": nn.Identity(), "b": nn.Identity()}, {}).c


def test_bound_names_the_part_whose_parameters_are_missing() -> None:
    parts = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    params = nn.init_parts({"b": parts["b"]}, random.key(0))
    with pytest.raises(KeyError, match=r"Bound: expected parameters for part 'a', got only those of \['b'\]"):
        nn.Bound(parts, params).a(torch.ones(2))


def test_bound_names_the_part_whose_state_is_missing() -> None:
    parts = {"a": Counter()}
    with pytest.raises(KeyError, match="Bound: expected state for part 'a'"):
        nn.Bound(parts, nn.init_parts(parts, random.key(0)), train=True).a(torch.ones(2))


def test_draws_of_a_layer_that_says_nothing_is_true() -> None:
    assert nn.draws(Recorder())


def test_draws_of_attention_follows_its_dropout() -> None:
    assert not nn.draws(nn.MultiHeadAttention(4, 2))
    assert nn.draws(nn.MultiHeadAttention(4, 2, dropout=0.1))


def test_protocols_tell_layers_with_state_from_those_without() -> None:
    assert isinstance(nn.Linear(1, 1), Layer)
    assert not isinstance(nn.Linear(1, 1), StatefulLayer)
    assert isinstance(Counter(), StatefulLayer)
