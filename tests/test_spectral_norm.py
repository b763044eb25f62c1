"""Spectral normalisation against torch's parametrization, call by call, and under the transforms."""

import re
from typing import Any

import pytest
import torch
from nn_cases import reference
from torch import Tensor
from torch.nn.utils.parametrizations import spectral_norm

from functorch_gen import nn, random, tree
from functorch_gen.transforms import grad, hvp, jit, jvp, remat, vmap
from functorch_gen.typing import Params, State, Tree

Built = tuple[nn.SpectralNorm, torch.nn.Module, Params, State]

LAYERS: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
    (nn.Linear(3, 4), (5, 3), {}),
    (nn.Linear(3, 4, bias=False), (5, 3), {"n_power_iterations": 3, "eps": 1e-6}),
    (nn.Linear(3, 4), (5, 3), {"dim": 1}),
    (nn.Conv2d(2, 3, 3), (2, 2, 4, 4), {}),
    (nn.Conv2d(2, 3, (1, 2)), (2, 2, 4, 4), {"dim": -2}),
    (nn.ConvTranspose2d(3, 2, 2), (2, 3, 2, 2), {}),
    (nn.ConvTranspose1d(3, 2, 2), (2, 3, 4), {"dim": 0}),
]
IDS = [f"{type(layer).__name__}{options}".replace(" ", "") for layer, _, options in LAYERS]
over_layers = pytest.mark.parametrize(("layer", "shape", "options"), LAYERS, ids=IDS)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighted(y: Tensor) -> Tensor:
    return (torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape) * torch.sin(y)).sum()


def build(layer: Any, options: dict[str, Any], seed: int = 0) -> Built:
    """Ours and torch's, with the same weights and vectors; torch draws its vectors."""
    module = reference(layer)
    params = {name: normal(seed + i, *p.shape) for i, (name, p) in enumerate(layer.init(random.key(0)).items())}
    module.load_state_dict(params)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = spectral_norm(module, **options)
    return nn.SpectralNorm(layer, **options), module, params, vectors(module)


def vectors(module: Any) -> State:
    norm = module.parametrizations.weight[0]
    return {"u": norm._u.clone(), "v": norm._v.clone()}


def loss(layer: Any, params: Params, state: State, x: Tensor, *, train: bool = True) -> tuple[Tensor, State]:
    y, state = layer(params, state, x, train=train)
    return weighted(y), state


def assert_close(actual: Tree, expected: Tree, tolerance: float = 1e-12) -> None:
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance), actual, expected)


# Against torch.


@over_layers
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_spectral_norm_equals_torch_call_by_call(layer, shape, options, train):
    """Outputs, gradients and vectors of three calls: to 1e-12, sums in another order."""
    ours, module, params, state = build(layer, options)
    module.train(train)
    for seed in range(3):
        x = normal(seed, *shape).requires_grad_()
        value = weighted(module(x))
        wanted = torch.autograd.grad(value, [x, *module.parameters()])
        names = [
            name.removeprefix("parametrizations.").removesuffix(".original") for name, _ in module.named_parameters()
        ]
        by_name = dict(zip(names, wanted[1:], strict=True))

        def objective(x: Tensor, params: Params, state: State = state) -> tuple[Tensor, State]:
            return loss(ours, params, state, x, train=train)

        found, state = grad(objective, (0, 1), has_aux=True)(x.detach(), params)
        assert_close(found, (wanted[0], by_name))
        assert_close(state, vectors(module))


def test_spectral_norm_second_derivatives_equal_torch():
    """The vectors are constants of the second derivative too."""
    ours, module, params, state = build(nn.Linear(3, 4, bias=False), {})
    x, v = normal(0, 5, 3), normal(1, 4, 3)
    (weight,) = module.train().parameters()
    (first,) = torch.autograd.grad(weighted(module(x)), [weight], create_graph=True)
    (wanted,) = torch.autograd.grad((first * v).sum(), [weight])

    def objective(weight: Tensor) -> Tensor:
        return loss(ours, {"weight": weight}, state, x)[0]

    assert_close(hvp(objective, (params["weight"],), (v,)), wanted, 1e-11)
    assert_close(grad(lambda w: (grad(objective)(w) * v).sum())(params["weight"]), wanted, 1e-11)


