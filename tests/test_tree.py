"""tree and structure: inverses by hypothesis, plain-tensor oracles for the arithmetic, the paths in the errors."""

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from functorch_gen import structure, tree


class Pair(NamedTuple):
    first: Any
    second: Any


SHAPES = st.sampled_from([(), (1,), (3,), (2, 2), (0,), (1, 0, 2)])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.int64])
KEYS = st.text("abcdz_019", min_size=1, max_size=3)


@st.composite
def tensors(draw, dtypes=DTYPES) -> Tensor:
    shape, seed = draw(SHAPES), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    return (10 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(draw(dtypes))


def nests(leaf, empty=True):
    """Nests of every node type; without ``empty``, each node has a leaf below."""
    least = 0 if empty else 1

    def grow(inner):
        kinds = [
            st.dictionaries(KEYS, inner, min_size=least, max_size=4),
            st.lists(inner, min_size=least, max_size=3),
            st.lists(inner, min_size=least, max_size=3).map(tuple),
            st.builds(Pair, inner, inner),
        ]
        return st.one_of(*kinds, *([st.none()] if empty else []))

    return st.recursive(leaf, grow, max_leaves=8)


def dicts(leaf):
    return st.recursive(leaf, lambda inner: st.dictionaries(KEYS, inner, max_size=4), max_leaves=8)


TREES = nests(tensors())
FLOATS = nests(tensors(st.just(torch.float64)), empty=False)


def same(a, b) -> bool:
    return tree.structure(a) == tree.structure(b) and bool(tree.equal(a, b))


# Structure.


@given(TREES)
def test_unflatten_inverts_flatten(x):
    found, treedef = tree.flatten(x)
    assert same(tree.unflatten(treedef, found), x)
    assert found == tree.leaves(x) or all(a is b for a, b in zip(found, tree.leaves(x), strict=True))
    assert hash(treedef) == hash(tree.structure(x))


@given(TREES)
def test_flatten_agrees_with_optree_and_its_plain_form(x):
    """The order inside ``torch.compile`` is the order outside."""
    plain, plain_structure = structure.flatten_plain(x)
    ids = [id(leaf) for leaf in optree.tree_leaves(x)]
    assert [id(leaf) for leaf in tree.leaves(x)] == ids
    assert [id(leaf) for leaf in plain] == ids
    assert structure.paths_plain(plain_structure) == tree.paths(x)
    assert same(structure.unflatten_plain(plain_structure, plain), x)


@given(nests(st.integers()), nests(st.integers()))
def test_plain_structures_are_equal_where_optree_says_so(a, b):
    equal = structure.flatten_plain(a)[1] == structure.flatten_plain(b)[1]
    assert equal == (optree.tree_structure(a) == optree.tree_structure(b))


@pytest.mark.parametrize("count", [1, 3])
def test_unflatten_counts_the_leaves(count):
    for treedef in (tree.structure({"a": 0, "b": 0}), structure.flatten_plain({"a": 0, "b": 0})[1]):
        with pytest.raises(ValueError, match=rf"tree.unflatten: expected 2 leaves, got {count}"):
            tree.unflatten(treedef, [0] * count)


def test_flatten_visits_dict_keys_in_sorted_order():
    assert tree.leaves({"b": 2, "a": 1, "c": {"z": 4, "y": 3}}) == [1, 2, 3, 4]
    assert tree.leaves(OrderedDict(b=2, a=1)) == structure.flatten_plain(OrderedDict(b=2, a=1))[0] == [2, 1]


def test_none_is_an_empty_tree():
    assert tree.leaves(None) == tree.paths(None) == []
    assert tree.leaves({"a": None, "b": [None, 1]}) == [1]
    assert tree.map(lambda x: x + 1, {"a": None, "b": 1}) == {"a": None, "b": 2}


def test_paths_name_keys_indices_and_fields():
    x = {"net": [Pair(1, {"w": 2}), (3,)], "a": None, "scale": 4}
    assert tree.paths(x) == ["net.0.first", "net.0.second.w", "net.1.0", "scale"]
    assert tree.paths(1) == [""]


@given(nests(st.integers()))
def test_map_composes(x):
    def f(y):
        return y + 3

    def g(y):
        return 2 * y

    assert tree.map(g, tree.map(f, x)) == tree.map(lambda y: g(f(y)), x)
    assert tree.map(lambda y: y, x) == x


@given(nests(st.integers()))
def test_map_with_path_gives_each_leaf_its_path(x):
    marked = tree.map_with_path(lambda path, y, z: (path, y, z), x, x)
    assert [
        tuple(row) for row in zip(tree.paths(x), tree.leaves(x), tree.leaves(x), strict=True)
    ] == optree.tree_leaves(
        marked, is_leaf=lambda node: type(node) is tuple and len(node) == 3 and isinstance(node[0], str)
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": [1, 2]}, "tree.map: expected a leaf at 'b.first' in every tree, got none there in one"),
        (
            {"a": [1, 2], "b": Pair(1, 2), "c": 1},
            r"tree.map: expected no leaf at 'c' \(the first tree has none there\), got one",
        ),
        ({"a": [1], "b": Pair(1, 2)}, "tree.map: expected a leaf at 'a.1' in every tree"),
        ({"a": [1, {"x": 2}], "b": Pair(1, 2)}, "tree.map: expected a leaf at 'a.1' in every tree"),
        ({"a": (1, 2), "b": Pair(1, 2)}, "tree.map: expected list at 'a', got tuple"),
        ({"a": [1, 2], "b": Pair(1, 2), "c": {}}, "tree.map: expected nothing at 'c', got dict"),
    ],
)
def test_map_names_the_first_path_that_differs(other, message):
    with pytest.raises(ValueError, match=message):
        tree.map(lambda x, y: x, {"a": [1, 2], "b": Pair(1, 2)}, other)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("map_with_path", lambda a, b: tree.map_with_path(lambda path, x, y: x, a, b)),
        ("equal", tree.equal),
        ("allclose", tree.allclose),
        ("stack", lambda a, b: tree.stack([a, b])),
    ],
)
def test_comparing_functions_name_themselves(name, call):
    with pytest.raises(ValueError, match=rf"tree.{name}: expected a leaf at 'a' in every tree"):
        call({"a": torch.ones(1)}, {"b": torch.ones(1)})


