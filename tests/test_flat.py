"""The flat state: the step on vectors against the step on trees, and the layout against torch's own indexing."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import functorch_gen as fg
from functorch_gen import ema, optim, random, tree
from functorch_gen.optim import Flat, Layout
from functorch_gen.step import init_state, make_step
from functorch_gen.train import fit
from functorch_gen.transforms.tracing.backends import _mode
from functorch_gen.transforms.tracing.decompose import decompose
from functorch_gen.transforms.tracing.elementwise import batches
from functorch_gen.transforms.tracing.graph import value
from functorch_gen.transforms.tracing.partition import Partition
from functorch_gen.typing import Tree

KEY = random.key(0)
ROUNDING = 1e-12  # float64: sums over the vector are ordered otherwise than sums over leaves


def normal(seed, *shape, dtype=torch.float64):
    return random.normal(random.key(seed), shape, torch.float64).to(dtype)


def new_params(dtype=torch.float64):
    hidden = {"weight": normal(1, 5, 3, dtype=dtype), "bias": normal(2, 5, dtype=dtype)}
    return {"hidden": hidden, "head": [normal(3, 1, 5, dtype=dtype), normal(4, dtype=dtype)]}


def loss_of(params, key, batch):
    noise = 0.1 * random.normal(key, batch["x"].shape, torch.float64)
    (weight, bias), hidden = params["head"], params["hidden"]
    h = torch.tanh((batch["x"] + noise).to(hidden["weight"].dtype) @ hidden["weight"].T + hidden["bias"])
    return (h.to(weight.dtype) @ weight.T + bias - batch["y"]).square().mean()


def new_batch(n):
    return {"x": normal(100 + n, 8, 3), "y": normal(200 + n, 8, 1)}


def as_tree(x):
    """Any state with its vectors as trees."""
    if isinstance(x, Flat):
        return x.tree()
    if isinstance(x, tuple):
        return type(x)(*map(as_tree, x)) if hasattr(x, "_fields") else tuple(map(as_tree, x))
    return x


def run(step, train_state, steps=5):
    metrics = []
    for n in range(steps):
        train_state, values = step(train_state, new_batch(n))
        metrics.append(values)
    return train_state, metrics


def pair(tx, params=None, mean=None, state=None, loss=loss_of, **options):
    """The last state and the metrics of five steps, on trees and on vectors."""
    results = []
    for flat in (False, True):
        step = make_step(loss, tx, mean, flat=flat, **options)
        params = new_params() if params is None else params
        last, metrics = run(step, init_state(params, tx, KEY, state, mean, flat=flat))
        results.append((as_tree(last), metrics))
    return results


SCHEDULE = optim.warmup_cosine_decay_schedule(0.0, 0.1, 2, 5)
OPTIMIZERS = {
    "sgd": optim.sgd(0.1),
    "momentum": optim.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optim.adam(0.05),
    "adamw": optim.adamw(0.05, weight_decay=0.3),
    "schedule": optim.adamw(SCHEDULE, weight_decay=0.3),
    "clip": optim.chain(optim.clip_by_global_norm(0.1), optim.adam(0.05)),
    "clip-elements": optim.chain(optim.clip(0.01), optim.sgd(0.1)),
    "glob": optim.adamw(0.05, weight_decay=0.3, mask="*.weight"),
    "mask-tree": optim.adamw(0.05, mask={"hidden": {"weight": True, "bias": False}, "head": [True, False]}),
    "mask-function": optim.adamw(0.05, weight_decay=0.3, mask=lambda p: tree.map(lambda x: x.ndim > 1, p)),
    "flatten": optim.chain(optim.clip_by_global_norm(0.1), optim.flatten(optim.adamw(0.05, mask="*.weight"))),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flat_step_equals_the_step_of_trees(name):
    """``optim.flatten`` inside keeps vectors in the state of trees too: there parameters and average are compared."""
    mean = ema.warmup(0.9)
    (trees, metrics), (flat, flat_metrics) = pair(OPTIMIZERS[name], mean=mean)
    if name == "flatten":
        trees, flat = trees._replace(opt_state=()), flat._replace(opt_state=())
    assert tree.allclose(flat, trees, rtol=ROUNDING, atol=ROUNDING)
    assert tree.allclose(flat_metrics, metrics, rtol=ROUNDING)


def test_flat_step_of_several_dtypes_equals_the_step_of_trees():
    """bfloat16 parameters have float32 moments; all is element-wise but the norm, in float32 for both forms."""
    params = {**new_params(), "hidden": new_params(torch.bfloat16)["hidden"]}
    tx = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.05, mask="hidden.*"))
    (trees, _), (flat, _) = pair(tx, params, ema.constant(0.9))
    assert tree.allclose(flat, trees, rtol=1e-5, atol=1e-7)  # float32 norms; one bfloat16 rounding apart is 4e-3
    train_state = init_state(params, tx, KEY, flat=True)
    moments = train_state.opt_state[1][0].mu.vectors
    assert {name: x.dtype for name, x in train_state.params.vectors.items()} == {
        "bfloat16": torch.bfloat16,
        "float64": torch.float64,
    }
    assert {name: x.dtype for name, x in moments.items()} == {"bfloat16": torch.float32, "float64": torch.float64}


@pytest.mark.parametrize("has_aux", [False, True])
def test_flat_step_takes_stateful_losses(has_aux):
    def loss_fn(params, state, key, batch):
        state = {"total": state["total"] + params["head"][1].detach()}
        loss = loss_of(params, key, batch) + 0.1 * state["total"]
        return loss, ((state, {"y": batch["y"]}) if has_aux else state)

    state = {"total": torch.zeros((), dtype=torch.float64)}
    (trees, metrics), (flat, flat_metrics) = pair(
        optim.adam(0.05), state=state, loss=loss_fn, stateful=True, has_aux=has_aux
    )
    assert tree.allclose(flat, trees, rtol=ROUNDING, atol=ROUNDING)
    assert tree.allclose(flat_metrics, metrics, rtol=ROUNDING)


def test_flat_state_holds_one_vector_of_each_kind():
    tx, mean = optim.adam(0.1), ema.constant(0.9)
    train_state = init_state(new_params(), tx, KEY, ema=mean, flat=True)
    long = [path for path, x in tree.names(train_state).items() if x.numel() > 2]
    assert long == [
        "params.vectors.float64",
        "opt_state.0.mu.vectors.float64",
        "opt_state.0.nu.vectors.float64",
        "ema.average.vectors.float64",
    ]


@pytest.mark.parametrize("flat", [False, True])
def test_step_of_a_state_in_the_other_form_is_an_error(flat):
    tx = optim.sgd(0.1)
    step, train_state = make_step(loss_of, tx, flat=flat), init_state(new_params(), tx, KEY, flat=not flat)
    with pytest.raises(TypeError, match=r"make_step: expected a train_state .*; give init_state and make_step"):
        step(train_state, new_batch(0))


# optim.flatten, bit for bit.

SHAPES = [(), (1,), (3,), (2, 2), (0,), (1, 2, 1), (17,), (5, 7), (33,), (2, 0)]
DECAYING = {
    "numbers": optim.adamw(1e-3, weight_decay=0.1),
    "all numbers": optim.adamw(0.01, b1=0.8, b2=0.95, eps=1e-3, eps_root=1e-4, weight_decay=0.3, mask="*[13579]*"),
    "schedule": optim.adamw(SCHEDULE, weight_decay=0.1),
}


def drawn(seed, shapes, dtype):
    """Leaves of these shapes in a nest, the first of them under a second path too."""
    leaves = [normal(seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    return {"list": leaves, "tied": (leaves[0], None), "nest": {"p1": {"weight": normal(seed, 2, 3, dtype=dtype)}}}


def runs_of(tx, shapes, dtype, seed, wrap=lambda update: update, steps=4):
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optim.apply_updates(params, updates), state

    update, params = wrap(update), drawn(seed, shapes, dtype)
    state, found = tx.init(params), []
    for step in range(steps):
        grads = tree.scale(drawn(1000 * (step + 1) + seed, shapes, dtype), 10.0 ** (step - 2))
        params, state = update(params, state, grads)
        found.append(params)
    return found


@given(st.lists(st.sampled_from(SHAPES), min_size=2, max_size=8), st.integers(0, 10**6), st.booleans())
def test_flatten_of_adamw_equals_adamw_bit_for_bit(shapes, seed, double):
    dtype = torch.float64 if double else torch.float32
    for name, tx in DECAYING.items():
        assert tree.equal(runs_of(optim.flatten(tx), shapes, dtype, seed), runs_of(tx, shapes, dtype, seed)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_jitted_flatten_of_adamw_equals_adamw_bit_for_bit(dtype, backend):
    for name in ("numbers", "all numbers"):
        wrap = lambda update: fg.jit(update, backend=backend)
        found, expected = [
            runs_of(tx, SHAPES, dtype, 7, wrap) for tx in (optim.flatten(DECAYING[name]), DECAYING[name])
        ]
        assert tree.equal(found, expected), name


# Compiled.

ALL = optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(SCHEDULE, weight_decay=0.3, mask="*.weight"))
MEAN = ema.constant(0.9)


def flat_run(wrap=lambda step: step):
    step = wrap(make_step(loss_of, ALL, MEAN, flat=True))
    return step, init_state(new_params(), ALL, KEY, ema=MEAN, flat=True)


def addresses(train_state):
    return [x.data_ptr() for x in tree.leaves(train_state)]


@pytest.mark.parametrize("backend", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_donated_flat_step_is_traced_once_and_runs_in_place(backend):
    expected, metrics = run(*flat_run())
    step, train_state = flat_run(lambda step: fg.jit(step, donate_argnums=0, backend=backend))
    before = addresses(train_state)
    found, found_metrics = run(step, train_state)
    assert step.traces == 1
    assert addresses(found) == before
    assert tree.allclose(found, expected, rtol=ROUNDING, atol=ROUNDING)
    assert tree.allclose(found_metrics, metrics, rtol=ROUNDING)


def test_flat_step_traces_without_copies_of_parameters():
    """In the graph the parameters are views; the gradients are joined once, the mask's constants once."""
    step, train_state = flat_run()
    graph = fg.jit(step, donate_argnums=0, backend="aten").lower(train_state, new_batch(0)).text()
    assert graph.count("aten.split_with_sizes(") == 1
    assert graph.count("aten.cat(") == 2
    assert not any(name in graph for name in ("aten.clone", "aten.copy_", "slice_scatter", "as_strided"))


