"""How a graph is cut: regions that are alike, what is stored, what is written in place, and the order."""

import pytest
import torch
import torch.nn.functional as F
from test_jit_stress import drawn

import functorch_gen as fg
from functorch_gen import tree
from functorch_gen.transforms.tracing.backends import decomposed
from functorch_gen.transforms.tracing.donation import donate, separate_outputs
from functorch_gen.transforms.tracing.elementwise import batches
from functorch_gen.transforms.tracing.graph import memory
from functorch_gen.transforms.tracing.partition import Partition
from functorch_gen.transforms.tracing.region import region_graph
from functorch_gen.transforms.tracing.trace import trace

aten = torch.ops.aten


def cut(fun, *arguments, donated=()):
    """The partition of a function of trees; ``donated``: numbers of arguments."""
    leaves, treedef = tree.flatten(arguments)
    traced = trace(lambda *flat: fun(*tree.unflatten(treedef, flat)), leaves)
    starts = [sum(len(tree.leaves(x)) for x in arguments[:i]) for i in range(len(arguments) + 1)]
    if donated:
        donate(traced.graph, [j for i in donated for j in range(starts[i], starts[i + 1])])
    else:
        separate_outputs(traced.graph)
    return Partition(decomposed(traced.graph).graph)


def zeros(*shape):
    return torch.zeros(shape)


# Regions that are alike.


def network(layers):
    """A residual network, its parameters and its input."""
    params = [{"w": zeros(8, 8), "v": zeros(8, 8), "scale": zeros(8)} for _ in range(layers)]

    def loss(params, x):
        for p in params:
            x = x + F.gelu(F.layer_norm(x, (8,), p["scale"]) @ p["w"]) @ p["v"]
        return x.square().mean()

    def step(params, x):
        return tree.map(lambda p, g: p - 0.1 * g, params, fg.grad(loss)(params, x))

    return step, params, zeros(4, 8)


def kinds(layers):
    step, *arguments = network(layers)
    together, rest = batches([u for u in cut(step, *arguments, donated=[0]).units if u.fused])
    return len({region_graph(u).key for u in rest}), len(together)


def test_more_layers_bring_no_new_kinds_of_region():
    assert kinds(2) == kinds(8)


def test_the_updates_of_all_leaves_are_one_batch():
    step, *arguments = network(6)
    found = cut(step, *arguments, donated=[0])
    together, _ = batches([u for u in found.units if u.fused])
    assert [len(batch.units) for batch in together] == [12]  # the weights; gradients of scales end in sums
    assert all(u.writes for u in together[0].units)


def test_readers_of_one_constant_stay_apart():
    found = cut(lambda a, b: (a.sin() * torch.full((), 2.0), b.cos() * torch.full((), 2.0)), zeros(3), zeros(4))
    assert len([u for u in found.units if u.fused]) == 2


# What is stored.


def units_with(found, target):
    return [u for u in found.units if any(n.target is target for n in u.nodes)]


def test_cheap_values_are_computed_again_far_away():
    found = cut(lambda x, w: ((x * 2).sum(), torch.tanh(x @ w @ w) + x * 2), zeros(64, 64), zeros(64, 64))
    assert len(units_with(found, aten.mul.Tensor)) == 2
    assert all(n.target is not aten.mul.Tensor for u in found.units for n in u.outputs)


def test_dear_values_are_stored():
    found = cut(lambda x, w: x.logsumexp(0) + (x.logsumexp(0) @ w @ w).tanh(), zeros(64, 64), zeros(64, 64))
    assert len(units_with(found, aten.exp.default)) == 1


def test_regions_read_only_what_others_write():
    found = cut(lambda x, w: (torch.tanh(x @ w) @ w).softmax(-1) + x, zeros(6, 6), zeros(6, 6))
    made = {n for u in found.units for n in u.outputs}
    for unit in found.units:
        for n in unit.inputs:
            assert n in made or n.op == "placeholder"


