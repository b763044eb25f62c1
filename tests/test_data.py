"""Batches: every epoch a permutation, every batch a function of (key, step)."""

import itertools

import pytest
import torch

from functorch_gen import random, tree
from functorch_gen.data import batch_indices, batches

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
