"""Every layer against ``torch.nn``, and what every transform makes of it."""

import copy
from typing import Any

import pytest
import torch
from nn_cases import CASES, MORE_OWN_CASES, MORE_TORCH_CASES, TORCH_CASES, Case, call_reference, reference
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from functorch_gen import nn, random, tree

over_cases = pytest.mark.parametrize("case", CASES, ids=str)
over_torch_cases = pytest.mark.parametrize("case", [*TORCH_CASES, *MORE_TORCH_CASES], ids=str)
over_all_cases = pytest.mark.parametrize("case", [*CASES, *MORE_TORCH_CASES, *MORE_OWN_CASES], ids=str)


def loss(case: Case, params: Any, *inputs: Tensor) -> Tensor:
    """A function of the outputs without symmetries: their weighted sines."""
    y = case.layer(params, *inputs)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)
    return (weights * torch.sin(y)).sum()


def floats(case: Case, *arguments: Any) -> tuple[int, ...]:
    """The argument numbers that can be differentiated: parameters, and inputs that are no integers."""
    return (0,) if case.high is not None else tuple(range(len(arguments)))


def gradient(case: Case, params: Any, *inputs: Tensor) -> Any:
    return grad(lambda *a: loss(case, *a), floats(case, params, *inputs))(params, *inputs)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    for path, x, y in zip(tree.paths(expected), tree.leaves(actual), tree.leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, path=path: f"{path}: {m}")


@over_torch_cases
def test_layer_equals_torch(case: Case) -> None:
    """Outputs, input gradients and parameter gradients to 1e-10 in float64; names and layouts by load_state_dict."""
    params, inputs = case.params(), case.inputs()
    module = reference(case.layer)
    module.load_state_dict(tree.names(params), strict=True)
    if case.high is None:
        inputs = tuple(x.requires_grad_() for x in inputs)
    y = call_reference(module, inputs)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)
    wanted = [*module.parameters(), *(x for x in inputs if x.requires_grad)]
    found = torch.autograd.grad((weights * torch.sin(y)).sum(), wanted) if wanted else ()
    names = [name for name, _ in module.named_parameters()]
    parameter_gradients = dict(zip(names, found))

    plain = tuple(x.detach() for x in inputs)
    ours = gradient(case, params, *plain)
    assert_close(case.layer(params, *plain), y.detach(), 1e-10)
    assert_close(tree.names(ours[0]), parameter_gradients, 1e-10)
    assert_close(list(ours[1:]), list(found[len(names) :]), 1e-10)


@over_torch_cases
def test_init_has_the_names_shapes_and_dtype_of_torch(case: Case) -> None:
    params = tree.names(case.layer.init(random.key(0)))
    wanted = reference(case.layer).float().state_dict()
    assert {name: (p.shape, p.dtype) for name, p in params.items()} == {
        name: (p.shape, p.dtype) for name, p in wanted.items()
    }


@over_all_cases
def test_layer_is_hashable_and_equal_by_its_sizes(case: Case) -> None:
    assert len({case.layer, copy.deepcopy(case.layer)}) == 1


@over_cases
def test_layer_under_vmap_equals_a_loop(case: Case) -> None:
    """An ensemble: parameters and inputs batched. 1e-12: batched kernels sum in another order."""
    members = [(case.params(seed), *case.inputs(seed)) for seed in range(3)]
    batched = vmap(case.layer)(*tree.stack(members))
    assert_close(batched, torch.stack([case.layer(*member) for member in members]), 1e-12)


@over_cases
def test_per_example_gradients_equal_a_loop(case: Case) -> None:
    """vmap(grad) over the examples of one batch, each a batch of one."""
    params, inputs = case.params(), case.inputs()

    def one(*example: Tensor) -> Any:
        return gradient(case, params, *(x[None] for x in example))

    loop = tree.stack([one(*example) for example in zip(*inputs)])
    assert_close(vmap(one)(*inputs), loop, 1e-12)