def test_spectral_norm_forward_mode_equals_reverse():
    ours, _, params, state = build(nn.Conv2d(2, 3, 3), {})
    x, tangent = normal(0, 2, 2, 4, 4), tree.map(lambda p: normal(9, *p.shape), params)

    def objective(params: Params) -> Tensor:
        return loss(ours, params, state, x)[0]

    pushed = jvp(objective, (params,), (tangent,))[1]
    assert_close(pushed, tree.vdot(grad(objective)(params), tangent))


# What it does.


def test_spectral_norm_converges_to_the_largest_singular_value():
    """Against the SVD; 200 iterations leave (s2 / s1)^400 of the error."""
    ours = nn.SpectralNorm(nn.Linear(3, 4, bias=False), n_power_iterations=200)
    params = {"weight": normal(3, 4, 3)}
    y, _ = ours(params, tree.cast(ours.init_state(), torch.float64), torch.eye(3, dtype=torch.float64), train=True)
    assert_close(y.mT, params["weight"] / torch.linalg.svdvals(params["weight"])[0])


def test_spectral_norm_starts_with_unit_vectors_of_the_weight_s_sizes():
    state = nn.SpectralNorm(nn.Conv2d(2, 3, (2, 5))).init_state()
    assert {name: tuple(x.shape) for name, x in state.items()} == {"u": (3,), "v": (20,)}
    assert_close(tree.map(torch.linalg.vector_norm, state), {"u": torch.ones(()), "v": torch.ones(())}, 1e-6)
    assert tree.equal(state, nn.SpectralNorm(nn.Conv2d(2, 3, (2, 5))).init_state())


def test_spectral_norm_init_state_from_parameters_is_ready_for_evaluation():
    """As torch: 15 iterations. The estimate is below s1, by a factor of cos^2 of the angle that is left."""
    ours = nn.SpectralNorm(nn.Linear(6, 8, bias=False))
    params = ours.init(random.key(0))
    estimate = params["weight"] / ours(params, ours.init_state(params), torch.eye(6), train=False)[0].mT
    largest = torch.linalg.svdvals(params["weight"])[0]
    assert 0.98 * largest < estimate[0, 0] <= largest * (1 + 1e-6)


def test_spectral_norm_passes_keys_and_further_inputs_on():
    layer = nn.MultiHeadAttention(4, 2, dropout=0.5)
    ours = nn.SpectralNorm(layer, name="in_proj_weight")
    assert nn.draws(ours)
    assert not nn.draws(nn.SpectralNorm(nn.Linear(2, 2)))
    params, x, context = ours.init(random.key(0)), torch.ones(3, 4), torch.ones(5, 4)
    sigma = torch.linalg.svdvals(params["in_proj_weight"])[0]
    normal_params = {**params, "in_proj_weight": params["in_proj_weight"] / sigma}
    many = nn.SpectralNorm(layer, n_power_iterations=300, name="in_proj_weight")
    y, _ = many(params, ours.init_state(), x, context, train=True, key=random.key(1), is_causal=True)
    assert_close(y, layer(normal_params, x, context, key=random.key(1), is_causal=True), 1e-4)


def test_spectral_norm_of_bfloat16_weights_computes_in_float32():
    ours = nn.SpectralNorm(nn.Linear(3, 4), n_power_iterations=50)
    params = tree.cast(ours.init(random.key(0)), torch.bfloat16)
    y, state = ours(params, ours.init_state(), torch.eye(3, dtype=torch.bfloat16), train=True)
    assert y.dtype == torch.bfloat16
    wide = tree.cast(params, torch.float32)
    assert_close(state, ours(wide, ours.init_state(), torch.eye(3), train=True)[1], 1e-6)


# Under the transforms.


