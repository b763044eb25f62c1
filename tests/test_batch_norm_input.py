"""What batch normalisation says of fields, inputs and states that do not fit."""

import re

import pytest
import torch

from functorch_gen import nn, random


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (1, 3)),
        (nn.BatchNorm1d(3), (3,)),
        (nn.BatchNorm2d(3), (1, 3, 1, 1)),
    ],
    ids=str,
)
def test_batch_norm_refuses_one_value_of_each_channel(layer, shape):
    params, state = layer.init(random.key(0)), layer.init_state()
    message = f"{type(layer).__name__}: expected at least two values of each channel in training, got"
    with pytest.raises(ValueError, match=message):
        layer(params, state, torch.ones(shape), train=True)
    layer(params, state, torch.ones(shape), train=False)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.BatchNorm1d(3), (4, 2), "BatchNorm1d: x: expected shape (b, c=3), got (4, 2)"),
        (nn.BatchNorm1d(3), (4, 3, 2, 2), "BatchNorm1d: x: expected shape (b, c=3, l), got (4, 3, 2, 2)"),
        (nn.BatchNorm2d(3), (4, 2, 2, 2), "BatchNorm2d: x: expected shape (..., c=3, h, w), got (4, 2, 2, 2)"),
        (nn.BatchNorm3d(3), (4, 3, 2), "BatchNorm3d: x: expected shape (..., c=3, d, h, w), got (4, 3, 2)"),
    ],
    ids=str,
)
def test_batch_norm_names_the_shape_it_wants(layer, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(layer.init(random.key(0)), layer.init_state(), torch.ones(shape), train=True)


STATE = nn.BatchNorm1d(3).init_state()
BAD_STATES = [
    ({}, KeyError, "BatchNorm1d: expected state 'running_mean', got only []"),
    ({"running_mean": STATE["running_mean"]}, KeyError, "expected state 'running_var', got only ['running_mean']"),
    ({**STATE, "running_var": torch.ones(2)}, ValueError, "state 'running_var': expected shape (c=3,), got (2,)"),
    ({**STATE, "num_batches_tracked": 0}, TypeError, "state 'num_batches_tracked': expected a tensor"),
    (torch.ones(3), TypeError, "BatchNorm1d: expected state to be a dict with running_mean, running_var"),
]


@pytest.mark.parametrize(("state", "error", "message"), BAD_STATES, ids=[message for *_, message in BAD_STATES])
def test_batch_norm_names_what_is_wrong_with_its_state(state, error, message):
    layer = nn.BatchNorm1d(3)
    with pytest.raises(error, match=re.escape(message)):
        layer(layer.init(random.key(0)), state, torch.ones(4, 3), train=False)


BAD_FIELDS = [
    ({"num_features": 0}, ValueError, "BatchNorm2d: expected num_features >= 1, got 0"),
    ({"num_features": 2, "eps": -1.0}, ValueError, "BatchNorm2d: expected eps >= 0, got -1.0"),
    ({"num_features": 2, "momentum": 1.5}, ValueError, "BatchNorm2d: expected 0 <= momentum <= 1, got 1.5"),
    ({"num_features": 2, "axis_name": 0}, TypeError, "BatchNorm2d: expected axis_name to be a string or a tuple"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD_FIELDS, ids=[message for *_, message in BAD_FIELDS])
def test_batch_norm_refuses_bad_fields(fields, error, message):
    with pytest.raises(error, match=re.escape(message)):
        nn.BatchNorm2d(**fields)


def test_batch_norm_refuses_integers():
    layer = nn.BatchNorm1d(3)
    with pytest.raises(TypeError, match=r"BatchNorm1d: x: expected a floating-point tensor, got torch\.int64"):
        layer(layer.init(random.key(0)), layer.init_state(), torch.ones(4, 3, dtype=torch.int64), train=True)
