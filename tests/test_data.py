"""Batches: every epoch a permutation, every batch a function of (key, step)."""

import itertools

import pytest
import torch

from functorch_gen import random, tree
from functorch_gen.data import balanced_weights, batch_indices, batches, epoch_batches, weighted_indices
from functorch_gen.transforms import jit, vmap

KEY = random.key(0)
DATA = {"image": torch.arange(22.0).reshape(11, 2), "label": [torch.arange(11)]}


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (11, 4), (5, 5), (3, 1)])
def test_batch_indices_of_an_epoch_are_drawn_without_replacement(size, batch_size):
    per_epoch = size // batch_size
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        drawn = torch.cat([batch_indices(KEY, size, batch_size, step) for step in steps]).tolist()
        assert len(set(drawn)) == len(drawn) == per_epoch * batch_size
        assert set(drawn) <= set(range(size))


def test_batch_indices_are_the_permutation_of_the_epoch():
    order = random.permutation(random.fold_in(KEY, 2), 11)
    assert torch.equal(batch_indices(KEY, 11, 4, 5), order[4:8])


def test_batch_indices_differ_between_epochs_and_keys():
    def epoch(key, n):
        return batch_indices(key, 100, 100, n).tolist()

    orders = [epoch(KEY, 0), epoch(KEY, 1), epoch(random.key(1), 0)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_batch_indices_leave_out_every_example_equally_often():
    """Of 11 examples 3 are left out of an epoch, by symmetry each with probability 3/11: chi-square, 10 degrees."""
    epochs = 500
    drawn = torch.cat([batch_indices(KEY, 11, 8, epoch) for epoch in range(epochs)])
    seen = torch.bincount(drawn, minlength=11)
    expected = epochs * 8 / 11
    variance = epochs * (8 / 11) * (3 / 11) * 11 / 10  # counts sum to a constant
    chi_square = ((seen - expected) ** 2).sum() / variance
    assert chi_square < 29.6  # exceeded with probability 0.001


def test_batches_take_the_same_examples_of_every_leaf():
    for step, batch in enumerate(batches(KEY, DATA, 4, steps=7)):
        indices = batch_indices(KEY, 11, 4, step)
        assert tree.equal(batch, tree.map(lambda x, indices=indices: x[indices], DATA))


@pytest.mark.parametrize("start", [0, 1, 2, 5])
def test_batches_resume_at_any_step(start):
    whole = list(batches(KEY, DATA, 4, steps=8))
    rest = list(batches(KEY, DATA, 4, steps=8 - start, start=start))
    assert len(rest) == 8 - start
    assert all(tree.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_batches_without_steps_do_not_end():
    assert len(list(itertools.islice(batches(KEY, DATA, 11), 50))) == 50


@pytest.mark.parametrize(
    ("data", "batch_size", "options", "message"),
    [
        (DATA, 12, {}, "batches: expected batch_size <= 11, the number of examples, got 12"),
        (DATA, 0, {}, "batches: expected batch_size > 0, got 0"),
        (DATA, 4, {"steps": 0}, "batches: expected steps > 0, got 0"),
        (DATA, 4, {"start": -1}, "batches: expected a step >= 0, got -1"),
        ({}, 4, {}, "batches: data: expected at least one leaf, got an empty tree"),
        (
            {"a": torch.zeros(3, 2), "b": {"c": torch.zeros(4)}},
            1,
            {},
            r"batches: data: expected shape \(3, ...\) at 'b.c', got \(4,\)",
        ),
        ({"a": torch.tensor(1.0)}, 1, {}, r"batches: data: expected shape \(n, ...\) at 'a', got \(\)"),
    ],
)
def test_batches_of_bad_arguments_fail_at_the_call(data, batch_size, options, message):
    with pytest.raises(ValueError, match=message):
        batches(KEY, data, batch_size, **options)


def test_batches_of_a_leaf_that_is_no_tensor_names_its_path():
    with pytest.raises(TypeError, match=r"batches: data: expected a tensor at 'a.1', got int"):
        batches(KEY, {"a": [torch.zeros(3), 7]}, 1)


# Under jit and vmap, one epoch in order, by weight.


def test_batch_indices_of_a_step_that_is_a_tensor_are_those_of_the_number():
    steps = torch.arange(7)
    want = torch.stack([batch_indices(KEY, 11, 4, step) for step in range(7)])
    assert torch.equal(vmap(lambda step: batch_indices(KEY, 11, 4, step))(steps), want)
    jitted = jit(lambda key, step: batch_indices(key, 11, 4, step), backend="aten")
    assert torch.equal(torch.stack([jitted(KEY, step) for step in steps]), want)
    assert jitted.traces == 1


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 3]), (True, [4, 4])])
def test_epoch_batches_go_once_through_the_data_in_its_order(drop_last, sizes):
    found = list(epoch_batches(DATA, 4, drop_last=drop_last))
    assert [len(batch["image"]) for batch in found] == sizes
    joined = tree.map(lambda *parts: torch.cat(parts), *found)
    assert tree.equal(joined, tree.map(lambda x: x[: sum(sizes)], DATA))


