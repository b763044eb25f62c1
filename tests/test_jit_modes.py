"""How jitted functions behave over a run: tiers, messages, poison, threads, exceptions, thousands of calls."""

import logging
import pickle
import re
import threading
import time

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree
from functorch_gen.transforms.tracing import program, progress

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def compilers():
    return [t for t in threading.enumerate() if t.name.startswith("compiling")]


# Tiers.


def test_tiered_answers_while_the_compiler_works(monkeypatch):
    allowed, begun, compile_graph = threading.Event(), [], program.compile_graph

    def held(*args):
        begun.append(args)
        assert allowed.wait(60)
        return compile_graph(*args)

    monkeypatch.setattr(program, "compile_graph", held)
    g = fg.jit(lambda x: x.sin().sum(-1), backend="tiered")
    shapes = [(2, 3), (4, 3)]
    for shape in shapes:  # a new batch shape does not wait for the compiler either
        x = torch.full(shape, 0.3)
        assert torch.allclose(g(x), x.sin().sum(-1))
    wait(lambda: begun)
    assert all(g.lower(torch.ones(shape))._program.executable is None for shape in shapes)
    allowed.set()
    wait(lambda: not compilers())
    for shape in shapes:
        x = torch.full(shape, 0.3)
        assert g.lower(x)._program.executable is not None
        assert torch.allclose(g(x), x.sin().sum(-1))
    assert (g.traces, len(begun)) == (2, 2)


def run_and_wait(g):
    g(X)
    wait(lambda: not compilers())


def test_tiered_goes_on_as_it_is_where_compilation_fails(monkeypatch):
    def fails(*_):
        raise RuntimeError("broken compiler")

    monkeypatch.setattr(program, "compile_graph", fails)
    g = fg.jit(lambda x: 2 * x, backend="tiered")
    with pytest.warns(UserWarning, match="goes on without generated code: broken compiler"):
        run_and_wait(g)
    assert torch.equal(g(X), 2 * X)


def test_tiered_donated_steps_change_over_in_the_middle_of_a_run():
    step = fg.jit(lambda s, x: {"a": s["a"] * 0.5 + x, "n": s["n"] + 1}, donate_argnums=0, backend="tiered")
    state = {"a": torch.zeros(3, dtype=torch.float64), "n": torch.zeros((), dtype=torch.int64)}
    count = 0
    while compilers() or count < 5:
        state = step(state, torch.ones(3, dtype=torch.float64))
        count += 1
    state = step(state, torch.ones(3, dtype=torch.float64))
    assert state["n"] == count + 1
    assert torch.allclose(state["a"], torch.full((3,), 2 - 2.0**-count, dtype=torch.float64), rtol=1e-15)


# Messages.


@pytest.mark.parametrize(
    ("again", "message"),
    [
        (lambda g: g({"w": X}, torch.ones(4)), r"argument 'x' is float32\[4\] on cpu, was float32\[3\] on cpu"),
        (lambda g: g({"w": X.double()}, X[0]), r"argument 'p' at 'w' is float64\[2, 3\] on cpu, was float32"),
        (lambda g: g({"w": X}, 2), "argument 'x' is int, was "),
        (lambda g: g({"v": X}, X[0]), "has a leaf at '0.v' and has no leaf at '0.w'"),
        (lambda g: g({"w": X}, X[0], mode="b"), "static argument 'mode' is 'b', was 'a'"),
    ],
    ids=["shape", "dtype", "number", "structure", "static"],
)
def test_retraces_are_explained_where_wanted(again, message, caplog):
    def f(p, x, mode="a"):
        return tree.map(lambda w: w * 2, p), x

    g = fg.jit(f, backend="aten", static_argnames="mode")
    with fg.config.override(explain_retraces=True), caplog.at_level(logging.WARNING, "functorch_gen"):
        g({"w": X}, X[0], **({"mode": "a"} if "static" in message else {}))
        assert not caplog.records
        again(g)
    (record,) = caplog.records
    assert "f is traced again" in record.message
    caplog.clear()
    again(g)
    assert not caplog.records  # settings are back, and it is known
    assert re.search(message, record.message), record.message


def test_what_takes_long_is_shown_where_wanted(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.02)

    def slow(x):
        time.sleep(0.1)
        return x + 1

    with fg.config.override(show_compilation=True):
        fg.jit(slow, backend="aten")(X)
    assert "tracing test_what_takes_long_is_shown_where_wanted.<locals>.slow" in capsys.readouterr().err
    with fg.config.override(show_compilation=False):
        fg.jit(slow, backend="aten")(X)
    assert not capsys.readouterr().err


# Donation.


@pytest.mark.parametrize("backend", ["aten", "inductor"])
def test_poison_shows_in_views_of_what_was_donated(backend):
    step = fg.jit(lambda s: [x * 2 if x.dtype.is_floating_point else x for x in s], donate_argnums=0, backend=backend)
    state = [
        torch.ones(4),
        torch.ones(4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.bool),
        torch.ones(4).bfloat16(),
    ]
    kept = [x[:2] for x in state]
    with fg.config.override(poison_donated=True):
        new = step(state)
    assert [x.tolist() for x in new] == [[2.0] * 4, [1] * 4, [False] * 4, [2.0] * 4]
    assert kept[0].isnan().all()
    assert kept[3].isnan().all()
    assert (kept[1] == torch.iinfo(torch.int64).max).all()
    assert kept[2].all()