@given(nests(tensors()).filter(lambda x: x is not None))  # like=None stands for nested dicts
def test_from_names_inverts_names(x):
    assert same(tree.from_names(tree.names(x), like=x), x)


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, tensors(), min_size=1, max_size=3), max_size=3))
def test_from_names_inverts_names_of_dicts_without_like(x):
    assert same(tree.from_names(tree.names(x)), x)


def test_from_names_takes_a_bare_leaf():
    assert tree.from_names(tree.names(5)) == 5


@pytest.mark.parametrize(
    ("named", "like", "message"),
    [
        ({"a": 1}, {"a": 0, "b": [0]}, "tree.from_names: expected a leaf at 'b.0', got none"),
        ({"a": 1, "c": 1}, {"a": 0}, "tree.from_names: expected no leaf at 'c', got one"),
        ({"a.b": 1, "a.b.c.d": 2}, None, "tree.from_names: expected no leaf above 'a.b.c.d', got one at 'a.b'"),
        ({"a.b.c.d": 2, "a.b": 1}, None, "tree.from_names: expected no leaf above 'a.b.c.d', got one at 'a.b'"),
    ],
)
def test_from_names_names_the_bad_path(named, like, message):
    with pytest.raises(ValueError, match=message):
        tree.from_names(named, like)


def test_names_refuses_two_leaves_of_one_path():
    with pytest.raises(ValueError, match=r"tree.names: expected one leaf at 'a.b', got two"):
        tree.names({"a.b": 1, "a": {"b": 2}})


def test_names_of_parameters_are_torchs():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)))
    named = dict(module.named_parameters())
    assert tree.names(tree.from_names(named)).keys() == named.keys()


# Arithmetic: each function against the same sum on one vector.