def test_flat_update_compiles_to_loops_over_whole_vectors():
    """One loop for the norm, one that writes parameters, moments and average; the rest are loops over scalars."""
    tx = optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(1e-3, weight_decay=0.1))

    def update(state, grads):
        params, opt_state, mean = state
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optim.apply_updates(params, updates)
        return params, opt_state, MEAN.update(params, mean)[1]

    params: Tree = Layout.of([torch.ones(4096)]).ravel([torch.ones(4096)])
    state = (params, tx.init(params), MEAN.init(params))
    graph = fg.jit(update, donate_argnums=0).lower(state, tree.ones_like(params))._program._trace.graph
    fused = [u for u in Partition(decompose(graph, _mode(graph)).graph).units if u.fused]
    assert not batches(fused)[1]  # all are element-wise
    assert sum(any(value(n).numel() == 4096 for n in u.nodes) for u in fused) == 2


def test_flat_step_batches_over_an_ensemble():
    """The vectors of a batch of states have a leading dimension; so have the leaves."""

    def train(key):
        params = tree.map(lambda p: p * random.uniform(key, (), torch.float64), new_params())
        step = make_step(loss_of, ALL, MEAN, flat=True)
        return run(step, init_state(params, ALL, key, ema=MEAN, flat=True), 2)[0]

    keys = random.split(KEY, 3)
    together = fg.vmap(train)(keys)
    for i in range(3):
        alone = as_tree(train(keys[i]))
        assert tree.allclose(tree.map(lambda x, i=i: x[i], as_tree(together)), alone, rtol=1e-10, atol=ROUNDING)


