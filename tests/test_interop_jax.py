"""Trees of tensors as trees of JAX arrays, and back."""

import sys

import pytest
import torch

from functorch_gen import interop, random, tree

NO_JAX = "jax is of the bench extra, which the tests do without"
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_jax_arrays_have_the_values_and_come_back(dtype):
    pytest.importorskip("jax", reason=NO_JAX)
    x = {"a": torch.tensor([0.0, 1.0, 3.0]).to(dtype), "b": [torch.tensor([[1.0, 2.0], [0.0, 4.0]]).to(dtype).T]}
    arrays = interop.to_jax(x)
    assert arrays["a"].dtype.name == str(dtype).removeprefix("torch.")
    assert arrays["a"].tolist() == x["a"].tolist()
    assert arrays["b"][0].tolist() == x["b"][0].tolist()
    assert tree.equal(interop.from_jax(arrays), x)


def test_jax_arrays_share_memory():
    pytest.importorskip("jax", reason=NO_JAX)
    x = torch.ones(1000)
    assert interop.from_jax(interop.to_jax({"x": x}))["x"].data_ptr() == x.data_ptr()


def test_tensors_with_gaps_or_history_go_to_jax():
    pytest.importorskip("jax", reason=NO_JAX)
    x = torch.arange(6.0).reshape(2, 3)
    odd = {"gap": x[:, ::2], "spread": x[0, 1].expand(2), "grad": x.clone().requires_grad_(), "text": "stays"}
    found = interop.to_jax(odd)
    assert found["gap"].tolist() == [[0.0, 2.0], [3.0, 5.0]]
    assert found["spread"].tolist() == [1.0, 1.0]
    assert found["grad"].tolist() == x.tolist()
    assert found["text"] == "stays"


def test_64_bits_need_jax_to_be_set_so():
    jax = pytest.importorskip("jax", reason=NO_JAX)
    with pytest.raises(TypeError, match=r"to_jax: expected jax_enable_x64 to be set for torch\.float64 at 'w'"):
        interop.to_jax({"w": torch.ones(1, dtype=torch.float64)})
    with jax.enable_x64(True):
        assert interop.to_jax({"w": torch.ones(1, dtype=torch.float64)})["w"].dtype == "float64"


def test_keys_cross_with_their_draws():
    jax = pytest.importorskip("jax", reason=NO_JAX)
    raw = interop.to_jax(random.key(7).view(torch.uint32))
    theirs = jax.random.uniform(jax.random.wrap_key_data(raw), (4,))
    assert theirs.tolist() == random.uniform(random.key(7), (4,)).tolist()
    back = interop.from_jax(jax.random.key_data(jax.random.key(7))).view(torch.int32)
    assert torch.equal(back, random.key(7))
    with pytest.raises(
        TypeError, match=r"from_jax: expected an array of numbers at 'key', got key<.*>; use jax.random.key_data"
    ):
        interop.from_jax({"key": jax.random.key(7)})


@pytest.mark.parametrize("convert", [interop.to_jax, interop.from_jax], ids=lambda f: f.__name__)
def test_missing_jax_is_an_error_that_says_what_to_install(convert, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)  # as import finds it where it is not installed
    with pytest.raises(ImportError, match=rf"{convert.__name__}: expected jax to be installed: pip install jax"):
        convert({"w": torch.ones(1)})