@given(FLOATS, st.floats(-2, 2))
def test_arithmetic_is_that_of_vectors(x, c):
    y = tree.map(torch.cos, x)
    (u, unravel), (v, _) = tree.ravel(x), tree.ravel(y)
    results = {
        "add": (tree.add(x, y), u + v),
        "sub": (tree.sub(x, y), u - v),
        "mul": (tree.mul(x, y), u * v),
        "scale": (tree.scale(x, c), c * u),
        "add_scaled": (tree.add_scaled(x, y, c), u + c * v),
        "lerp": (tree.lerp(x, y, c), u + c * (v - u)),
        "clip": (tree.clip(x, -1.0, 1.0), u.clamp(-1, 1)),
        "zeros_like": (tree.zeros_like(x), 0 * u),
        "ones_like": (tree.ones_like(x), 0 * u + 1),
        "where": (tree.where(tree.map(lambda z: z > 0, x), x, y), torch.where(u > 0, u, v)),
    }
    for name, (result, expected) in results.items():
        assert same(result, unravel(expected)), name


@given(FLOATS)
def test_reductions_are_those_of_vectors(x):
    y = tree.map(torch.cos, x)
    (u, _), (v, _) = tree.ravel(x), tree.ravel(y)
    # The sums differ only in their order: a few ulp of the sum of magnitudes.
    tolerance: dict[str, Any] = {"rtol": 0, "atol": 1e-14 * (1 + float(u.abs().sum()))}
    torch.testing.assert_close(tree.sum(x), u.sum(), **tolerance)
    torch.testing.assert_close(tree.vdot(x, y), u @ v, **tolerance)
    torch.testing.assert_close(tree.norm(x), torch.linalg.vector_norm(u), **tolerance)
    assert tree.size(x) == u.numel()
    assert tree.nbytes(x) == 8 * u.numel()


def test_vdot_and_norm_of_complex_leaves():
    a, b = torch.tensor([1 + 2j, 3j]), torch.tensor([2 - 1j, 1 + 1j])
    torch.testing.assert_close(tree.vdot([a], [b]), torch.vdot(a, b))
    torch.testing.assert_close(tree.norm([a]), torch.linalg.vector_norm(a))


@pytest.mark.parametrize("function", [tree.sum, tree.norm, lambda x: tree.vdot(x, x), tree.unstack])
def test_reductions_refuse_an_empty_tree(function):
    with pytest.raises(ValueError, match="expected at least one leaf, got an empty tree"):
        function({"a": None})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)])
def test_scaling_keeps_the_dtype_of_the_leaves(dtype, factor):
    x = {"a": torch.ones(2, dtype=dtype), "b": torch.ones((), dtype=dtype)}
    wide = tree.cast(x, torch.float64)
    for result in (tree.scale(x, factor), tree.lerp(x, wide, factor), tree.add_scaled(x, wide, factor)):
        assert [leaf.dtype for leaf in tree.leaves(result)] == [dtype, dtype]
    batched = vmap(lambda f: tree.lerp(x, wide, f))(torch.ones(3))
    assert [leaf.dtype for leaf in tree.leaves(batched)] == [dtype, dtype]


def test_cast_touches_floating_leaves_only():
    x = [torch.ones(1), torch.ones(1, dtype=torch.int32), torch.tensor([True]), 3, "name"]
    y = tree.cast(x, torch.bfloat16)
    assert [getattr(leaf, "dtype", leaf) for leaf in y] == [torch.bfloat16, torch.int32, torch.bool, 3, "name"]


def test_to_moves_tensors():
    moved = tree.to({"a": torch.ones(2), "b": 3}, "meta")
    assert moved["a"].device.type == "meta"
    assert moved["b"] == 3


def test_where_takes_one_condition_for_all_leaves():
    a, b = {"x": torch.ones(2), "y": torch.ones(3)}, {"x": torch.zeros(2), "y": torch.zeros(3)}
    for condition, expected in [(True, a), (False, b), (torch.tensor(True), a), (torch.tensor(False), b)]:
        assert same(tree.where(condition, a, b), expected)


