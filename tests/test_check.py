"""check: what each check lets pass, and the words of its errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functorch_gen.check import check_choice, check_floating, check_positive, check_shape


@given(st.lists(st.integers(0, 4), max_size=5), st.integers(0, 5))
def test_check_shape_returns_the_named_sizes(shape, skipped):
    axes = [f"axis{i}" for i in range(len(shape))]
    x = torch.empty(shape)
    assert check_shape(x, " ".join(axes), "f") == dict(zip(axes, shape, strict=True))
    named = axes[skipped:]
    expected = dict(zip(named, shape[skipped:], strict=True))
    assert check_shape(x, " ".join(["...", *named]), "f", **expected) == expected


@pytest.mark.parametrize(
    ("shape", "pattern", "sizes", "message"),
    [
        ((2, 4), "b c", {"c": 3}, r"f: expected shape \(b, c=3\), got \(2, 4\)"),
        ((2,), "b c", {}, r"f: expected shape \(b, c\), got \(2,\)"),
        ((2, 3, 1), "b c", {}, r"f: expected shape \(b, c\), got \(2, 3, 1\)"),
        ((), "... c", {}, r"f: expected shape \(..., c\), got \(\)"),
        ((2, 3), "n n", {}, r"f: expected shape \(n, n\), got \(2, 3\)"),
        ((2, 3), "b 2", {}, r"f: expected shape \(b, 2\), got \(2, 3\)"),
        ((2, 3), "b", {}, r"f: expected shape \(b,\), got \(2, 3\)"),
    ],
)
def test_check_shape_says_what_it_expected(shape, pattern, sizes, message):
    with pytest.raises(ValueError, match=message):
        check_shape(torch.empty(shape), pattern, "f", **sizes)


def test_check_shape_accepts_repeated_and_numbered_axes():
    assert check_shape(torch.empty(3, 3, 2), "n n 2", "f") == {"n": 3, "2": 2}


def test_check_shape_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"f: expected a tensor of shape \(b, c=3\), got list"):
        check_shape([[1.0]], "b c", "f", c=3)  # pyright: ignore[reportArgumentType]


def test_check_shape_traces():
    def f(x):
        return x * check_shape(x, "b c", "f", c=3)["b"]

    x = torch.ones(2, 3)
    assert torch.compile(f, fullgraph=True, backend="eager")(x).equal(2 * x)
    assert torch.func.vmap(lambda x: x * check_shape(x, "c", "f", c=3)["c"])(x).equal(3 * x)


@pytest.mark.parametrize("value", [1, 0.5, 1e-300, float("inf")])
def test_check_positive_accepts(value):
    check_positive("f", rate=value)


@pytest.mark.parametrize("value", [0, -1, -0.5, float("nan")])
def test_check_positive_refuses_zero_negative_and_nan(value):
    with pytest.raises(ValueError, match=f"f: expected rate > 0, got {value}"):
        check_positive("f", size=1, rate=value)


@pytest.mark.parametrize("value", [True, "1", None, torch.ones(())])
def test_check_positive_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match=f"f: expected rate to be a number > 0, got {type(value).__name__}"):
        check_positive("f", rate=value)


def test_check_choice_lists_the_choices():
    check_choice("f", "mode", "a", iter(("a", "b")))
    with pytest.raises(ValueError, match="f: expected mode to be one of 'a', 'b', got 'c'"):
        check_choice("f", "mode", "c", iter(("a", "b")))


def test_check_floating_refuses_other_dtypes_and_types():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        check_floating(torch.ones(1, dtype=dtype), "f: x")
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"f: x: expected a floating-point tensor, got {dtype}"):
            check_floating(torch.ones(1, dtype=dtype), "f: x")
    with pytest.raises(TypeError, match="f: x: expected a floating-point tensor, got float"):
        check_floating(1.0, "f: x")  # pyright: ignore[reportArgumentType]
