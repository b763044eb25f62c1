"""jit around the call: global settings, tensors closed over, donation by keyword, threads, what may be written."""

import functools
import gc
import threading
import weakref
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F

import functorch_gen as fg
from functorch_gen import tree

aten = functools.partial(fg.jit, backend="aten")
both = pytest.mark.parametrize("backend", ["aten", "inductor"])
X = torch.tensor([0.3, -0.7, 1.1])


# Global settings.


@both
def test_autocast_of_the_call_is_followed(backend):
    a = torch.eye(3)
    outer = fg.jit(lambda a: a @ a, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert outer(a).dtype == torch.bfloat16
    assert outer(a).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert outer(a).dtype == torch.bfloat16
    assert outer.traces == 2


@both
def test_autocast_switched_off_inside_stays_off(backend):
    def g(a):
        with torch.autocast("cpu", enabled=False):
            return a @ a

    with torch.autocast("cpu", torch.bfloat16):
        assert fg.jit(g, backend=backend)(torch.eye(3)).dtype == torch.float32


def test_default_dtype_and_device_are_those_of_the_call():
    g = aten(lambda n: torch.ones(2) * n)
    assert g(1.0).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert g(1.0).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert g(1.0).device.type == "meta"
    assert g(1.0).device.type == "cpu"


@both
def test_gradients_traced_in_inference_mode_are_not_zero(backend):
    g = fg.jit(fg.grad(lambda x: (x**2).sum()), backend=backend)
    with torch.inference_mode():
        assert torch.equal(g(X), 2 * X)
    assert torch.equal(g(X), 2 * X)


# Tensors closed over.


def test_a_closed_over_parameter_keeps_its_gradient():
    w = torch.nn.Parameter(torch.tensor(2.0))
    g = aten(lambda x: (w * x).sum())
    g(X).backward()
    assert w.grad == X.sum()
    with torch.no_grad():
        assert not g(X).requires_grad
    slope = aten(fg.grad(lambda x: (w**2 * x).sum()))
    assert torch.autograd.grad(slope(X).sum(), w)[0] == 2 * w * 3


@both
def test_a_closed_over_tensor_that_was_donated_is_an_error(backend):
    s = X.clone()
    g = fg.jit(lambda a: a + s, backend=backend)
    g(X)
    fg.jit(lambda a: 2 * a, donate_argnums=0, backend=backend)(s)
    with pytest.raises(ValueError, match=r"closed-over tensor 0 to keep its shape \(3,\) and strides, got \(0,\)"):
        g(X)


@both
def test_constants_of_the_trace_cannot_be_changed_through_the_outputs(backend):
    g = fg.jit(lambda x: (x * 1, torch.tensor([1.0, 2.0]), torch.zeros(2), torch.tensor(5.0)), backend=backend)
    expected = tree.map(torch.clone, g(X))
    for x in g(X):
        x.add_(100)
    assert tree.equal(g(X), expected)


def test_a_program_keeps_no_tensor_of_the_call_alive():
    """Except donated ones, which are empty."""
    g = aten(lambda s, x: {"a": s["a"] + x, "n": s["n"], "sum": x.sum()}, donate_argnums=0)
    h = aten(fg.value_and_grad(lambda x: (x**2).sum()))
    state, x = {"a": torch.ones(3), "n": 2}, torch.ones(3)
    held = [state["a"], x, *tree.leaves(g(state, x)), *tree.leaves(h(x))]
    references = [weakref.ref(v) for v in held if isinstance(v, torch.Tensor)]
    del held, state, x
    gc.collect()
    alive = [reference() for reference in references]
    assert [x.numel() for x in alive if x is not None] == [0]


# Arguments.


def test_arguments_given_by_keyword_are_donated_too():
    for g, names in (
        (aten(lambda s, x: s + x, donate_argnums=0), ("s",)),
        (aten(lambda s, x: (s + x, 2 * x), donate_argnums=(0, -1)), ("s", "x")),
    ):
        given = {"s": X.clone(), "x": X.clone()}
        g(**given)
        assert [name for name in given if given[name].shape == (0,)] == list(names)


def test_a_static_name_must_be_an_arguments():
    with pytest.raises(ValueError, match=r"static_argnames to name arguments of \['x', 'n'\], got 'm'"):
        aten(lambda x, n: x, static_argnames=("n", "m"))

    def keyword_only(x, *, mode):
        return x * len(mode)

    assert torch.equal(aten(keyword_only, static_argnames="mode")(X, mode="ab"), 2 * X)
    assert torch.equal(aten(lambda **k: k["x"] * len(k["mode"]), static_argnames="mode")(x=X, mode="ab"), 2 * X)


def test_overlapping_memory_is_an_error_only_where_donated():
    x = torch.arange(6.0)
    g = aten(lambda s, a, b: s + a + b, donate_argnums=0)
    assert torch.equal(g(torch.zeros(3), x[:3], x[1:4]), x[:3] + x[1:4])
    with pytest.raises(ValueError, match="got one for argument 's' and argument 'b'"):
        g(x[2:5], torch.zeros(3), x[:3])
    halves = aten(lambda s: [s[0] + 1, 2 * s[1]], donate_argnums=0)([x[:3], x[3:]])  # one buffer, two parts
    assert torch.equal(torch.cat(halves), torch.tensor([1.0, 2, 3, 6, 8, 10]))


def test_threads_trace_once():
    calls = []

    def counted(x):
        calls.append(1)
        return 2 * x

    g = aten(counted)
    threads = [threading.Thread(target=g, args=(X,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_lower_and_call_share_one_trace():
    calls = []
    g = aten(lambda x: calls.append(1) or 2 * x)
    assert torch.equal(g.lower(X).compile()(X), 2 * X)
    assert len(calls) == 1


# What an operation does.


def test_out_arguments_are_writes():
    x = X.clone()
    with pytest.raises(fg.TracingError, match="add writes to an argument in place"):
        aten(lambda x: torch.add(x, 1, out=x))(x)
    with pytest.raises(fg.TracingError, match="add writes to a tensor outside"):
        aten(lambda y: torch.add(y, 1, out=x))(X)
    assert torch.equal(x, X)
    assert torch.equal(aten(lambda x: torch.add(x, 1, out=torch.zeros(3)))(X), X + 1)


def test_attention_without_dropout_draws_nothing():
    q = torch.linspace(-1, 1, 64).reshape(1, 2, 4, 8)
    expected = F.scaled_dot_product_attention(q, q, q)
    assert torch.allclose(aten(lambda q: F.scaled_dot_product_attention(q, q, q))(q), expected)
    with pytest.raises(fg.TracingError, match="global generator"):
        aten(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5))(q)


# Numbers.

LOW_PRECISION = {
    "add": lambda x, n: x + n,
    "subtract": lambda x, n: n - x,
    "multiply": lambda x, n: n * x,
    "multiply in place": lambda x, n: x.clone().mul_(n),
    "add in place": lambda x, n: x.clone().add_(n),
    "divide": lambda x, n: x / n,
    "divide in place": lambda x, n: x.clone().div_(n),
    "reciprocal": lambda x, n: n / x,
    "floor": lambda x, n: x // n,
    "floor of a number": lambda x, n: n // x,
    "remainder": lambda x, n: x % n,
    "power": lambda x, n: x**n,
    "exponential": lambda x, n: n**x,
    "lerp": lambda x, n: torch.lerp(x, 2 * x, n),
    "equal": lambda x, n: x == n,
    "less or equal": lambda x, n: x <= n,
    "clamp": lambda x, n: x.clamp(max=n),
    "where": lambda x, n: torch.where(x > 1, x, n),
    "sum": lambda x, n: sum([x, n, n]),
}


@pytest.mark.parametrize("op", LOW_PRECISION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_round_as_in_eager_torch_beside_low_precision(op, dtype):
    fun = LOW_PRECISION[op]
    g = aten(fun)
    for n in (0.1, 1 / 3, 2.7):
        x = torch.cat([torch.linspace(0.05, 3, 257), torch.tensor([n])]).to(dtype)
        for y in (x, x[-1]):
            assert torch.equal(g(y, n), fun(y, n)), (n, y.ndim)


def test_comparisons_of_numbers_combine():
    g = aten(lambda x, n: x * ((n > 0.5) & (n < 3) | (n == 7.0) ^ True))
    for n in (1.0, 4.0, 7.0):
        assert torch.equal(g(X, n), X * ((n > 0.5) & (n < 3) | (n == 7.0) ^ True))


@pytest.mark.parametrize(
    ("fun", "message"),
    [
        (lambda x, n: x[n], "the value of a Python number is needed"),
        (lambda x, n: x * torch.tensor(n), r"torch.tensor\(\) of a Python number"),
        (lambda x, n: x.sum(dim=n), "the value of a Python number is needed"),
    ],
)
def test_where_a_number_cannot_be_traced_the_message_says_so(fun, message):
    with pytest.raises(fg.TracingError, match=message):
        aten(fun)(X, 0)


def doubled(state):
    return tree.map(lambda x: 2 * x, state)


def test_a_donated_state_that_someone_holds_stays_empty():
    """The tensors of an old state are used for a new one, but only if nobody has them."""
    step, held, state = aten(doubled, donate_argnums=0), [], {"a": torch.ones(2), "b": torch.ones(3)}
    watched = []
    for i in range(6):
        if i % 3:
            held.append(state["a"])
        watched.append((weakref.ref(state["b"]), state["b"].data_ptr()))
        state = step(state)
    torch.testing.assert_close(state, {"a": torch.full((2,), 64.0), "b": torch.full((3,), 64.0)})
    assert [x.shape for x in held] == [(0,)] * 4
    assert all(ref() is not state["b"] for ref, _ in watched)
    assert {address for _, address in watched} == {state["b"].data_ptr()}


def test_a_state_that_autograd_holds_is_given_up_all_the_same():
    step, weight = aten(doubled, donate_argnums=0), torch.ones(2, requires_grad=True)
    state = [torch.ones(2)]
    for _ in range(3):
        state = step(state)
    product = weight * state[0]  # its graph holds the tensor
    (new,) = step(state)
    torch.testing.assert_close(new, torch.full((2,), 16.0))
    assert state[0].shape == (0,)
    assert product.shape == (2,)


def test_threads_that_share_a_donated_step_keep_their_states_apart():
    step, found = aten(doubled, donate_argnums=0), {}
    step([torch.ones(4)])

    def run(name):
        state = [torch.full((4,), float(name))]
        for _ in range(50):
            state = step(state)
        found[name] = state[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, x in found.items():
        torch.testing.assert_close(x, torch.full((4,), name * 2.0**50))


@pytest.mark.parametrize(
    "other",
    [OrderedDict(b=1.0, a=2.0), {"a": 2.0, "c": 1.0}, {"a": 2.0, "b": [1.0]}, {"a": 2.0, "b": None}, [2.0, 1.0]],
    ids=["ordered", "key", "list", "none", "sequence"],
)
def test_another_structure_is_another_program(other):
    other = tree.map(torch.tensor, other)
    step = aten(lambda pair: tree.map(torch.neg, pair))
    plain = [{"a": torch.tensor(1.0), "b": torch.tensor(2.0)}]
    for _ in range(2):
        step(plain)
    assert tree.equal(step([other]), tree.map(torch.neg, [other]))
    assert step.traces == 2
    assert type(step([other])[0]) is type(other)


@both
def test_an_index_may_be_a_traced_integer(backend):
    table, i = torch.arange(12.0).reshape(3, 4), torch.tensor(2)
    look_up = fg.jit(
        lambda table, i: (table[i], table[:, i], table[i - 1, 0], table[table[:, 0].argmax()]), backend=backend
    )
    for i in (torch.tensor(2), torch.tensor(-1), torch.tensor(0)):
        expected = table[i], table[:, i], table[i - 1, 0], table[2]
        assert tree.equal(look_up(table, i), expected)
    assert look_up.traces == 1