def test_clip_needs_a_bound():
    assert tree.clip([torch.tensor(3.0)], max=1.0)[0] == 1
    with pytest.raises(ValueError, match=r"tree.clip: expected min or max, got neither"):
        tree.clip([torch.ones(1)])


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (math.inf, False), (-math.inf, False), (math.nan, False)])
def test_all_finite_sees_every_leaf(value, finite):
    assert bool(tree.all_finite({"a": torch.ones(2, dtype=torch.int64), "b": [torch.tensor([1.0, value])]})) is finite
    assert bool(tree.all_finite({}))


def test_equal_compares_values_shapes_dtypes_and_numbers():
    x = {"a": torch.ones(2), "n": 3}
    assert tree.equal(x, {"a": torch.ones(2), "n": 3})
    for a, n in [
        (torch.tensor([1.0, 2.0]), 3),
        (torch.ones(1), 3),
        (torch.ones(2, dtype=torch.float64), 3),
        (torch.ones(2), 4),
    ]:
        assert not tree.equal(x, {"a": a, "n": n})


def test_allclose_uses_its_tolerances():
    x, y = [torch.ones(2)], [torch.full((2,), 1.001)]
    assert not tree.allclose(x, y)
    assert tree.allclose(x, y, rtol=1e-2)
    assert tree.allclose(x, y, rtol=0, atol=1e-2)


@given(FLOATS, st.integers(1, 3))
def test_unstack_inverts_stack(x, n):
    trees = [tree.scale(x, i) for i in range(n)]
    stacked = tree.stack(trees)
    assert [leaf.shape for leaf in tree.leaves(stacked)] == [(n, *leaf.shape) for leaf in tree.leaves(x)]
    for part, expected in zip(tree.unstack(stacked), trees, strict=True):
        assert same(part, expected)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (torch.ones(3), r"expected 'b.0' to have a leading axis of size 2, got shape \(3,\)"),
        (torch.ones(()), r"expected 'b.0' to have a leading axis of size 2, got shape \(\)"),
    ],
)
def test_unstack_names_the_path(leaf, message):
    with pytest.raises(ValueError, match=rf"tree.unstack: {message}"):
        tree.unstack({"a": torch.ones(2), "b": [leaf]})
    with pytest.raises(ValueError, match=r"tree.unstack: expected 'a' to have a leading axis, got shape \(\)"):
        tree.unstack({"a": torch.ones(())})


def test_stack_refuses_no_trees():
    with pytest.raises(ValueError, match=r"tree.stack: expected at least one tree, got none"):
        tree.stack([])


@given(TREES)
def test_unravel_inverts_ravel(x):
    vector, unravel = tree.ravel(x)
    assert vector.shape == (tree.size(x),)
    assert same(unravel(vector), x)


@given(FLOATS)
def test_ravel_lays_the_leaves_in_order(x):
    vector, _ = tree.ravel(x)
    assert vector.tolist() == [value for leaf in tree.leaves(x) for value in leaf.flatten().tolist()]


