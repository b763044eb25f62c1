"""vmap: against a loop."""

from collections import OrderedDict

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree


def batch(n=3):
    return {"a": torch.arange(2.0 * n).reshape(n, 2), "b": (torch.arange(float(n)),)}


def g(p, x, scale=1.0):
    return {"y": p["a"] * x * scale, "s": [p["b"][0] + x.sum()]}


def loop(f, p, x, n=3):
    return tree.stack([f(tree.map(lambda v, i=i: v[i], p), x) for i in range(n)])


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 7])
def test_vmap_equals_a_loop(chunk_size):
    x = torch.tensor([2.0, 3.0])
    out = fg.vmap(g, in_dims=(0, None), chunk_size=chunk_size)(batch(), x)
    assert tree.equal(out, loop(g, batch(), x))


def test_vmap_in_dims_as_trees_and_other_axes():
    p = {"a": batch()["a"].T, "b": batch()["b"]}
    x = torch.tensor([2.0, 3.0])
    out = fg.vmap(g, in_dims=({"a": 1, "b": 0}, None))(p, x)
    assert tree.equal(out, loop(g, batch(), x))
    out = fg.vmap(g, in_dims=({"a": -1, "b": (0,)}, None))(p, x)
    assert tree.equal(out, loop(g, batch(), x))


def test_vmap_out_dims_are_a_prefix():
    x = torch.ones(2)
    out = fg.vmap(g, in_dims=(0, None), out_dims={"y": 1, "s": 0})(batch(), x)
    assert torch.equal(out["y"], loop(g, batch(), x)["y"].T)
    out = fg.vmap(lambda a: (a, torch.ones(2)), out_dims=(0, None))(torch.arange(3.0))
    assert out[1].shape == (2,)


def test_vmap_passes_other_leaves_and_keywords():
    out = fg.vmap(lambda x, f, k: (f(x), None, k, "text"), in_dims=(0, None, None))(torch.arange(3.0), torch.sin, 2)
    assert torch.equal(out[0], torch.sin(torch.arange(3.0)))
    assert out[1:] == (None, 2, "text")
    by_keyword = fg.vmap(g, in_dims=(0, None))(batch(), torch.ones(2), scale=torch.arange(3.0))
    assert torch.equal(by_keyword["y"], batch()["a"] * torch.arange(3.0)[:, None])


def test_vmap_of_grad_equals_a_loop_and_keeps_order():
    p = {"z": torch.arange(3.0), "a": torch.arange(3.0) + 5}
    grads = fg.vmap(fg.grad(lambda p: p["z"] ** 2 * p["a"]))(p)
    assert torch.equal(grads["z"], 2 * p["z"] * p["a"])
    assert torch.equal(grads["a"], p["z"] ** 2)


def test_vmap_over_keys_draws_as_a_loop():
    keys = fg.random.split(fg.random.key(0), 4)
    out = fg.vmap(lambda k: fg.random.normal(k, (3,)))(keys)
    assert torch.equal(out, torch.stack([fg.random.normal(k, (3,)) for k in keys]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fg.vmap(g)({"a": torch.ones(3, 2), "b": (torch.ones(4),)}, torch.ones(3)),
            r"3 in argument '0.a' and 4",
        ),
        (lambda: fg.vmap(torch.sin, in_dims=1)(torch.ones(3)), r"axis 1 in argument '0', got shape \(3,\)"),
        (lambda: fg.vmap(torch.sin, in_dims=None)(torch.ones(3)), "at least one tensor to map over"),
        (
            lambda: fg.vmap(torch.sin, in_dims=(0, 0))(torch.ones(3)),
            "one entry of in_dims for each of 1 arguments, got 2",
        ),
        (lambda: fg.vmap(g, in_dims=({"c": 0}, None))(batch(), torch.ones(2)), "in_dims to be a prefix"),
        (lambda: fg.vmap(torch.sin, out_dims=(0, 0))(torch.ones(3)), "out_dims to be a prefix"),
        (lambda: fg.vmap(torch.sin, chunk_size=0), "chunk_size >= 1"),
    ],
)
def test_vmap_names_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_vmap_refuses_the_global_generator():
    with pytest.raises(RuntimeError, match="random"):
        fg.vmap(lambda x: x + torch.randn(2))(torch.ones(3, 2))


def test_vmap_prefixes_follow_any_mapping():
    ordered = OrderedDict(z=torch.arange(6.0).reshape(2, 3), a=torch.arange(3.0))
    out = fg.vmap(lambda d: d["z"].sum() + d["a"], in_dims=({"z": 1, "a": 0},))(ordered)
    assert torch.equal(out, ordered["z"].sum(0) + ordered["a"])
    by_tuples = {(1, 2): torch.arange(3.0), (0,): torch.tensor(5.0)}
    out = fg.vmap(lambda d: d[1, 2] + d[(0,)], in_dims=({(1, 2): 0, (0,): None},))(by_tuples)
    assert out.tolist() == [5, 6, 7]


def test_vmap_of_an_empty_batch():
    assert fg.vmap(lambda x: 2 * x, chunk_size=2)(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fg.vmap(lambda x: {"y": x}, out_dims=None)(x), "output at 'y' to be the same for all examples"),
        (lambda x: fg.vmap(lambda x: {"y": x}, out_dims=3)(x), "out_dims in range for the output at 'y', got 3"),
        (lambda x: fg.vmap(lambda x, y: x)(x, {"k": torch.ones(4)}), "3 in argument '0' and 4 in '1.k'"),
    ],
)
def test_vmap_names_the_output_or_argument_that_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.arange(3.0))
