"""Attention: kernels, masks, causality, grouped queries, dropout; every derivative, every stack of transforms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jacrev

from functorch_gen import nn, random, tree
from functorch_gen.transforms import grad, hessian, hvp, jacfwd, jit, jvp, remat, vmap
from tests.bench.attention import attention_times
from tests.bench.table import Options


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


Q, K, V = draw(2, 3, 4, 5, seed=1), draw(2, 3, 6, 5, seed=2), draw(2, 3, 6, 5, seed=3)
KEEP = random.bernoulli(random.key(4), 0.6, (2, 1, 4, 6)) | (torch.arange(6) == 2)
SHIFT = draw(4, 6, seed=5)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool": {"mask": KEEP},
    "additive": {"mask": SHIFT},
    "minus infinity": {"mask": torch.where(KEEP, SHIFT, -torch.inf)},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The definition: sums of exp(scale q.k + mask), without the guard against overflow."""
    scores = torch.einsum("...ld,...sd->...ls", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    allowed = torch.ones(scores.shape, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        allowed, scores = allowed & (mask > -math.inf), scores + torch.where(mask > -math.inf, mask, 0.0)
    if is_causal:
        allowed = allowed.tril()
    weights = torch.where(allowed, scores.exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("...ls,...se->...le", weights / torch.where(total > 0, total, 1.0), v)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for x, y in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# Values and first derivatives: torch's own.


@each_option
def test_attention_equals_scaled_dot_product_attention(options: dict[str, Any]) -> None:
    """Outputs and gradients to 1e-12 in float64."""
    torch_options = {{"mask": "attn_mask"}.get(name, name): value for name, value in options.items()}
    inputs = [x.clone().requires_grad_() for x in (Q, K, V)]
    y = F.scaled_dot_product_attention(*inputs, **torch_options)
    expected = torch.autograd.grad(y.sin().sum(), inputs)
    assert_close(grad(lambda *a: nn.attention(*a, **options).sin().sum(), (0, 1, 2))(Q, K, V), expected)
    assert_close(nn.attention(Q, K, V, **options), y.detach())


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (2, 1, 2, 1)], ids=str)
@pytest.mark.parametrize(("length", "keys"), [(4, 6), (6, 4)], ids=["more keys", "more queries"])
def test_attention_takes_any_leading_axes(leading: tuple[int, ...], length: int, keys: int) -> None:
    """And aligns query 0 with key 0, whatever the lengths."""
    q, k, v = draw(*leading, length, 5), draw(*leading, keys, 5, seed=1), draw(*leading, keys, 5, seed=2)
    assert_close(nn.attention(q, k, v, is_causal=True), written_out(q, k, v, is_causal=True))
    assert_close(nn.attention(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True))


@each_option
def test_attention_on_other_devices_runs_torchs_kernels(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """What a GPU computes, here on the CPU: gradients, under vmap, of the second order."""
    monkeypatch.setattr("functorch_gen.nn.attention_kernels._is_cpu", lambda x: False)
    fun = lambda attend: lambda *a: attend(*a, **{**options, "is_causal": True}).sin().sum()
    ours, theirs = fun(nn.attention), fun(written_out)
    assert_close(grad(ours, (0, 1, 2))(Q, K, V), grad(theirs, (0, 1, 2))(Q, K, V))
    assert_close(hvp(ours, (Q, K, V), T), hvp(theirs, (Q, K, V), T), 1e-10)
    batched = vmap(grad(ours, (0, 1, 2)))(*BATCHED)
    assert_close(batched, tree.stack([grad(theirs, (0, 1, 2))(*a) for a in zip(*BATCHED, strict=True)]), 1e-11)
    empty = nothing_for_row_1(additive=True)
    assert_close(grad(lambda q: nn.attention(q, K, V, empty).sin().sum())(Q)[..., 1, :], 0 * Q[..., 1, :])
    program = jit(grad(ours, (0, 1, 2)), backend="aten")
    assert_close(program(Q, K, V), grad(theirs, (0, 1, 2))(Q, K, V))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_option
def test_attention_on_a_gpu_equals_the_definition(options: dict[str, Any]) -> None:
    """float32: gradients and Hessian products to what its rounding leaves of sums of a hundred products."""
    on_gpu = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}
    inputs = tuple(x.float().cuda() for x in (Q, K, V))
    ours = lambda *a: nn.attention(*a, **on_gpu).sin().sum()
    theirs = lambda *a: written_out(*a, **options).sin().sum()
    found = [x.double().cpu() for x in (*grad(ours, (0, 1, 2))(*inputs), *hvp(ours, inputs, inputs))]
    assert_close(found, [*grad(theirs, (0, 1, 2))(Q, K, V), *hvp(theirs, (Q, K, V), (Q, K, V))], 1e-4)


def test_attention_broadcasts_leading_axes() -> None:
    expected = written_out(Q, K[:1].expand_as(K), V[:, :1].expand_as(V))
    assert_close(nn.attention(Q, K[0], V[:, :1]), expected)


@pytest.mark.parametrize("width", [3, 8])
def test_attention_takes_values_of_another_width(width: int) -> None:
    v = draw(2, 3, 6, width)
    assert_close(nn.attention(Q, K, v, mask=KEEP), F.scaled_dot_product_attention(Q, K, v, KEEP))


def test_attention_with_grouped_queries_equals_torch() -> None:
    q, k, v = draw(2, 6, 4, 5), draw(2, 3, 6, 5, seed=1), draw(2, 3, 6, 5, seed=2)
    fun = lambda attend: grad(lambda *a: attend(*a).sin().sum(), (0, 1, 2))(q, k, v)
    assert_close(fun(nn.attention), fun(lambda *a: F.scaled_dot_product_attention(*a, enable_gqa=True)))


def test_attention_with_one_head_of_keys_serves_all_queries() -> None:
    assert_close(nn.attention(Q, K[:, :1], V[:, :1]), written_out(Q, K[:, :1].expand_as(K), V[:, :1].expand_as(V)))


def test_attention_combines_a_mask_with_causality() -> None:
    causal = torch.ones(4, 6, dtype=torch.bool).tril()
    keep = KEEP | (torch.arange(6) == 0)
    expected = F.scaled_dot_product_attention(Q, K, V, attn_mask=keep & causal)
    assert_close(nn.attention(Q, K, V, keep, is_causal=True), expected)


def test_attention_takes_strided_inputs() -> None:
    """Heads that stand behind the positions in memory, as projections leave them; a last axis that is not dense."""
    q, k = Q.transpose(1, 2).contiguous().transpose(1, 2), K.mT.contiguous().mT
    assert_close(nn.attention(q, k, V[:1].expand_as(V)), written_out(Q, K, V[:1].expand_as(V)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_is_as_exact_as_torchs_in_lower_precision(dtype: torch.dtype) -> None:
    """Errors of the gradient, against float64, of at most twice torch's own."""
    q, k, v = (x.to(dtype) for x in (Q, K, V))

    def error(attend: Callable[..., Tensor]) -> float:
        found = grad(lambda *a: attend(*a).double().sin().sum(), (0, 1, 2))(q, k, v)
        exact = grad(lambda *a: written_out(*a).sin().sum(), (0, 1, 2))(q.double(), k.double(), v.double())
        assert all(x.dtype == dtype for x in found)
        return max(float((x.double() - y).abs().max()) for x, y in zip(found, exact, strict=True))

    assert error(nn.attention) <= 2 * error(F.scaled_dot_product_attention)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_in_half_precision_has_second_derivatives_and_a_float32_mask(dtype: torch.dtype) -> None:
    """To a few of the dtype's own rounding errors of numbers near one."""
    inputs = tuple(x.to(dtype) for x in (Q, K, V))
    found = hvp(lambda *a: nn.attention(*a, SHIFT.float()).double().sin().sum(), inputs, inputs)
    exact = hvp(lambda *a: written_out(*a, SHIFT).sin().sum(), (Q, K, V), (Q, K, V))
    assert_close([x.double() for x in found], exact, 20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("empty", [(0, 4, 6), (2, 0, 6), (2, 4, 0)], ids=["batch", "queries", "keys"])
def test_attention_over_an_empty_axis_is_zero(empty: tuple[int, int, int]) -> None:
    """torch's kernel would end the process."""
    b, length, keys = empty
    y = nn.attention(draw(b, 3, length, 5), draw(b, 3, keys, 5), draw(b, 3, keys, 5))
    assert torch.equal(y, torch.zeros(b, 3, length, 5, dtype=torch.float64))


# Queries that may attend to nothing.


def nothing_for_row_1(*, additive: bool) -> Tensor:
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[1] = False
    return torch.where(keep, 0.0, -torch.inf).double() if additive else keep


@pytest.mark.parametrize("additive", [False, True])
def test_query_without_any_key_gets_zeros_and_zero_gradients(additive: bool) -> None:
    mask = nothing_for_row_1(additive=additive)
    y = nn.attention(Q, K, V, mask=mask)
    others = torch.tensor([0, 2, 3])
    assert torch.equal(y[..., 1, :], torch.zeros(2, 3, 5, dtype=torch.float64))
    assert_close(y[..., others, :], nn.attention(Q, K, V)[..., others, :])
    for gradient in grad(lambda *a: nn.attention(*a, mask=mask)[..., 1, :].sum(), (0, 1, 2))(Q, K, V):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("additive", [False, True])
def test_query_without_any_key_leaves_all_derivatives_finite(additive: bool) -> None:
    mask = nothing_for_row_1(additive=additive)
    for order in DERIVATIVES.values():
        assert_close(order(lambda *a: nn.attention(*a, mask)), order(lambda *a: written_out(*a, mask)), 1e-10)


def test_additive_mask_that_excludes_a_row_has_zero_derivatives_there() -> None:
    mask = nothing_for_row_1(additive=True)
    gradient = grad(lambda m: nn.attention(Q, K, V, m).sin().sum())(mask)
    expected = grad(lambda m: written_out(Q, K, V, m).sin().sum())(mask)
    assert torch.equal(gradient[1], torch.zeros(6, dtype=torch.float64))
    assert_close(gradient, expected)


# Derivatives of every order, of the definition.

Attend = Callable[..., Tensor]
T = (draw(*Q.shape, seed=11), draw(*K.shape, seed=12), draw(*V.shape, seed=13))


def scalar(attend: Attend) -> Callable[..., Tensor]:
    return lambda *a: attend(*a).sin().sum()


def along(attend: Attend, i: int) -> Callable[..., Tensor]:
    """The derivative of the scalar along direction i, as a function of the inputs."""

    def slope(*a: Tensor) -> Tensor:
        return jvp(lambda x: scalar(attend)(*a[:i], x, *a[i + 1 :]), (a[i],), (T[i],))[1]

    return slope


def slope_of_gradient(attend: Attend) -> Callable[..., Tensor]:
    return lambda *a: tree.vdot(grad(scalar(attend), (0, 1, 2))(*a), T)


DERIVATIVES: dict[str, Callable[[Attend], Any]] = {
    "jvp": lambda f: jvp(f, (Q, K, V), T),
    "jvp of q alone": lambda f: jvp(lambda q: f(q, K, V), (Q,), T[:1]),
    "jvp of v alone": lambda f: jvp(lambda v: f(Q, K, v), (V,), T[2:]),
    "grad of grad": lambda f: grad(slope_of_gradient(f), (0, 1, 2))(Q, K, V),
    "hvp": lambda f: hvp(scalar(f), (Q, K, V), T),
    "grad of jvp": lambda f: [grad(along(f, i), (0, 1, 2))(Q, K, V) for i in range(3)],
    "jvp of jvp": lambda f: jvp(along(f, 0), (Q, K, V), T)[1],
    "hessian": lambda f: hessian(lambda q: scalar(f)(q, K[:1, :1], V[:1, :1]))(Q[:1, :1]),
    "jacfwd of grad": lambda f: jacfwd(lambda k: grad(scalar(f))(Q[:1, :1], k, V[:1, :1]))(K[:1, :1]),
    "jacrev": lambda f: jacrev(lambda k: f(Q[:1, :1], k, V[:1, :1]))(K[:1, :1]),
    "grad of grad of grad": lambda f: grad(lambda *a: grad(slope_of_gradient(f))(*a).square().sum(), (1, 2))(Q, K, V),
    "hvp of remat": lambda f: hvp(remat(scalar(f)), (Q, K, V), T),
}


def masked_for(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Some derivatives are taken of the first example alone."""
    mask = options.get("mask")
    alone = name in ("hessian", "jacfwd of grad", "jacrev")
    return {**options, "mask": mask[:1]} if alone and mask is not None and mask.ndim == 4 else options


@each_option
@pytest.mark.parametrize("name", DERIVATIVES)
def test_attention_has_every_derivative(name: str, options: dict[str, Any]) -> None:
    """To 1e-10; third derivatives are sums of thousands of products."""
    options = masked_for(name, options)
    found, expected = (DERIVATIVES[name](lambda *a, f=f: f(*a, **options)) for f in (nn.attention, written_out))
    assert_close(found, expected, 1e-10)


MASKS = {
    "all axes": draw(2, 3, 4, 6),
    "of a query": SHIFT[:, :1],
    "of a key": draw(2, 1, 1, 6),
    "minus infinity": torch.where(KEEP, SHIFT, -torch.inf),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
def test_additive_mask_has_every_derivative(mask: Tensor) -> None:
    """A learned position bias. Directions are zero where the mask is minus infinity."""
    t = torch.where(mask > -torch.inf, draw(*mask.shape, seed=14), 0.0)
    q_and_mask, m = (Q, mask), lambda f: lambda mask: f(Q, K, V, mask).sin().sum()
    orders: list[Callable[[Attend], Any]] = [
        lambda f: grad(m(f))(mask),
        lambda f: jvp(lambda mask: f(Q, K, V, mask), (mask,), (t,)),
        lambda f: hvp(m(f), (mask,), (t,)),
        lambda f: jvp(grad(lambda q, mask: f(q, K, V, mask).sin().sum()), q_and_mask, (T[0], t)),
        lambda f: grad(lambda mask: grad(lambda q: f(q, K, V, mask).sin().sum())(Q).square().sum())(mask),
        lambda f: grad(lambda q: grad(lambda mask: f(q, K, V, mask).sin().sum())(mask).square().sum())(Q),
    ]
    for order in orders:
        assert_close(order(nn.attention), order(written_out), 1e-10)


def test_plain_autograd_differentiates_twice() -> None:
    """create_graph=True, without any transform."""
    q = Q.clone().requires_grad_()
    (first,) = torch.autograd.grad(nn.attention(q, K, V).sin().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad((first * T[0]).sum(), q)
    assert_close(second, hvp(lambda q: written_out(q, K, V).sin().sum(), (Q,), (T[0],)), 1e-10)


def test_plain_forward_mode_passes_through_the_backward_pass() -> None:
    """A dual number of torch.autograd.forward_ad, and a gradient without a graph of it."""
    with forward_ad.dual_level():
        q = forward_ad.make_dual(Q.clone().requires_grad_(), T[0])
        (first,) = torch.autograd.grad(nn.attention(q, K, V).sin().sum(), q)
        tangent = forward_ad.unpack_dual(first).tangent
    assert_close(tangent, hvp(lambda q: written_out(q, K, V).sin().sum(), (Q,), (T[0],)), 1e-10)


def test_attention_takes_what_a_finished_transform_left_behind() -> None:
    x, left = Q.clone().requires_grad_(), []

    def leak(y: Tensor) -> Tensor:
        left.append(2 * y)
        return y.sum()

    torch.func.grad(leak)(x)
    (found,) = torch.autograd.grad(nn.attention(left[0], K, V).sin().sum(), x)
    assert_close(found, grad(lambda x: written_out(2 * x, K, V).sin().sum())(Q))


# vmap, without torch's warning of a slow fallback: warnings are errors here.

BATCHED = (draw(3, *Q.shape, seed=21), draw(3, *K.shape, seed=22), draw(3, *V.shape, seed=23))
MASKED = torch.where(random.bernoulli(random.key(24), 0.7, (3, 2, 1, 4, 6)), draw(3, 1, 3, 4, 6), -torch.inf)
MAPPED = [(0, None, None, None), (None, 0, None, None), (None, None, 0, None), (None, None, None, 0), (0, 0, 0, 0)]


@pytest.mark.parametrize("dims", MAPPED, ids=["q", "k", "v", "mask", "all"])
def test_vmap_over_any_argument_is_a_loop(dims: tuple[int | None, ...]) -> None:
    """Value, gradient and Hessian product, for each of three examples."""
    given = [x if dim == 0 else x[0] for x, dim in zip((*BATCHED, MASKED), dims, strict=True)]

    def all_orders(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        fun = lambda *a: nn.attention(*a, mask, is_causal=True).sin().sum()
        return fun(q, k, v), grad(fun, (0, 1, 2))(q, k, v), hvp(fun, (q, k, v), T)

    one = [[x[i] if dim == 0 else x for x, dim in zip(given, dims, strict=True)] for i in range(3)]
    assert_close(vmap(all_orders, dims)(*given), tree.stack([all_orders(*a) for a in one]), 1e-11)


def test_vmap_of_vmap_is_two_loops() -> None:
    q, k = BATCHED[0][:2], BATCHED[1]
    fun = grad(lambda q, k: nn.attention(q, k, V, KEEP).sin().sum(), (0, 1))
    expected = tree.stack([tree.stack([fun(q[i], k[j]) for j in range(3)]) for i in range(2)])
    assert_close(vmap(vmap(fun, (None, 0)), (0, None))(q, k), expected, 1e-11)


def test_vmap_over_the_additive_mask_has_its_gradient() -> None:
    masks = draw(3, 1, 4, 6)
    fun = grad(lambda mask: nn.attention(Q, K, V, mask).sin().sum())
    assert_close(vmap(fun)(masks), torch.stack([fun(mask) for mask in masks]), 1e-11)


def test_vmap_over_another_axis() -> None:
    found = vmap(lambda k: nn.attention(Q, k, V), in_dims=2, out_dims=1)(BATCHED[1].movedim(0, 2))
    assert_close(found, torch.stack([nn.attention(Q, k, V) for k in BATCHED[1]], 1))


# Compiled.

KERNELS = ("_scaled_dot_product_flash_attention_for_cpu(", "_scaled_dot_product_flash_attention_for_cpu_backward(")


def loss(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return nn.attention(q, k, v, mask, is_causal=True).sin().sum()


GRADIENT = grad(loss, (0, 1, 2))


@pytest.mark.parametrize(
    ("fun", "args"),
    [(GRADIENT, (Q, K, V, KEEP)), (vmap(GRADIENT, (0, 0, 0, None)), (*BATCHED, KEEP))],
    ids=["grad", "vmap(grad)"],
)
def test_jit_keeps_both_kernels_for_a_first_derivative(fun: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    lowered = jit(fun, backend="aten").lower(*args)
    assert [lowered.text().count(kernel) for kernel in KERNELS] == [1, 1]
    assert "softmax" not in lowered.text()
    assert_close(jit(fun, backend="aten")(*args), fun(*args))


def test_jit_of_a_hessian_product_uses_formulas() -> None:
    fun = jit(lambda mask, *a: hvp(lambda *a: loss(*a, mask), a, T), backend="aten")
    assert "softmax" in fun.lower(KEEP, Q, K, V).text()
    expected = hvp(lambda *a: written_out(*a, KEEP, is_causal=True).sin().sum(), (Q, K, V), T)
    assert_close(fun(KEEP, Q, K, V), expected, 1e-10)


COMPILED = {
    "value": loss,
    "grad": GRADIENT,
    "jvp": lambda *a: jvp(lambda q: loss(q, *a[1:]), a[:1], T[:1]),
    "hvp": lambda *a: hvp(lambda q: loss(q, *a[1:]), a[:1], T[:1]),
    "vmap(grad)": lambda q, k, v, mask: vmap(GRADIENT, (0, 0, 0, None))(q[:, None], k[:, None], v[:, None], mask[:1]),
}


@pytest.mark.parametrize("fun", COMPILED.values(), ids=list(COMPILED))
def test_torch_compile_traces_the_whole_function(fun: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fun, fullgraph=True, backend="aot_eager")
    assert_close(compiled(Q, K, V, KEEP), fun(Q, K, V, KEEP), 1e-11)


def test_torch_compile_of_a_module_differentiates_through_the_kernel() -> None:
    torch._dynamo.reset()
    inputs = [x.clone().requires_grad_() for x in (Q, K, V)]
    y = torch.compile(lambda *a: nn.attention(*a, KEEP).sin().sum(), fullgraph=True, backend="aot_eager")(*inputs)
    expected = grad(lambda *a: written_out(*a, KEEP).sin().sum(), (0, 1, 2))(Q, K, V)
    assert_close(torch.autograd.grad(y, inputs), expected)


# Errors.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": draw(2, 3, 6, 4)}, ValueError, r"attention: k: expected shape \(..., s, d=5\), got \(2, 3, 6, 4\)"),
        ({"v": draw(2, 3, 5, 5)}, ValueError, r"attention: v: expected shape \(..., s=6, e\)"),
        ({"q": draw(5)}, ValueError, r"attention: q: expected shape \(..., l, d\), got \(5,\)"),
        ({"k": K.float()}, TypeError, "expected k and v of q's dtype torch.float64, got torch.float32"),
        ({"q": Q.long(), "k": K.long(), "v": V.long()}, TypeError, "attention: q: expected a floating-point tensor"),
        ({"k": K[:, :2], "v": V[:, :2]}, ValueError, "expected the 3 heads of q divisible by those of k, got 2"),
        ({"k": draw(4, 3, 6, 5)}, ValueError, "expected leading axes of q, k and v that broadcast"),
        ({"mask": KEEP[..., :5]}, ValueError, r"mask: expected a shape that broadcasts to \(2, 3, 4, 6\), got"),
        ({"mask": KEEP.long()}, TypeError, "mask: expected bool or floating numbers, got torch.int64"),
    ],
    ids=["width", "keys", "axes", "dtype", "integers", "heads", "leading", "mask", "mask's dtype"],
)
def test_attention_names_what_does_not_fit(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    inputs = {"q": Q, "k": K, "v": V, "mask": None, **change}
    with pytest.raises(error, match=message):
        nn.attention(inputs["q"], inputs["k"], inputs["v"], inputs["mask"])


# Dropout.


def test_attention_dropout_keeps_the_mean() -> None:
    """4,000 draws; the spread of the mean of each element is below 0.02, five of them 0.1."""
    keys = random.split(random.key(0), 4000)
    y = vmap(lambda key: nn.attention(Q, K, V, dropout=0.2, key=key))(keys)
    error = y.std(0) / 4000**0.5
    assert ((y.mean(0) - nn.attention(Q, K, V)).abs() < 5 * error).all()


# The benchmark.


def test_benchmark_of_attention_times_both_forms() -> None:
    table = attention_times(Options(rounds=1), {"small": {"shape": (1, 2, 3, 4), "is_causal": True}})
    assert table.rows.keys() == {"fg.nn.attention, small", "F.scaled_dot_product_attention, small"}
    assert not table.failures