def directions(case: Case) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The differentiable arguments, and a direction for them."""
    n = len(floats(case, case.params(), *case.inputs()))
    return (case.params(), *case.inputs())[:n], (case.params(7), *case.inputs(7))[:n]


def finite_difference(fun: Any, primals: Any, tangents: Any, step: float = 1e-5) -> Any:
    """Central: the error is step^2 times a third derivative, plus the rounding 1e-16 / step."""
    ahead, behind = (fun(*tree.add_scaled(primals, tangents, sign * step)) for sign in (1, -1))
    return tree.scale(tree.sub(ahead, behind), 1 / (2 * step))


# The padding row of an embedding has no gradient by definition, and finite differences see one.
over_smooth_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if getattr(case.layer, "padding_idx", None) is None], ids=str
)


@over_smooth_cases
def test_jvp_equals_finite_differences(case: Case) -> None:
    primals, tangents = directions(case)
    rest = case.inputs() if case.high is not None else ()

    def fun(*a: Any) -> Tensor:
        return case.layer(*a, *rest)

    assert_close(jvp(fun, primals, tangents)[1], finite_difference(fun, primals, tangents), 1e-6)


@over_smooth_cases
def test_second_derivatives_equal_finite_differences_in_both_modes(case: Case) -> None:
    """Forward over reverse, and reverse over reverse, against the differences of the gradient."""
    primals, tangents = directions(case)
    rest = case.inputs() if case.high is not None else ()

    def first(*a: Any) -> Any:
        return gradient(case, *a, *rest)

    expected = finite_difference(first, primals, tangents)
    forward = jvp(first, primals, tangents)[1]
    reverse = grad(lambda a: tree.vdot(first(*a), tangents))(primals)
    assert_close(forward, expected, 1e-5)
    assert_close(reverse, forward, 1e-9)


@over_cases
def test_per_example_gradients_trace_to_one_graph(case: Case) -> None:
    """make_fx over fake tensors bakes no value in: the graph is right on other parameters and inputs."""

    def fun(params: Any, *inputs: Tensor) -> Any:
        return vmap(lambda *x: gradient(case, params, *(a[None] for a in x)))(*inputs)

    graph = make_fx(fun, tracing_mode="fake", _allow_non_fake_inputs=True)(case.params(), *case.inputs())
    params, inputs = case.params(3), case.inputs(3)
    assert_close(graph(params, *inputs), fun(params, *inputs), 1e-12)


@over_cases
def test_layer_compiles_to_one_graph(case: Case) -> None:
    torch.compiler.reset()
    params, inputs = case.params(), case.inputs()
    compiled = torch.compile(case.layer, fullgraph=True, backend="eager")
    assert_close(compiled(params, *inputs), case.layer(params, *inputs), 1e-12)


DRAWING = [
    Case(nn.Dropout(0.5), ((4, 3),)),
    Case(nn.MultiHeadAttention(4, 2, dropout=0.5), ((2, 5, 4),)),
    Case(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Dropout(0.1)), ((4, 3),)),
    Case(nn.MLP(3, (5, 4), 2, dropout=0.5), ((4, 3),)),
]


@pytest.mark.parametrize("case", DRAWING, ids=str)
@pytest.mark.parametrize("trace", ["compile", "make_fx"])
def test_call_with_a_key_traces_to_one_graph(case: Case, trace: str) -> None:
    """The key is an input of the graph: another key gives the draw of the eager call with it."""
    torch.compiler.reset()

    def fun(params: Any, x: Tensor, key: Tensor) -> Tensor:
        return case.layer(params, x, key=key)

    arguments = (case.params(), *case.inputs())
    if trace == "compile":
        traced = torch.compile(fun, fullgraph=True, backend="eager")
    else:
        traced = make_fx(fun, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments, random.key(0))
    draws = [traced(*arguments, random.key(seed)) for seed in range(2)]
    assert not torch.equal(*draws)
    assert_close(draws, [fun(*arguments, random.key(seed)) for seed in range(2)], 1e-12)


@pytest.mark.parametrize("case", [CASES[3], CASES[-1]], ids=str)
def test_init_compiles_to_one_graph(case: Case) -> None:
    torch.compiler.reset()
    init = torch.compile(case.layer.init, fullgraph=True, backend="eager")
    assert_close(init(random.key(3)), case.layer.init(random.key(3)), 1e-6)


@over_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_input_and_parameters(case: Case, dtype: torch.dtype) -> None:
    params, inputs = tree.cast((case.params(), case.inputs()), dtype)
    y = case.layer(params, *inputs)
    assert y.dtype == dtype
    # The rounding of bfloat16 is 2^-9; sums of up to 50 terms of size one.
    expected = case.layer(*tree.cast((params, *inputs), torch.float64))
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.2 if dtype == torch.bfloat16 else 1e-4)


@over_all_cases
def test_layer_leaves_its_arguments_unchanged(case: Case) -> None:
    arguments = (case.params(), *case.inputs())
    case.layer(*arguments)
    assert tree.equal(arguments, (case.params(), *case.inputs()))


@over_all_cases
def test_same_key_gives_the_same_parameters_and_another_key_others(case: Case) -> None:
    first, again, other = (case.layer.init(random.key(seed)) for seed in (0, 0, 1))
    drawn = [name for name, p in tree.names(first).items() if p.unique().numel() > 1]
    assert tree.equal(first, again)
    assert not any(torch.equal(tree.names(first)[name], tree.names(other)[name]) for name in drawn)


ANY_LEADING_AXES = [
    Case(nn.Linear(3, 2), ((3,),)),
    Case(nn.Conv1d(2, 3, 3, padding=1), ((2, 5),)),
    Case(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), ((2, 4, 4),)),
    Case(nn.Conv3d(1, 2, 2), ((1, 3, 3, 3),)),
    Case(nn.ConvTranspose2d(2, 3, 2), ((2, 3, 3),)),
    Case(nn.LayerNorm(3), ((3,),)),
    Case(nn.MultiHeadAttention(4, 2), ((5, 4),)),
    Case(nn.MultiHeadAttention(4, 2, kdim=3, vdim=3), ((5, 4), (2, 3))),
    Case(nn.FourierFeatures(3, 4), ((3,),)),
]


@pytest.mark.parametrize("case", ANY_LEADING_AXES, ids=str)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 2)])
def test_layer_takes_any_leading_axes(case: Case, lead: tuple[int, ...]) -> None:
    params = case.params()
    inputs = Case(case.layer, tuple((*lead, *shape) for shape in case.shapes)).inputs()
    fun = case.layer
    for _ in lead:
        fun = vmap(fun, (None, *(0,) * len(inputs)))
    assert_close(case.layer(params, *inputs), fun(params, *inputs), 1e-12)
