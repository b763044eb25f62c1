"""The U-Net against the same network as an ``nn.Module`` and against closed forms."""

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench.unet_module import UNetModule
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from functorch_gen import optim, random, tree
from functorch_gen.models import ResBlock, SpatialAttention, Stage, UNet
from functorch_gen.transforms import grad as fg_grad
from functorch_gen.typing import Params

F64 = torch.float64

TINY: dict[str, Any] = {
    "base_channels": 8,
    "channel_mults": (1, 2),
    "num_blocks": 1,
    "attention_levels": (1,),
    "num_heads": 2,
    "num_classes": 3,
    "num_groups": 4,
}


def assert_exact(actual: Any, expected: Any) -> None:
    """Equal in float64 up to another order of summation in a net some twenty layers deep."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def config(**changes: Any) -> dict[str, Any]:
    return TINY | changes


CONFIGS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "tiny": (TINY, (2, 1, 8, 8)),
    "no classes, no attention": (config(num_classes=None, attention_levels=()), (2, 1, 4, 4)),
    "one level": (config(channel_mults=(2,), attention_levels=(0,)), (2, 1, 5, 3)),
    "three levels, two blocks": (config(channel_mults=(1, 3, 2), num_blocks=2, embed_dim=6), (2, 1, 4, 8)),
    "colour": (config(attention_levels=(0, 1), time_scale=10.0), (1, 3, 32, 32)),
    "one pixel below": (TINY, (2, 1, 2, 2)),
}


def randomized(layer: Any, dtype: torch.dtype = F64) -> Params:
    """Initial parameters plus noise, so that those which start at zero count too."""

    def perturb(path: str, x: Tensor) -> Tensor:
        return (x + 0.1 * random.normal(random.key(zlib.crc32(path.encode())), x.shape)).to(dtype)

    return tree.map_with_path(perturb, layer.init(random.key(0)))


def inputs(shape: tuple[int, ...], num_classes: int | None = 3, dtype: torch.dtype = F64) -> tuple[Any, ...]:
    k_x, k_t = random.split(random.key(1))
    x, t = random.normal(k_x, shape, dtype=dtype), random.normal(k_t, shape[:1], dtype=dtype)
    return (x, t, None if num_classes is None else torch.arange(shape[0]) % (num_classes + 1))


def tiny(**changes: Any) -> tuple[UNet, Params]:
    unet = UNet(1, **config(**changes))
    return unet, randomized(unet)


def twin(sizes: dict[str, Any], channels: int, params: Params) -> UNetModule:
    module = UNetModule(channels, **sizes).double()
    module.load_state_dict(tree.names(params), strict=True)
    return module


@pytest.fixture(params=CONFIGS.values(), ids=list(CONFIGS))
def case(request: pytest.FixtureRequest) -> tuple[UNet, Params, UNetModule, tuple[Any, ...]]:
    sizes, shape = request.param
    unet = UNet(shape[1], **sizes)
    params = randomized(unet)
    return unet, params, twin(sizes, shape[1], params), inputs(shape, unet.num_classes)


# Against the module.


def test_unet_equals_module(case) -> None:
    unet, params, module, args = case
    assert_exact(unet(params, *args), module(*args))


def test_unet_gradients_equal_module(case) -> None:
    unet, params, module, (x, t, label) = case
    weights = random.normal(random.key(2), x.shape, dtype=F64)
    grads, x_grad = torch.func.grad(lambda p, x: (weights * unet(p, x, t, label)).sum(), (0, 1))(params, x)
    leaf = x.clone().requires_grad_()
    (weights * module(leaf, t, label)).sum().backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    assert_exact(tree.names(grads), expected)
    assert_exact(x_grad, leaf.grad)


def test_unet_channels_last_changes_the_layout_only() -> None:
    (plain, params), (unet, _) = tiny(), tiny(channels_last=True)
    args = inputs((2, 1, 8, 8))
    assert_exact(unet(params, *args), plain(params, *args))
    colour = UNet(3, **TINY, channels_last=True)
    y = colour(randomized(colour), *inputs((2, 3, 8, 8)))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
def test_unet_vmap_equals_batch(channels_last: bool) -> None:
    unet, params = tiny(channels_last=channels_last)
    args = inputs((3, 1, 8, 8))
    single = torch.func.vmap(lambda x, t, label: unet(params, x[None], t[None], label[None])[0])
    assert_exact(single(*args), unet(params, *args))


@pytest.mark.parametrize("channels_last", [False, True])
def test_unet_per_example_gradients_equal_loop(channels_last: bool) -> None:
    unet, params = tiny(channels_last=channels_last)
    args = inputs((3, 1, 4, 4))

    def loss(params: Params, *one: Tensor) -> Tensor:
        return unet(params, *[x[None] for x in one]).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(params, *args)
    loop = [torch.func.grad(loss)(params, *[x[i] for x in args]) for i in range(3)]
    assert_exact(together, tree.stack(loop))


def test_unet_jvp_equals_gradient_along_tangent() -> None:
    unet, params = tiny(channels_last=True)
    args = inputs((2, 1, 8, 8))
    tangent = tree.map(lambda x: random.normal(random.key(x.numel()), x.shape, dtype=F64), params)

    def loss(params: Params) -> Tensor:
        return unet(params, *args).square().mean()

    forward = torch.func.jvp(loss, (params,), (tangent,))[1]
    assert_exact(forward, tree.vdot(torch.func.grad(loss)(params), tangent))


def test_unet_hessian_vector_product_equals_difference_of_gradients() -> None:
    unet, params = tiny()
    args = inputs((2, 1, 4, 4))
    tangent = tree.map(lambda x: random.normal(random.key(x.numel()), x.shape, dtype=F64), params)
    grad = torch.func.grad(lambda params: unet(params, *args).square().mean())
    forward = torch.func.jvp(grad, (params,), (tangent,))[1]
    eps = 1e-5
    plus, minus = (grad(tree.add_scaled(params, tangent, step)) for step in (eps, -eps))
    difference = tree.scale(tree.sub(plus, minus), 0.5 / eps)
    # central differences: error O(eps^2) times the fourth derivative, and rounding 1e-16 / eps
    torch.testing.assert_close(forward, difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_unet_gradient_traces_to_one_graph(channels_last: bool) -> None:
    unet, params = tiny(channels_last=channels_last)
    x, t, label = inputs((2, 1, 8, 8))

    def step(params: Params, x: Tensor, t: Tensor, label: Tensor) -> Params:
        return torch.func.grad(lambda params: unet(params, x, t, label).square().mean())(params)

    graph = make_fx(step, tracing_mode="fake")(params, x, t, label)
    other = (2 * x, t + 1, (label + 1) % 4)
    assert_exact(graph(params, *other), step(params, *other))


def test_unet_compiles_without_graph_breaks() -> None:
    unet, params = tiny()
    args = inputs((2, 1, 4, 4))
    compiled = torch.compile(unet.__call__, fullgraph=True, backend="eager")
    assert_exact(compiled(params, *args), unet(params, *args))


# Rematerialisation.


@pytest.fixture(params=[0.0, 0.5], ids=["no dropout", "dropout"])
def remat_pair(request: pytest.FixtureRequest) -> tuple[Params, list[Callable[[Params], Tensor]]]:
    """Parameters, and the loss as a function of them with and without rematerialisation."""
    args, params = inputs((2, 1, 8, 8)), tiny()[1]

    def make(unet: UNet) -> Callable[[Params], Tensor]:
        return lambda params: unet(params, *args, key=random.key(5)).square().mean()

    return params, [make(tiny(dropout=request.param, remat=on)[0]) for on in (True, False)]


def test_remat_draws_the_same_parameters() -> None:
    plain, forgetful = UNet(1, **TINY), UNet(1, **config(remat=True))
    assert tree.equal(forgetful.init(random.key(0)), plain.init(random.key(0)))


@pytest.mark.parametrize("grad", [fg_grad, torch.func.grad])
def test_remat_changes_no_gradient(remat_pair, grad) -> None:
    params, (forgetful, plain) = remat_pair
    assert_exact(grad(forgetful)(params), grad(plain)(params))


def test_remat_changes_no_forward_derivative(remat_pair) -> None:
    params, (forgetful, plain) = remat_pair
    tangent = tree.map(torch.cos, params)
    forward, expected = (torch.func.jvp(loss, (params,), (tangent,)) for loss in (forgetful, plain))
    assert_exact(forward, expected)


def test_remat_changes_no_vmap() -> None:
    (plain, params), (forgetful, _) = tiny(), tiny(remat=True)
    args = inputs((3, 1, 4, 4))
    per_example = [
        torch.func.vmap(lambda x, t, label, unet=unet: unet(params, x[None], t[None], label[None]))(*args)
        for unet in (forgetful, plain)
    ]
    assert_exact(*per_example)


def test_remat_gradient_traces_to_one_graph() -> None:
    (plain, params), (forgetful, _) = tiny(), tiny(remat=True)
    args = inputs((2, 1, 8, 8))

    def gradient(unet: UNet) -> Callable[[Params], Params]:
        return torch.func.grad(lambda params: unet(params, *args).square().mean())

    graph = make_fx(gradient(forgetful), tracing_mode="fake", _allow_non_fake_inputs=True)(params)
    other = tree.scale(params, 0.5)
    assert_exact(graph(other), gradient(plain)(other))


def test_remat_keeps_less_than_half_for_the_backward_pass() -> None:
    args = inputs((8, 1, 8, 8))

    def kept(unet: UNet, params: Params) -> int:
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaves = tree.map(lambda x: x.clone().requires_grad_(), params)
        owned = {x.untyped_storage().data_ptr() for x in tree.leaves(leaves)}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = unet(leaves, *args).square().mean()
        assert loss.requires_grad
        return sum(size for at, size in storages.items() if at not in owned)

    assert kept(*tiny(remat=True)) < kept(*tiny()) / 2


# Facts.


def test_unet_starts_at_zero() -> None:
    unet = UNet(1, **TINY)
    y = unet(unet.init(random.key(0)), *inputs((2, 1, 8, 8), dtype=torch.float32))
    assert y.shape == (2, 1, 8, 8)
    assert not y.any()


@pytest.mark.parametrize("num_heads", [0, 2])
def test_res_block_starts_as_the_identity(num_heads: int) -> None:
    block = ResBlock(8, 8, embed_dim=3, num_heads=num_heads)
    x = random.normal(random.key(0), (2, 8, 4, 4))
    assert torch.equal(block(block.init(random.key(1)), x, torch.ones(2, 3)), x)


def test_unet_without_label_equals_null_label() -> None:
    unet, params = tiny()
    x, t, _ = inputs((2, 1, 4, 4))
    assert torch.equal(unet(params, x, t), unet(params, x, t, torch.tensor([3, 3])))
    assert not torch.equal(unet(params, x, t), unet(params, x, t, torch.tensor([3, 0])))


def test_unet_takes_int32_labels() -> None:
    unet, params = tiny()
    x, t, label = inputs((2, 1, 4, 4))
    assert torch.equal(unet(params, x, t, label.int()), unet(params, x, t, label))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unet_output_has_dtype_of_input(dtype: torch.dtype) -> None:
    unet, params = tiny()
    x, t, label = inputs((2, 1, 8, 8))
    y = unet(tree.cast(params, dtype), x.to(dtype), t, label)
    assert y.dtype == dtype
    exact = unet(params, x, t, label)
    error = (y.double() - exact).norm() / exact.norm()
    assert error < 30 * torch.finfo(dtype).eps  # some twenty layers, each rounds a few times


def test_unet_parameter_count_is_closed_form() -> None:
    unet = UNet(3, base_channels=16, channel_mults=(1, 2), num_blocks=2, num_classes=10)

    def conv(c_in: int, c_out: int, k: int = 3) -> int:
        return k * k * c_in * c_out + c_out

    def block(c_in: int, c: int, attend: bool) -> int:
        attention = 2 * c + 3 * (c * c + c) + c * c + c if attend else 0
        skip = 0 if c_in == c else conv(c_in, c, 1)
        return 2 * c_in + conv(c_in, c) + 64 * 2 * c + 2 * c + 2 * c + conv(c, c) + skip + attention

    embedding = 16 * 64 + 64 + 64 * 64 + 64 + 11 * 64
    level0 = 2 * block(16, 16, False) + 2 * block(32, 16, False)
    level1 = 2 * block(32, 32, True) + 2 * block(64, 32, True)
    middle = block(32, 32, True) + block(32, 32, False)
    between = conv(16, 32) + conv(32, 16)
    total = embedding + conv(3, 16) + level0 + level1 + middle + between + 2 * 16 + conv(16, 3)
    assert tree.size(unet.init(random.key(0))) == total


def test_unet_equal_blocks_draw_different_parameters() -> None:
    params = UNet(1, **config(num_blocks=2)).init(random.key(0))
    first, second = (params["down0"][name]["conv1"]["weight"] for name in ("block0", "block1"))
    assert not (first == second).any()


def test_unet_factor_and_channels() -> None:
    unet = UNet(1, base_channels=8, channel_mults=(1, 2, 4), attention_levels=())
    assert (unet.levels, unet.factor, unet.channels) == (3, 4, (8, 16, 32))


def test_unet_lists_become_tuples() -> None:
    assert hash(UNet(1, **config(channel_mults=[1, 2], attention_levels=[1]))) == hash(UNet(1, **TINY))


def test_spatial_attention_commutes_with_permuted_pixels() -> None:
    layer = SpatialAttention(8, 2)
    params = randomized(layer)
    x = random.normal(random.key(0), (2, 8, 3, 4), dtype=F64)
    order = random.permutation(random.key(1), 12)

    def permuted(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].unflatten(2, (3, 4))

    assert_exact(layer(params, permuted(x)), permuted(layer(params, x)))


def test_stage_concatenates_last_skip_first() -> None:
    stage = Stage((ResBlock(16, 8, 3), ResBlock(16, 8, 3)))
    params = randomized(stage)
    x, a, b = random.normal(random.key(0), (3, 2, 8, 4, 4), dtype=F64)
    embed = torch.ones(2, 3, dtype=F64)
    first = stage.blocks[0](params["block0"], torch.cat([x, b], 1), embed)
    second = stage.blocks[1](params["block1"], torch.cat([first, a], 1), embed)
    assert_exact(stage(params, x, embed, [a, b]), [first, second])


# Dropout.


def test_res_block_whose_units_all_drop_is_skip_plus_bias() -> None:
    block = ResBlock(8, 16, embed_dim=3, dropout=1.0)
    params = randomized(block)
    x = random.normal(random.key(0), (2, 8, 4, 4), dtype=F64)
    skip = torch.conv2d(x, params["skip"]["weight"], params["skip"]["bias"])
    y = block(params, x, torch.ones(2, 3, dtype=F64), key=random.key(1))
    assert_exact(y, skip + params["conv2"]["bias"][:, None, None])


def test_unet_drops_only_with_a_key() -> None:
    (plain, params), (unet, _) = tiny(), tiny(dropout=0.5)
    args = inputs((2, 1, 8, 8))
    assert torch.equal(unet(params, *args), plain(params, *args))
    assert torch.equal(plain(params, *args, key=random.key(0)), plain(params, *args))
    first, again, other = (unet(params, *args, key=random.key(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unet_without_time_is_the_one_whose_embedding_modulates_nothing() -> None:
    """Segmentation: an image in, logits for each pixel out; the timed net with scale and shift 0 is the same."""
    timed = UNet(3, **config(num_classes=None))
    segment = UNet(3, **config(num_classes=None), out_channels=3, timed=False)
    params = randomized(segment)
    modulated = randomized(timed)
    silent = {path: torch.zeros_like(x) for path, x in tree.names(modulated).items() if ".embed." in path}
    both = tree.from_names(tree.names(modulated) | tree.names(params) | silent, like=modulated)
    x, t = inputs((2, 3, 8, 8), None)[:2]
    assert silent
    assert not any("embed" in path or "time" in path for path in tree.names(params))
    assert_exact(segment(params, x), timed(both, x, t))


def test_unet_learns_to_segment() -> None:
    """Every pixel's class from the image: which of two channels is brighter, in the mean of its neighbours."""
    net = UNet(2, **config(num_classes=None), out_channels=2, timed=False)
    x = random.normal(random.key(3), (8, 2, 8, 8))
    smooth = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    label = smooth.argmax(1)

    def loss(params: Params) -> Tensor:
        return torch.nn.functional.cross_entropy(net(params, x), label)

    params, tx = net.init(random.key(0)), optim.adam(1e-2)
    opt_state = tx.init(params)
    for _ in range(60):
        updates, opt_state = tx.update(fg_grad(loss)(params), opt_state, params)
        params = optim.apply_updates(params, updates)
    assert (net(params, x).argmax(1) == label).double().mean() > 0.95


def test_unet_without_time_refuses_one() -> None:
    net = UNet(1, **config(num_classes=None), timed=False)
    with pytest.raises(ValueError, match="UNet: t: expected None with timed=False"):
        net(net.init(random.key(0)), torch.zeros(1, 1, 8, 8), torch.zeros(1))