def test_flat_step_is_differentiable():
    """The derivative of the loss after two steps with respect to the learning rate, by both forms."""

    def last_loss(rate, flat):
        tx = optim.adam(rate)
        step, train_state = make_step(loss_of, tx, flat=flat), init_state(new_params(), tx, KEY, flat=flat)
        return run(step, train_state, 3)[1][-1]["loss"]

    rate = torch.tensor(0.05, dtype=torch.float64)
    found, expected = fg.grad(lambda r: last_loss(r, True))(rate), fg.grad(lambda r: last_loss(r, False))(rate)
    assert torch.allclose(found, expected, rtol=1e-10)


def test_flat_step_traces_to_one_graph():
    step, train_state = flat_run()
    traced = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(train_state, new_batch(0))
    later, _ = step(train_state, new_batch(0))
    assert tree.allclose(traced(later, new_batch(1))[0], step(later, new_batch(1))[0], rtol=ROUNDING)


def test_flat_step_compiles_whole():
    step, train_state = flat_run()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert tree.allclose(compiled(train_state, new_batch(0))[0], step(train_state, new_batch(0))[0], rtol=ROUNDING)


def test_fit_takes_a_flat_state():
    step, train_state = flat_run(lambda step: fg.jit(step, donate_argnums=0, backend="aten"))
    train_state, history = fit(step, train_state, new_batch, steps=4, progress=False)
    expected, metrics = run(*flat_run(), 4)
    assert tree.allclose(train_state, expected, rtol=ROUNDING)
    assert history["loss"] == pytest.approx([values["loss"].item() for values in metrics], rel=ROUNDING)