def discriminator() -> tuple[Any, Params, State]:
    net = nn.Sequential(nn.SpectralNorm(nn.Linear(3, 4)), torch.tanh, nn.SpectralNorm(nn.Linear(4, 1)))
    draw = torch.Generator().manual_seed(0)
    params = tree.map(lambda p: torch.randn(p.shape, generator=draw, dtype=torch.float64), net.init(random.key(0)))
    return net, params, tree.cast(net.init_state(), torch.float64)


NET, PARAMS, START = discriminator()


def gradients(params: Params, state: State, x: Tensor) -> Tree:
    return grad(lambda p, x: loss(NET, p, state, x), (0, 1), has_aux=True)(params, x)


def test_spectral_norm_under_vmap_over_models_is_a_loop():
    models = [(tree.map(lambda p, s=s: p + s * p.cos(), PARAMS), START, normal(s, 5, 3)) for s in range(3)]
    assert_close(vmap(gradients)(*tree.stack(models)), tree.stack([gradients(*model) for model in models]))


def test_spectral_norm_under_vmap_over_examples_has_one_state():
    """The state does not depend on the examples, and comes out once."""
    xs = normal(0, 5, 3)
    one = grad(lambda p, x: loss(NET, p, START, x), has_aux=True)
    found, state = vmap(one, (None, 0), (0, None))(PARAMS, xs)
    assert_close(found, tree.stack([one(PARAMS, x)[0] for x in xs]))
    assert_close(state, one(PARAMS, xs[0])[1])


def test_spectral_norm_jitted_is_the_same():
    traced = jit(gradients, backend="aten")
    for seed in range(2):
        arguments = (tree.scale(PARAMS, 1.0 + seed), START, normal(seed, 5, 3))
        assert_close(traced(*arguments), gradients(*arguments))


def test_spectral_norm_compiles_to_one_graph():
    torch.compiler.reset()
    x = normal(0, 5, 3)
    compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
    assert_close(compiled(PARAMS, START, x), gradients(PARAMS, START, x))


def test_spectral_norm_recomputed_is_the_same():
    def apply(params: Params, state: State, x: Tensor) -> tuple[Tensor, State]:
        return NET(params, state, x, train=True)

    def total(apply: Any, params: Params) -> tuple[Tensor, State]:
        y, state = apply(params, START, normal(0, 5, 3))
        return weighted(y), state

    found, wanted = (grad(lambda p, f=f: total(f, p), has_aux=True)(PARAMS) for f in (remat(apply), apply))
    assert_close(found, wanted)


# Errors.

MODULE: Any = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.SpectralNorm(nn.BatchNorm1d(3)), TypeError, "expected a layer without state, got BatchNorm1d"),
        (lambda: nn.SpectralNorm(MODULE), TypeError, "SpectralNorm: expected a layer without state"),
        (lambda: nn.SpectralNorm(nn.Linear(2, 2), 0), ValueError, "expected n_power_iterations >= 1, got 0"),
        (lambda: nn.SpectralNorm(nn.Linear(2, 2), eps=-1.0), ValueError, "SpectralNorm: expected eps >= 0, got -1.0"),
        (
            lambda: nn.SpectralNorm(nn.Dropout()).init_state(),
            KeyError,
            "SpectralNorm: expected a parameter 'weight', got only []",
        ),
        (
            lambda: nn.SpectralNorm(nn.Linear(2, 3), dim=2).init_state(),
            ValueError,
            "SpectralNorm: expected dim in range for a weight (3, 2), got 2",
        ),
    ],
    ids=["stateful", "module", "no iterations", "eps", "no weight", "dim"],
)
def test_spectral_norm_refuses_what_it_cannot_normalise(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_spectral_norm_names_what_is_wrong_with_its_state():
    ours = nn.SpectralNorm(nn.Linear(2, 3))
    params = ours.init(random.key(0))
    with pytest.raises(KeyError, match=re.escape("SpectralNorm: expected state 'u', got only []")):
        ours(params, {}, torch.ones(2), train=True)
    with pytest.raises(ValueError, match=re.escape("SpectralNorm: state 'v': expected shape (columns=2,), got (3,)")):
        ours(params, {"u": torch.ones(3), "v": torch.ones(3)}, torch.ones(2), train=True)
