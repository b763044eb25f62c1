"""debug and config: printing from compiled code, NaN checks, profiles, settings."""

import sys
import threading

import pytest
import torch

import functorch_gen as fg
from functorch_gen.transforms.effects import has_effects
from functorch_gen.transforms.tracing.trace import trace

BACKENDS = pytest.mark.parametrize("backend", ["aten", "inductor"])


@pytest.fixture
def printed():
    written = []
    with fg.config.override(debug_sink=written.append):
        yield written


def noisy(x, scale):
    fg.debug.print("first {:.1f}", x.sum())
    y = scale * x
    fg.debug.print("second {y}, {n}", y=y.sum(), n=7)
    fg.debug.print("no values")
    return y


X = torch.ones(3)
SAID = ["first 3.0", "second 6.0, 7", "no values"]


# print and callback


def test_print_says_the_same_without_jit(printed):
    noisy(X, 2.0)
    assert printed == SAID


@BACKENDS
def test_print_keeps_its_order_in_every_call_of_a_program(printed, backend):
    f = fg.jit(noisy, backend=backend)
    assert torch.equal(f(X, 2.0), 2 * X)
    f(2 * X, 0.5)
    assert printed == [*SAID, "first 6.0", "second 3.0, 7", "no values"]
    assert f.traces == 1


@BACKENDS
def test_print_in_a_donated_step(printed, backend):
    def step(state, x):
        fg.debug.print("{}", state.sum())
        return state + x

    state = fg.jit(step, backend=backend, donate_argnums=0)(torch.zeros(3), X)
    assert (printed, state.tolist()) == (["0.0"], [1.0, 1.0, 1.0])


@BACKENDS
def test_print_under_grad_says_values_once(printed, backend):
    gradient = fg.jit(fg.grad(lambda x: noisy(x, 2.0).sum()), backend=backend)(X)
    assert (printed, gradient.tolist()) == (SAID, [2.0, 2.0, 2.0])


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: fg.jit(f, backend="aten")], ids=["eager", "jit"])
def test_print_under_vmap_says_each_example(printed, wrap):
    def f(x):
        fg.debug.print("{}", x)
        return x.sin()

    wrap(fg.vmap(f))(torch.arange(3.0))
    assert printed == ["0.0", "1.0", "2.0"]


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: lambda x: fg.jvp(f, (x,), (x,)),
        lambda f: fg.vmap(fg.grad(f)),
        fg.hessian,
        lambda f: lambda x: fg.grad(fg.remat(f))(x.sum()),
    ],
    ids=["jvp", "vmap-grad", "hessian", "remat"],
)
def test_print_changes_no_derivative(printed, transform):
    def silent(x):
        return x.sin().sum()

    def f(x):
        fg.debug.print("{}", x)
        return silent(x)

    found, expected = transform(f)(X), transform(silent)(X)
    assert printed
    assert fg.tree.equal(found, expected)


def test_print_goes_to_standard_output(capsys):
    fg.jit(noisy, backend="aten")(X, 2.0)
    assert capsys.readouterr().out.splitlines() == SAID


def test_print_refuses_values_in_place_of_the_text():
    with pytest.raises(TypeError, match=r"expected text to be a string with places \{\}, got Tensor"):
        fg.debug.print(X)


@BACKENDS
def test_callback_sees_trees_and_numbers(backend):
    seen = []

    def f(params, rate):
        fg.debug.callback(lambda *args, **named: seen.append((args, named)), params, "note", rate=rate)
        return params["w"] * rate

    fg.jit(f, backend=backend)({"w": X}, 0.5)
    (((params, note), named),) = seen
    assert torch.equal(params["w"], X)
    assert (note, float(named["rate"])) == ("note", 0.5)


def test_callback_error_reaches_the_caller_and_leaves_donated_arguments():
    def refuse(x):
        raise KeyError("refused")

    def f(x):
        fg.debug.callback(refuse, x)
        return x + 1

    x = torch.ones(2)
    with pytest.raises(KeyError, match="refused"):
        fg.jit(f, backend="aten", donate_argnums=0)(x)
    assert x.tolist() == [1.0, 1.0]


def test_callback_refuses_what_is_no_function():
    with pytest.raises(TypeError, match="callback: expected f to be a function, got int"):
        fg.debug.callback(3, X)


def test_callback_marks_the_program_as_one_of_this_process():
    assert has_effects(trace(noisy, [X, 2.0]).graph.graph)
    assert not has_effects(trace(torch.sin, [X]).graph.graph)


# NaN checks


def root(x):
    return torch.sqrt(x - 1)


def test_debug_nans_names_the_operation_and_the_line():
    with (
        fg.config.override(debug_nans=True),
        pytest.raises(FloatingPointError, match=r'aten.sqrt yields NaN, at .*test_debug.py:\d+ in root: "return torch'),
    ):
        fg.jit(root)(torch.zeros(2))


def test_debug_nans_leads_from_the_backward_pass_to_the_forward_line():
    with (
        fg.config.override(debug_nans=True),
        pytest.raises(FloatingPointError, match=r"aten.div yields infinity, at .* in backward of root: "),
    ):
        fg.jit(fg.grad(lambda x: root(x).sum()))(torch.ones(2))


def test_debug_nans_names_an_argument_that_holds_one():
    with (
        fg.config.override(debug_nans=True),
        pytest.raises(FloatingPointError, match=r"aten.mul yields NaN \(held by .*x.* before the call\)"),
    ):
        fg.jit(lambda w, x: (w * x).sum())(torch.ones(2), torch.tensor([1.0, torch.nan]))