@pytest.mark.parametrize(("batch_size", "drop_last", "sizes"), [(11, True, [11]), (20, False, [11]), (20, True, [])])
def test_epoch_batches_of_one_batch(batch_size, drop_last, sizes):
    assert [len(batch["image"]) for batch in epoch_batches(DATA, batch_size, drop_last=drop_last)] == sizes


def test_epoch_batches_of_bad_arguments_fail_at_the_call():
    with pytest.raises(ValueError, match="epoch_batches: expected batch_size > 0, got 0"):
        epoch_batches(DATA, 0)
    with pytest.raises(ValueError, match=r"epoch_batches: data: expected shape \(11, ...\) at 'x.1', got \(3,\)"):
        epoch_batches({"x": [torch.zeros(11), torch.zeros(3)]}, 2)


WEIGHTS = torch.tensor([0.0, 1.0, 0.0, 5.0, 2.0, 0.0])


def test_weighted_indices_are_drawn_as_often_as_the_weights_say():
    """Chi-square with 2 degrees of freedom; weights of zero at both ends and between are never drawn."""
    drawn = torch.cat([weighted_indices(KEY, WEIGHTS, 16, step) for step in range(500)])
    counts = torch.bincount(drawn, minlength=6).double()
    assert (counts[WEIGHTS == 0] == 0).all()
    expected = 8000 * (WEIGHTS / WEIGHTS.sum()).double()
    assert ((counts - expected) ** 2 / expected)[WEIGHTS > 0].sum() < 13.8  # exceeded with probability 0.001


def test_weighted_indices_are_a_pure_function_of_key_and_step():
    def draw(key, step):
        return weighted_indices(key, torch.ones(50), 20, step).tolist()

    assert draw(KEY, 3) == draw(KEY, 3)
    assert all(a != b for a, b in itertools.combinations([draw(KEY, 3), draw(KEY, 4), draw(random.key(1), 3)], 2))


def test_weighted_indices_trace_with_the_step():
    steps = torch.arange(5)
    want = torch.stack([weighted_indices(KEY, WEIGHTS, 4, step) for step in range(5)])
    jitted = jit(lambda weights, step: weighted_indices(KEY, weights, 4, step), backend="aten")
    assert torch.equal(torch.stack([jitted(WEIGHTS, step) for step in steps]), want)
    assert torch.equal(vmap(lambda step: weighted_indices(KEY, WEIGHTS, 4, step))(steps), want)


def test_weighted_indices_of_bfloat16_weights_reach_the_last():
    """In bfloat16 a running sum of ones stops at 256."""
    drawn = weighted_indices(KEY, torch.ones(3000, dtype=torch.bfloat16), 3000, 0)
    thirds = torch.bincount(drawn // 1000, minlength=3)
    assert (thirds - 1000).abs().max() < 4 * 26  # the deviation of a count is 26


def test_balanced_weights_draw_every_class_equally_often():
    labels = torch.tensor([3] * 80 + [7] * 15 + [0] * 5)
    weights = balanced_weights(labels)
    assert weights.sum() == pytest.approx(1.0, abs=1e-14)
    assert [weights[labels == c].sum().item() for c in (0, 3, 7)] == pytest.approx([1 / 3] * 3)
    drawn = labels[torch.cat([weighted_indices(KEY, weights, 100, step) for step in range(30)])]
    assert all(abs((drawn == c).sum() - 1000) < 4 * 26 for c in (0, 3, 7))


def test_batches_by_weight_are_those_of_weighted_indices_and_resume():
    weights = torch.arange(11.0)
    whole = list(batches(KEY, DATA, 20, weights=weights, steps=6))  # with replacement, more than there are
    for step, batch in enumerate(whole):
        indices = weighted_indices(KEY, weights, 20, step)
        assert tree.equal(batch, tree.map(lambda x, indices=indices: x[indices], DATA))
    rest = list(batches(KEY, DATA, 20, weights=weights, steps=2, start=4))
    assert all(tree.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: weighted_indices(KEY, -WEIGHTS, 2, 0), ValueError, "weighted_indices: expected finite weights >= 0"),
        (lambda: weighted_indices(KEY, torch.zeros(3), 2, 0), ValueError, "that are not all zero"),
        (lambda: weighted_indices(KEY, WEIGHTS / 0, 2, 0), ValueError, "weighted_indices: expected finite weights"),
        (lambda: weighted_indices(KEY, WEIGHTS, 0, 0), ValueError, "weighted_indices: expected batch_size > 0, got 0"),
        (lambda: weighted_indices(KEY, torch.arange(3), 2, 0), TypeError, "weights: expected a floating-point tensor"),
        (lambda: batches(KEY, DATA, 2, weights=WEIGHTS), ValueError, r"batches: weights: expected shape \(n=11,\)"),
        (
            lambda: balanced_weights(torch.ones(3)),
            TypeError,
            "balanced_weights: labels: expected integers, got torch.fl",
        ),
        (
            lambda: balanced_weights(torch.zeros(0, dtype=torch.int64)),
            ValueError,
            "balanced_weights: labels: expected n",
        ),
    ],
    ids=["negative", "zero", "infinite", "batch", "integers", "shape", "floats", "empty"],
)
def test_weights_that_are_none_are_an_error(use, error, message):
    with pytest.raises(error, match=message):
        use()
