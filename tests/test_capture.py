"""capture: the activations, computed by hand from the parameters; in every transform, and never out of one."""

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from functorch_gen import models, nn, random, tree
from functorch_gen.transforms import (
    autocast,
    cond,
    eval_shape,
    fori_loop,
    grad,
    hessian,
    hvp,
    jacfwd,
    jacrev,
    jit,
    jvp,
    linearize,
    remat,
    scan,
    value_and_grad,
    vjp,
    vmap,
)
from functorch_gen.typing import Key, Layer, Params

NET = nn.Sequential(nn.Linear(3, 4), torch.tanh, nn.Sequential(nn.Linear(4, 4), torch.sin), nn.Linear(4, 2))
PARAMS = tree.cast(NET.init(random.key(0)), torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


X = draw(5, 3)


def by_hand(params: Params, x: Tensor) -> dict[str, Tensor]:
    """The outputs of the sublayers of NET."""

    def linear(p: Params, x: Tensor) -> Tensor:
        return x @ p["weight"].T + p["bias"]

    h0 = linear(params["0"], x)
    h1 = h0.tanh()
    h20 = linear(params["2"]["0"], h1)
    return {"0": h0, "1": h1, "2": h20.sin(), "2.0": h20, "2.1": h20.sin(), "3": linear(params["3"], h20.sin())}


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        ("0", ["0"]),
        (["2.1", "0"], ["0", "2.1"]),
        ("2.*", ["2.0", "2.1"]),
        ("[02]", ["0", "2"]),
        ("*", ["0", "1", "2", "2.0", "2.1", "3"]),
    ],
    ids=str,
)
def test_capture_returns_the_outputs_of_the_sublayers_named(names: Any, paths: list[str]) -> None:
    y, activations = nn.capture(NET, names)(PARAMS, X)
    expected = by_hand(PARAMS, X)
    assert sorted(activations) == paths
    assert_close(activations, {path: expected[path] for path in paths})
    assert torch.equal(y, NET(PARAMS, X))


def test_capture_numbers_the_calls_of_one_path() -> None:
    parts = {"double": nn.Function(lambda x: 2 * x)}

    def fun(x: Tensor) -> Tensor:
        f = nn.Bound(parts, {})
        return f.double(f.double(f.double(x)))

    _, activations = nn.capture(fun, "double")(torch.ones(()))
    assert {name: x.item() for name, x in activations.items()} == {"double": 2.0, "double#1": 4.0, "double#2": 8.0}


def test_capture_takes_the_output_of_a_stateful_layer() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    params, state = tree.cast(net.init(random.key(0)), torch.float64), tree.cast(net.init_state(), torch.float64)
    (y, new), activations = nn.capture(net, "*")(params, state, X, train=True)
    expected, expected_state = net(params, state, X, train=True)
    assert torch.equal(y, expected)
    assert tree.equal(new, expected_state)
    assert torch.equal(activations["1"], expected)


def test_capture_names_the_sublayers_of_models_as_their_parameters() -> None:
    gpt = models.GPT(vocab_size=7, context=6, num_layers=2, num_heads=2, embed_dim=4)
    params = gpt.init(random.key(0))
    tokens = torch.tensor([1, 5, 2])
    _, activations = nn.capture(gpt, ["block?", "*.mlp.0"])(params, tokens)
    assert sorted(activations) == ["block0", "block0.mlp.0", "block1", "block1.mlp.0"]
    x = params["tokens"]["weight"][tokens] + params["positions"]["weight"][:3]
    assert_close(activations["block0"], models.GPTBlock(4, 2)(params["block0"], x))


def test_capture_names_what_is_inside_an_adapted_layer_as_its_parameters() -> None:
    """LoRA keeps the layer's parameters under "base"."""
    inner = nn.Sequential(nn.Linear(3, 3), torch.tanh)

    @dataclass(frozen=True)
    class Scaled:
        @property
        def parts(self) -> dict[str, Layer]:
            return {"inner": inner}

        def init(self, key: Key) -> Params:
            return {**nn.init_parts(self.parts, key), "scale": torch.ones(3, 3)}

        def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
            return nn.Bound(self.parts, params, key=key).inner(x) @ params["scale"]

    net = nn.Sequential(nn.LoRA(Scaled(), 1, name="scale"))
    params = net.init(random.key(0))
    assert "0.base.inner.0.weight" in tree.names(params)
    _, activations = nn.capture(net, "0.base*")(params, torch.ones(3))
    assert sorted(activations) == ["0.base", "0.base.inner", "0.base.inner.0", "0.base.inner.1"]