class Stop(Exception):
    pass


def stops(x):
    if float(x) > 5:
        raise Stop


@pytest.mark.parametrize("backend", ["aten", "inductor"])
@pytest.mark.parametrize("where", ["early", "late"])
def test_an_exception_in_the_middle_leaves_the_old_state_whole(backend, where):
    def step(state, x):
        new = {"a": state["a"] * 2, "b": (x @ x) @ state["b"] + state["a"], "n": state["n"] + 1}
        fg.debug.callback(stops, (x @ x).sum() if where == "early" else new["b"].sum())
        return {**new, "c": new["b"] @ state["c"]}

    g = fg.jit(step, donate_argnums=0, backend=backend)
    make = lambda: {"a": torch.ones(2, 2), "b": torch.eye(2), "c": torch.eye(2), "n": torch.tensor(3)}
    state = make()
    with pytest.raises(Stop):
        g(state, 3 * torch.ones(2, 2))
    assert tree.equal(state, make())
    small = 0.1 * torch.ones(2, 2)
    assert tree.allclose(g(state, small), step(make(), small))
    assert all(leaf.shape == (0,) for leaf in tree.leaves(state))


# Long runs.


@pytest.mark.parametrize("backend", ["aten", "inductor"])
def test_a_thousand_learning_rates_are_one_trace(backend):
    step = fg.jit(lambda w, rate, n: (w - rate * w, n + 1), donate_argnums=0, backend=backend)
    w, expected, n = torch.ones(3, dtype=torch.float64), 1.0, 0
    for i in range(1000):
        rate = 1e-2 / (i + 1)
        w, n = step(w, rate, i)
        expected -= rate * expected
        assert n == i + 1
    assert step.traces == 1
    assert torch.allclose(w, torch.full_like(w, expected), rtol=1e-12)  # a thousand roundings


def test_inputs_and_outputs_survive_pickle():
    state = {"a": torch.ones(3), "b": (torch.zeros(2, 2).mT, torch.tensor(1))}
    step = fg.jit(lambda s: tree.map(lambda x: x + 1, s), donate_argnums=0, backend="aten")
    for i in range(1, 4):
        state = pickle.loads(pickle.dumps(step(pickle.loads(pickle.dumps(state)))))
        assert tree.equal(state, {"a": torch.ones(3) + i, "b": (torch.zeros(2, 2) + i, torch.tensor(1 + i))})
    assert step.traces == 1


# Threads.


def in_threads(*tasks):
    """Runs the tasks at once; returns what they raised."""
    errors = []

    def run(task):
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def check_in_thread(k, backend):
    def step(params, x):
        def loss(p):
            h = torch.tanh(x @ p["w"] + k)
            return (
                torch.nn.functional.cross_entropy(h, torch.zeros(len(x), dtype=torch.int64))
                + h.softmax(0).square().sum()
            )

        return tree.map(lambda p, g: p - 0.1 * g, params, fg.grad(loss)(params))

    params, x = {"w": torch.linspace(-1, 1, 12).reshape(3, 4)}, torch.linspace(0, 1, 6 + 3 * k).reshape(-1, 3)
    g, expected = fg.jit(step, backend=backend), step(params, x)
    for _ in range(3):
        assert tree.allclose(g(params, x), expected, rtol=1e-5, atol=1e-6)


def test_threads_trace_and_compile_different_functions_at_once():
    tasks = [lambda k=k, b=b: check_in_thread(k, b) for k, b in enumerate(["inductor", "aten", "inductor", "aten"])]
    assert not in_threads(*tasks, *[lambda: check_in_thread(9, "aten")] * 2)


def test_threads_share_one_compiled_function():
    g = fg.jit(lambda x: (x.sin() * x).sum(-1))
    inputs = [torch.linspace(0, k + 1, 6).reshape(2, 3) for k in range(4)]

    def check(x):
        for _ in range(50):
            assert torch.allclose(g(x), (x.sin() * x).sum(-1), rtol=1e-6)

    assert not in_threads(*[lambda x=x: check(x) for x in inputs])
    assert g.traces == 1


@pytest.mark.parametrize("backend", ["aten", "inductor"])
def test_a_callback_may_call_a_jitted_function(backend):
    inner, seen = fg.jit(lambda x: 3 * x, backend=backend), []

    def outer(x):
        y = x + 1
        fg.debug.callback(lambda v: seen.append(inner(v)), y)
        return 2 * y

    g = fg.jit(outer, backend=backend)
    for i in range(2):
        assert torch.equal(g(X + i), 2 * (X + i + 1))
    assert all(torch.equal(v, 3 * (X + i + 1)) for i, v in enumerate(seen))
    assert inner.traces == g.traces == 1