def test_fit_of_a_flat_state_names_the_parameters_that_are_not_finite():
    step, train_state = flat_run()
    train_state.params.tree()["hidden"]["bias"][0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not finite after step 0: .*hidden\.bias"):
        fit(step, train_state, new_batch, steps=1, progress=False)


def test_flat_state_survives_pickle(tmp_path):
    """Whole, and as plain tensors by name."""
    step, train_state = flat_run()
    train_state, _ = run(step, train_state, 2)
    expected, _ = step(train_state, new_batch(2))
    assert tree.equal(step(pickle.loads(pickle.dumps(train_state)), new_batch(2))[0], expected)

    torch.save(tree.names(train_state), tmp_path / "state.pt")
    named = torch.load(tmp_path / "state.pt", weights_only=True)
    assert tree.equal(step(tree.from_names(named, like=flat_run()[1]), new_batch(2))[0], expected)


# The layout.


def test_layout_aligns_leaves_and_pads_with_zeros():
    params = new_params()
    flat = Layout.of(params, aligned=True).ravel(params)
    start = flat.vectors["float64"].data_ptr()
    offsets = [(x.data_ptr() - start) // x.element_size() for x in tree.leaves(flat.tree())]
    assert offsets == [0, 16, 32, 48]
    assert flat.vectors["float64"].shape == (64,)
    assert torch.allclose(flat.vectors["float64"].norm(), torch.nn.utils.get_total_norm(tree.leaves(params)))
    assert tree.equal(flat.tree(), params)


def test_padding_stays_zero():
    train_state, _ = run(*flat_run())
    layout = train_state.params.layout
    inside = layout.ravel(tree.map(torch.ones_like, train_state.params.tree()))
    for flat in (train_state.params, train_state.opt_state[1][0].mu, train_state.ema.average):
        assert not flat.vectors["float64"][inside.vectors["float64"] == 0].any()


def test_flat_tree_is_views():
    params = new_params()
    flat = Layout.of(params).ravel(params)
    flat.vectors["float64"].zero_()
    assert not any(x.any() for x in tree.leaves(flat.tree()))


def test_flat_tree_keeps_the_memory_format():
    weight = normal(1, 4, 3, 2, 2).to(memory_format=torch.channels_last)
    params = {"weight": weight, "scale": normal(2, 3, 5).T, "gap": normal(3, 6, 4)[:, ::2]}
    flat = Layout.of(params, aligned=True).ravel(params)
    assert tree.equal(flat.tree(), params)
    assert flat.tree()["weight"].stride() == weight.stride()
    assert flat.tree()["scale"].stride() == (1, 5)
    assert flat.tree()["gap"].stride() == (2, 1)
    gradient = fg.grad(lambda p: tree.vdot(p.tree(), params))(flat)
    assert tree.equal(gradient.tree(), params)


def test_flat_keeps_one_vector_per_device():
    layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(3, device="meta"), "c": torch.ones(1)})
    vectors = layout.ravel({"a": torch.zeros(2), "b": torch.zeros(3, device="meta"), "c": torch.ones(1)}).vectors
    found = {name: (x.device.type, x.numel()) for name, x in vectors.items()}
    assert found == {"float32_cpu": ("cpu", 3), "float32_meta": ("meta", 3)}


def test_flat_empty_tree_is_empty():
    flat = Layout.of({}).ravel({})
    assert flat.vectors == {}
    assert flat.tree() == {}
    assert init_state({}, ALL, KEY, ema=MEAN, flat=True).ema.average.tree() == {}


def test_layout_is_a_value():
    a, b = Layout.of(new_params()), Layout.of(tree.zeros_like(new_params()))
    assert a == b
    assert hash(a) == hash(b)
    assert pickle.loads(pickle.dumps(a)) == a
    assert a != Layout.of(new_params(), aligned=True)
    assert a != Layout.of(new_params(torch.float32))


def test_flat_trees_of_other_layouts_do_not_mix():
    params = {"a": torch.zeros(2), "b": torch.zeros(3)}
    other = {"a": torch.zeros(3), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"tree\.map: "):
        tree.add(Layout.of(params).ravel(params), Layout.of(other).ravel(other))


def test_layout_names_the_path_of_what_does_not_fit():
    layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"flatten: expected shape \(3,\) at 'b', got \(4,\)"):
        layout.ravel({"a": torch.zeros(2), "b": torch.zeros(4)})
    with pytest.raises(ValueError, match="'b'"):
        layout.ravel({"a": torch.zeros(2)})
    with pytest.raises(TypeError, match=r"params at 'a': expected a floating-point tensor, got torch.int64"):
        Layout.of({"a": torch.arange(2)})
    with pytest.raises(ValueError, match=r"Flat: expected 5 elements in 'float32', got shape \(4,\)"):
        layout.unravel({"float32": torch.zeros(4)})