def test_captures_may_be_nested() -> None:
    """The inner one sees paths from where it begins, the outer one from the outermost layer."""

    @dataclass(frozen=True)
    class Outer:
        @property
        def parts(self) -> dict[str, Layer]:
            return {"inner": NET}

        def __call__(self, params: Params, x: Any) -> Any:
            f = nn.Bound(self.parts, params)
            return nn.capture(f.inner, "inner.2.0")(x)

    (_, within), around = nn.capture(Outer(), "inner.0")({"inner": PARAMS}, X)
    expected = by_hand(PARAMS, X)
    assert_close(within, {"inner.2.0": expected["2.0"]})
    assert_close(around, {"inner.0": expected["0"]})


# Transforms around it.


def hidden(params: Params, x: Tensor) -> Tensor:
    return nn.capture(NET, "2.0")(params, x)[1]["2.0"]


def expected_hidden(params: Params, x: Tensor) -> Tensor:
    return by_hand(params, x)["2.0"]


TRANSFORMS: dict[str, Any] = {
    "grad": lambda f: grad(lambda p, x: f(p, x).square().sum(), (0, 1))(PARAMS, X),
    "value_and_grad": lambda f: value_and_grad(lambda x: f(PARAMS, x).sum())(X),
    "torch.func.grad": lambda f: torch.func.grad(lambda x: f(PARAMS, x).sum())(X),
    "jacrev": lambda f: jacrev(f, 1)(PARAMS, X[0]),
    "jacfwd": lambda f: jacfwd(f, 1)(PARAMS, X[0]),
    "hessian": lambda f: hessian(lambda x: f(PARAMS, x).sin().sum())(X[0]),
    "jvp": lambda f: jvp(lambda x: f(PARAMS, x), (X,), (X,)),
    "linearize": lambda f: linearize(lambda x: f(PARAMS, x), X)[1](X),
    "vjp": lambda f: vjp(lambda x: f(PARAMS, x), X)[1](torch.ones(5, 4, dtype=torch.float64)),
    "hvp": lambda f: hvp(lambda x: f(PARAMS, x).sin().sum(), (X,), (X,)),
    "vmap": lambda f: vmap(f, (None, 0))(PARAMS, X),
    "vmap(grad)": lambda f: vmap(grad(lambda p, x: f(p, x).sum()), (None, 0))(PARAMS, X),
    "jit": lambda f: jit(f, backend="aten")(PARAMS, X),
    "jit(grad)": lambda f: jit(grad(lambda p, x: f(p, x).sum()), backend="aten")(PARAMS, X),
    "grad(remat)": lambda f: grad(lambda x: remat(f)(PARAMS, x).sum())(X),
    "scan": lambda f: scan(lambda carry, x: (carry, f(PARAMS, x)), torch.zeros(()), X)[1],
    "torch.compile": lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")(PARAMS, X),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_capture_passes_transforms(name: str) -> None:
    assert_close(TRANSFORMS[name](hidden), TRANSFORMS[name](expected_hidden))


# Transforms inside it.


def sum_of(params: Params, x: Tensor) -> Tensor:
    return NET(params, x).sum()


INSIDE: dict[str, Any] = {
    "vmap": lambda p, x: vmap(NET, (None, 0))(p, x),
    "torch.func.vmap": lambda p, x: torch.func.vmap(NET, (None, 0))(p, x),
    "grad": lambda p, x: grad(sum_of)(p, x),
    "torch.func.grad": lambda p, x: torch.func.grad(sum_of)(p, x),
    "jvp": lambda p, x: jvp(lambda x: NET(p, x), (x,), (x,)),
    "linearize": lambda p, x: linearize(lambda x: NET(p, x), x)[0],
    "jacrev": lambda p, x: jacrev(NET)(p, x),
    "scan": lambda p, x: scan(lambda carry, x: (carry, NET(p, x)), torch.zeros(()), x)[1],
    "fori_loop": lambda p, x: fori_loop(0, 2, lambda i, y: NET(p, x), NET.layers[0](p["0"], x)[:, :2]),
    "cond": lambda p, x: cond(x.sum() > 0, lambda x: NET(p, x), lambda x: NET(p, x), x),
    "remat": lambda p, x: remat(NET)(p, x),
    "jit": lambda p, x: jit(NET, backend="aten")(p, x),
    "eval_shape": lambda p, x: eval_shape(NET, p, x),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", INSIDE)
def test_capture_refuses_a_transform_between_itself_and_the_layer(name: str, compiled: bool) -> None:
    captured = nn.capture(INSIDE[name], "2.0")
    captured = jit(captured, backend="aten") if compiled else captured
    with pytest.raises(
        RuntimeError, match=r"capture: expected no transform between capture and '2.0', got that of \w+.py"
    ):
        captured(PARAMS, X)
    assert_close(hidden(PARAMS, X), expected_hidden(PARAMS, X))


def test_capture_takes_what_is_inside_mixed_precision() -> None:
    """A cast is no transform: the activations are tensors of the caller."""
    params, x = tree.cast((PARAMS, X), torch.float32)
    _, around = nn.capture(autocast(NET), "2.0")(params, x)
    _, within = autocast(nn.capture(NET, "2.0"))(params, x)
    assert around["2.0"].dtype == torch.bfloat16
    assert tree.equal(around, within)


def test_capture_refuses_a_transform_around_another_capture() -> None:
    """The inner one may name the layer, the outer one may not."""
    captured = nn.capture(lambda p, x: vmap(nn.capture(NET, "0"), (None, 0))(p, x)[1]["0"], "0")
    with pytest.raises(RuntimeError, match=r"no transform between capture and '0', got that of batching\.py"):
        captured(PARAMS, X)


def test_capture_sees_no_layer_in_a_program_that_is_compiled() -> None:
    program = jit(NET, backend="aten")
    program(PARAMS, X)
    with pytest.raises(KeyError, match=r"a sublayer that matches '2\.0', got only no sublayer"):
        nn.capture(program, "2.0")(PARAMS, X)


def test_capture_does_not_mind_a_transform_around_layers_that_are_not_named() -> None:
    parts = {"net": NET, "head": nn.Linear(3, 2)}
    f = nn.Bound(parts, {"net": PARAMS, "head": {"weight": draw(2, 3), "bias": draw(2)}})
    y, activations = nn.capture(lambda x: f.head(grad(lambda x: f.net(x).sum())(x)), "head")(X)
    assert torch.equal(activations["head"], y)


def test_capture_under_torch_compile_refuses_a_vmap_inside() -> None:
    captured = torch.compile(nn.capture(INSIDE["torch.func.vmap"], "2.0"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"(?s)Observed exception.*RuntimeError"):  # Dynamo's, which hides the text
        captured(PARAMS, X)


# What it leaves behind, and what it says.


def test_capture_leaves_nothing_behind_after_an_error() -> None:
    def fail(params: Params, x: Tensor) -> Tensor:
        raise ZeroDivisionError

    parts = {"0": NET, "1": nn.Function(lambda x: fail({}, x))}
    f = nn.Bound(parts, {"0": PARAMS})
    with pytest.raises(ZeroDivisionError):
        nn.capture(lambda x: f["1"](f["0"](x)), "0.0")(X)
    assert sorted(nn.capture(NET, "*")(PARAMS, X)[1]) == ["0", "1", "2", "2.0", "2.1", "3"]


def test_capture_sees_the_calls_of_its_own_thread_only() -> None:
    """Another thread runs the net while this one is inside a captured call."""

    def fun(params: Params, x: Tensor) -> Tensor:
        others: list[Any] = []
        thread = threading.Thread(target=lambda: others.append(nn.capture(NET, "0")(params, 2 * x)))
        thread.start()
        thread.join()
        assert_close(others[0][1], {"0": by_hand(params, 2 * x)["0"]})
        return NET(params, x)

    _, activations = nn.capture(fun, "*.0")(PARAMS, X)
    assert_close(activations, {"2.0": by_hand(PARAMS, X)["2.0"]})


@pytest.mark.parametrize("names", ["9", ["0", "9"], "2.0.*"], ids=str)
def test_capture_lists_the_names_there_are(names: Any) -> None:
    with pytest.raises(
        KeyError, match=r"capture: expected a sublayer that matches '\S+', got only 0, 1, 2.0, 2.1, 2, 3"
    ):
        nn.capture(NET, names)(PARAMS, X)


def test_capture_says_so_when_there_is_no_sublayer() -> None:
    with pytest.raises(KeyError, match="that matches 'weight', got only no sublayer"):
        nn.capture(nn.Linear(3, 4), "weight")(PARAMS["0"], X)


def test_capture_refuses_names_that_are_no_strings() -> None:
    names: Any = [3]
    with pytest.raises(TypeError, match="capture: expected names to be strings, got int"):
        nn.capture(NET, names)


def test_capture_takes_a_key_and_what_else_the_function_takes() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))

    def loss(params: Params, key: Key) -> Tensor:
        return net(params, X.float(), key=key)

    params = net.init(random.key(0))
    y, activations = nn.capture(loss, "1")(params, key=random.key(4))
    assert torch.equal(activations["1"], y)
    assert (y == 0).any()