def test_debug_nans_allows_infinity_where_it_is_meant():
    def attend(x):
        return torch.softmax(torch.where(x > 0, x, -torch.inf).masked_fill(x > 5, -torch.inf), -1)

    with fg.config.override(debug_nans=True):
        found = fg.jit(attend)(torch.arange(3.0))
    assert torch.allclose(found, attend(torch.arange(3.0)), rtol=1e-6)


def test_debug_nans_leaves_donated_arguments_as_they_were():
    def step(state, x):
        return {"a": state["a"] + x, "b": (state["b"] - 1).log()}

    state = {"a": torch.ones(2), "b": torch.ones(2)}
    with fg.config.override(debug_nans=True):
        with pytest.raises(FloatingPointError, match=r"aten.log yields infinity"):
            fg.jit(step, donate_argnums=0)(state, 1.0)
        assert fg.tree.equal(state, {"a": torch.ones(2), "b": torch.ones(2)})
        state["b"] = torch.full((2,), 2.0)
        state = fg.jit(step, donate_argnums=0)(state, 1.0)
    assert fg.tree.equal(state, {"a": torch.full((2,), 2.0), "b": torch.zeros(2)})


# profile


def test_profile_gives_operations_to_functions():
    def slow(x):
        for _ in range(5):
            x = x @ x
        return x

    def step(x):
        return slow(x).sum() + x.mean()

    found = fg.debug.profile(fg.jit(step), torch.eye(200))
    name = "test_profile_gives_operations_to_functions.slow"
    assert found.functions[name].ops == 5
    assert sum(row.ops for row in found.functions.values()) == 8
    assert found.functions[name].seconds > 0.5 * found.seconds  # 5 x 16 MFLOP against three sums of 40,000 numbers
    table = str(found).splitlines()
    assert table[0].split() == ["function", "ops", "ms", "%"]
    assert table[1].startswith(name)


def test_profile_leaves_donated_arguments():
    state = {"w": torch.ones(3)}
    fg.debug.profile(fg.jit(lambda s: fg.tree.scale(s, 2.0), donate_argnums=0), state)
    assert state["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fg.debug.profile(root, X), TypeError, "profile: expected a function from jit, got function"),
        (lambda: fg.debug.profile(fg.jit(root), X, repeats=0), ValueError, "profile: expected repeats > 0, got 0"),
        (
            lambda: fg.debug.profile(fg.jit(root), X.clone().requires_grad_()),
            ValueError,
            "profile: expected a call that is compiled",
        ),
    ],
    ids=["not-jitted", "repeats", "eager"],
)
def test_profile_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


# config


def test_override_is_undone_after_an_error():
    before = fg.config.current()
    with pytest.raises(KeyError), fg.config.override(explain_retraces=not before.explain_retraces):
        raise KeyError
    assert fg.config.current() == before


def test_override_leaves_other_settings_that_change_meanwhile():
    with fg.config.override(debug_nans=True):
        fg.config.update(poison_donated=True)
    try:
        assert (fg.config.current().debug_nans, fg.config.current().poison_donated) == (False, True)
    finally:
        fg.config.update(poison_donated=False)


def test_update_reaches_other_threads():
    seen = []
    with fg.config.override(show_compilation=False):
        thread = threading.Thread(target=lambda: seen.append(fg.config.current().show_compilation))
        thread.start()
        thread.join()
    assert seen == [False]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"debug_nan": True}, ValueError, "expected one of debug_nans, .*, show_compilation, got 'debug_nan'"),
        ({"debug_nans": 1}, TypeError, "expected debug_nans to be True or False, got 1"),
        ({"show_compilation": "yes"}, ValueError, "expected show_compilation to be True, False or 'auto', got 'yes'"),
        ({"debug_sink": "file"}, TypeError, "expected debug_sink to be a function or None, got 'file'"),
    ],
    ids=["name", "bool", "choice", "sink"],
)
def test_update_refuses(settings, error, message):
    before = fg.config.current()
    with pytest.raises(error, match=f"config: {message}"):
        fg.config.update(**settings)
    assert fg.config.current() == before


def test_from_environment_reads_every_variable():
    variables = {
        "FUNCTORCH_GEN_DEBUG_NANS": "1",
        "FUNCTORCH_GEN_EXPLAIN_RETRACES": "True",
        "FUNCTORCH_GEN_POISON_DONATED": "0",
        "FUNCTORCH_GEN_SHOW_COMPILATION": "auto",
    }
    expected = fg.config.Settings(debug_nans=True, explain_retraces=True)
    assert fg.config.from_environment(variables) == expected


def test_from_environment_names_the_variable():
    with pytest.raises(ValueError, match="expected FUNCTORCH_GEN_DEBUG_NANS to be one of 1, true, 0, false, got 'on'"):
        fg.config.from_environment({"FUNCTORCH_GEN_DEBUG_NANS": "on"})


def test_standard_output_is_looked_up_at_each_line(monkeypatch, capsys):
    f = fg.jit(noisy, backend="aten")
    f(X, 2.0)
    monkeypatch.setattr(sys, "stdout", sys.stderr)
    f(X, 2.0)
    out, err = capsys.readouterr()
    assert (out.splitlines(), err.splitlines()) == (SAID, SAID)