# Donation.


def writers(found):
    return [u for u in found.units if u.writes]


def copies(found):
    return [u for u in found.units if u.nodes[0].target is aten.copy_.default]


def test_a_region_writes_over_what_only_it_reads():
    found = cut(lambda s, x: s - 0.1 * (x @ s), zeros(4, 4), zeros(4, 4), donated=[0])
    assert (len(writers(found)), len(copies(found))) == (1, 0)


@pytest.mark.parametrize(
    "later",
    [
        lambda s, x: (s * 2, s @ (x @ x)),
        lambda s, x: (s * 2, (x @ x @ x).tanh() + s),
        lambda s, x: (s * 2, s[1:] @ (x @ x)),
        lambda s, x: (s * 2, fg.optimization_barrier(s) @ (x @ x)),
        lambda s, x: (s * 2, (x @ x @ x).tanh() + s.view(torch.int32)),
        lambda s, x: (s * 2, fg.debug.callback(lambda v: None, x.sum()) or x + 1),
    ],
    ids=["operation", "region", "part", "barrier", "other dtype", "callback"],
)
def test_nothing_is_overwritten_that_is_still_read(later):
    found = cut(later, zeros(4, 4), zeros(4, 4), donated=[0])
    assert (len(writers(found)), len(copies(found))) == (0, 1)
    assert found.ordered(found.units)[-1].nodes[0].target is aten.copy_.default


def test_what_overwrites_is_not_in_one_batch_with_what_reads():
    found = cut(lambda s, c, x: ((x @ x) * c, s * c), *[zeros(4, 4)] * 3, donated=[0])
    together, rest = batches([u for u in found.units if u.fused])
    assert [len(batch.units) for batch in together] == [1, 1]
    assert (len(writers(found)), rest) == (1, [])


def test_a_region_that_reads_a_part_and_writes_the_whole_sees_both_as_one():
    found = cut(lambda s: s - F.pad(s[:-1], (1, 0)), zeros(40), donated=[0])
    (unit,) = writers(found)
    assert [n.op for n in region_graph(unit).inputs] == ["placeholder"]


# Barriers.


def test_barriers_hand_on_without_a_copy_where_safe():
    found = cut(lambda x, w: (fg.optimization_barrier(x @ w) @ w, fg.optimization_barrier(x)), zeros(4, 4), zeros(4, 4))
    items = [
        n for u in found.units if u.nodes[0].target is torch.ops.functorch_gen.barrier.default for n in u.nodes[1:]
    ]
    assert sorted(found.handed_on(n) is not None for n in items) == [False, True]  # a result is a copy


# Order: simulated, with all memory in view.


def check_order(found):
    done, overwritten = set(), set()
    for unit in found.ordered(found.units):
        for n in unit.inputs:
            assert n.op in ("placeholder", "get_attr") or n in done, "read before it is computed"
            own = n in unit.writes.values() or unit.nodes[0].target is aten.copy_.default
            assert own or memory(n) not in overwritten, "read after it was overwritten"
        done.update(unit.outputs)
        overwritten.update(unit.writes.values())
        if unit.nodes[0].target is aten.copy_.default:
            overwritten.add(unit.nodes[0].args[0])
    assert {n for n in found.results if n.op == "call_function"} <= done


@pytest.mark.parametrize("seed", range(12))
def test_any_program_can_be_ordered(seed):
    program, state, batch = drawn(seed, 30)
    check_order(cut(program, state, batch, donated=[0]))
    check_order(cut(program, state, batch))


def test_levels_rise_from_region_to_region():
    step, *arguments = network(3)
    found = cut(step, *arguments, donated=[0])
    maker = {n: u for u in found.units for n in u.outputs}
    for unit in found.units:
        for n in unit.inputs:
            assert n not in maker or maker[n].level < unit.level <= 99
            assert n not in maker or maker[n].deadline <= unit.level