def test_unravel_refuses_another_length():
    _, unravel = tree.ravel({"a": torch.zeros(2), "b": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match=r"unravel: expected shape \(5,\), got \(4,\)"):
        unravel(torch.zeros(4))


# Averages of weights.


@given(st.lists(st.floats(0.1, 2), min_size=1, max_size=5), st.integers(0, 50))
def test_average_is_the_weighted_mean(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(weights), 3, generator=generator, dtype=torch.float64)
    trees = [{"a": row[:1], "b": [row[1], row[2:]]} for row in values]
    shares = torch.tensor(weights, dtype=torch.float64)
    expected = (shares / shares.sum()) @ values
    for given_weights in (weights, shares):
        assert torch.allclose(tree.ravel(tree.average(trees, given_weights))[0], expected, rtol=0, atol=1e-14)
    assert torch.allclose(tree.ravel(tree.average(trees))[0], values.mean(0), rtol=0, atol=1e-14)


def test_average_equals_torch_swa():
    nets = [torch.nn.Linear(2, 3, dtype=torch.float64) for _ in range(4)]
    averaged = torch.optim.swa_utils.AveragedModel(nets[0])
    for net in nets:
        averaged.update_parameters(net)
    found = tree.average([{name: x.detach() for name, x in net.named_parameters()} for net in nets])
    for name, x in averaged.module.named_parameters():
        torch.testing.assert_close(found[name], x.detach(), rtol=0, atol=1e-15)


def test_average_of_bfloat16_is_summed_in_float32():
    trees = [{"w": torch.full((2,), value, dtype=torch.bfloat16)} for value in [256.0] + 255 * [1.0]]
    found = tree.average(trees)["w"]
    assert found.dtype == torch.bfloat16
    assert found[0].item() == torch.tensor(511 / 256).bfloat16().item()  # 256 + 1 is 256 in bfloat16


def test_average_has_derivatives_in_weights_and_leaves():
    trees = [{"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([3.0, 2.0])}]

    def first(weights):
        return tree.average(trees, weights)["w"][0]

    weights = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(grad(first)(weights), torch.tensor([-0.375, 0.125]))  # (x_i - mean) / sum of weights
    torch.testing.assert_close(vmap(first)(torch.eye(2)), torch.tensor([1.0, 3.0]))
    slopes = grad(lambda trees: tree.sum(tree.average(trees, [1, 3])))(trees)
    assert [x["w"].tolist() for x in slopes] == [[0.25, 0.25], [0.75, 0.75]]


def test_task_vectors_are_differences():
    start = {"w": torch.tensor([1.0, 2.0])}
    tuned = [{"w": torch.tensor([2.0, 2.0])}, {"w": torch.tensor([1.0, 5.0])}]
    tasks = [tree.sub(params, start) for params in tuned]
    both = tree.add_scaled(tree.add_scaled(start, tasks[0], 0.5), tasks[1], 1.0)
    assert both["w"].tolist() == [1.5, 5.0]
    without = tree.add_scaled(tuned[0], tasks[0], -1.0)
    assert same(without, start)


def test_average_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"tree.average: expected at least one tree, got none"):
        tree.average([])
    with pytest.raises(ValueError, match=r"tree.average: expected 2 weights, got 3"):
        tree.average([{"a": torch.ones(1)}] * 2, [1, 2, 3])
    with pytest.raises(TypeError, match=r"tree.average: 'n': expected a floating-point tensor, got torch.int64"):
        tree.average([{"n": torch.ones(1, dtype=torch.int64)}])
    with pytest.raises(ValueError, match=r"tree.average: expected a leaf at 'a' in every tree"):
        tree.average([{"a": torch.ones(1)}, {"b": torch.ones(1)}])


# Selection.


@given(dicts(tensors()), st.data())
def test_merge_inverts_partition(x, data):
    taken = set(data.draw(st.lists(st.sampled_from(tree.paths(x)), unique=True))) if tree.paths(x) else set()
    selected, rest = tree.partition(x, lambda path: path in taken)
    assert set(tree.paths(selected)) == taken
    assert set(tree.paths(rest)) == set(tree.paths(x)) - taken
    assert same(tree.merge(selected, rest), x)
    assert same(tree.merge(rest, selected), x)


def test_partition_keeps_nodes_without_leaves_in_the_rest():
    """A part without parameters (Identity) keeps its place."""
    x = {"act": {}, "none": None, "lin": {"weight": 1, "bias": 2}}
    assert tree.partition(x, "*.bias") == ({"lin": {"bias": 2}}, {"act": {}, "none": None, "lin": {"weight": 1}})
    assert tree.partition(x, "*") == (x, {})


def test_partition_takes_globs_and_predicates():
    x = {"a": {"weight": 1, "bias": 2}, "b": {"bias": 3}, "c": 4}
    expected = {"a": {"bias": 2}, "b": {"bias": 3}, "c": 4}
    assert tree.partition(x, ["*.bias", "c"])[0] == expected
    assert tree.partition(x, lambda path: not path.endswith("weight"))[0] == expected
    assert tree.partition(x, "a.*")[0] == {"a": {"weight": 1, "bias": 2}}


def test_partition_takes_lists_whole_or_not():
    x = {"a": [1, 2], "b": Pair(1, 2)}
    assert tree.partition(x, "a.*") == ({"a": [1, 2]}, {"b": Pair(1, 2)})
    with pytest.raises(ValueError, match=r"tree.partition: expected all of the Pair at 'b' or none, got a part"):
        tree.partition(x, "b.first")


def test_partition_refuses_a_glob_without_a_match():
    with pytest.raises(ValueError, match=r"tree.partition: expected a path that matches 'b\.\*', got a.w, c"):
        tree.partition({"a": {"w": 1}, "c": 2}, ["a.*", "b.*"])
    with pytest.raises(ValueError, match=r"expected a path that matches '\*', got none"):
        tree.partition({}, "*")


def test_merge_names_the_path_in_both():
    with pytest.raises(ValueError, match=r"tree.merge: expected one tree to have 'a.w', got it in both"):
        tree.merge({"a": {"w": 1}}, {"a": {"w": 1}})


# Under the transforms.


def test_norm_has_finite_derivatives_at_zero():
    def f(x):
        return tree.norm({"a": x[:1], "b": x[1:]})

    zero = torch.zeros(3, dtype=torch.float64)
    assert f(zero) == 0
    assert grad(f)(zero).tolist() == [0, 0, 0]
    assert hessian(f)(zero).tolist() == [[0] * 3] * 3
    assert tree.norm([torch.tensor([math.nan])]).isnan()
    x = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    # Hessian of |x|: (I - u u^T) / |x|.
    u = x / 5
    torch.testing.assert_close(hessian(f)(x), (torch.eye(3, dtype=torch.float64) - u[:, None] * u) / 5)


def scalar(x):
    a, b = {"w": x[:2], "b": [x[2:]]}, {"w": x[2:], "b": [x[:2]]}
    mixed = tree.lerp(tree.add_scaled(a, b, x.sum()), tree.mul(a, b), 0.3)
    return tree.vdot(mixed, tree.where(x[0] > 0, a, tree.sub(b, a))) + tree.norm(mixed)


def test_arithmetic_under_grad_jvp_and_vmap():
    x = torch.tensor([[0.3, -0.5, 0.7, 1.1], [-0.2, 0.4, 0.1, 0.9]], dtype=torch.float64)
    assert torch.autograd.gradcheck(scalar, x[0].clone().requires_grad_(), check_forward_ad=True)
    tangent = torch.tensor([0.5, 0.1, -0.2, 0.3], dtype=torch.float64)
    torch.testing.assert_close(jvp(scalar, (x[0],), (tangent,))[1], grad(scalar)(x[0]) @ tangent)
    torch.testing.assert_close(vmap(grad(scalar))(x), torch.stack([grad(scalar)(row) for row in x]))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: tree.lerp(x, tree.mul(x, x), tree.norm(x)),
        lambda x: tree.map_with_path(lambda path, y: y * len(path), x),
        lambda x: tree.merge(*tree.partition(x, "*.z")),
        lambda x: tree.ravel(x)[1](2 * tree.ravel(x)[0]),
        lambda x: tree.from_names(tree.names(x), like=x),
        lambda x: tree.unstack(tree.stack([x, x])),
        lambda x: (tree.all_finite(x), tree.equal(x, x), tree.where(True, x, x)),
        lambda x: tree.unflatten(tree.structure(x), reversed(tree.leaves(x))),
    ],
)
def test_functions_trace_inside_torch_compile(function):
    x = {"n": {"z": torch.ones(2), "a": torch.zeros(2)}, "b": [torch.arange(2.0), None], "p": Pair(torch.ones(2), {})}
    assert same(torch.compile(function, fullgraph=True, backend="eager")(x), function(x))


def test_unravel_made_outside_traces_inside_torch_compile():
    vector, unravel = tree.ravel({"b": torch.ones(2), "a": [torch.zeros(2, 2), None]})
    doubled = torch.compile(lambda v: unravel(2 * v), fullgraph=True, backend="eager")(vector)
    assert same(doubled, unravel(2 * vector))


def test_unflatten_inside_torch_compile_refuses_a_structure_made_outside():
    treedef = tree.structure({"a": 0})
    with pytest.raises(torch._dynamo.exc.Unsupported, match="got one made outside"):
        torch.compile(lambda x: tree.unflatten(treedef, [x]), fullgraph=True, backend="eager")(torch.ones(1))
