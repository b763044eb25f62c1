"""Trees of tensors and trees of JAX arrays, through DLPack: no copy where the device and the layout allow."""

import importlib
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.typing import Tree

__all__ = ["from_jax", "to_jax"]

_WIDE = (torch.float64, torch.int64, torch.uint64, torch.complex128)


def _jax(name: str) -> Any:
    try:
        return importlib.import_module("jax")
    except ImportError as error:
        raise ImportError(f"{name}: expected jax to be installed: pip install jax, or functorch_gen[bench]") from error


def to_jax(whole: Tree) -> Tree:
    """A tree of tensors as one of JAX arrays, on the same device and of the same dtypes; other leaves stay.

    The arrays share the tensors' memory where they lie without gaps, and JAX takes them to be constant: write no more
    into the tensors, and donate neither. A key, (2,) int32, is a JAX key as ``to_jax(key.view(torch.uint32))``.

    Raises:
        ImportError: if jax is not installed.
        TypeError: if a leaf has 64 bits and JAX is set to 32 (it would be cut); names its path.

    >>> to_jax({"w": torch.ones(2)})  # doctest: +SKIP
    {'w': Array([1., 1.], dtype=float32)}
    """
    jax = _jax("to_jax")

    def convert(path: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dtype in _WIDE and not jax.config.jax_enable_x64:
            raise TypeError(f"to_jax: expected jax_enable_x64 to be set for {x.dtype} at {path!r}; set it, or cast")
        return jax.dlpack.from_dlpack(x.detach().resolve_conj().contiguous())

    return tree.map_with_path(convert, whole)


def from_jax(whole: Tree) -> Tree:
    """A tree of JAX arrays as one of tensors, on the same device and of the same dtypes; other leaves stay.

    The tensors share the arrays' memory, which JAX takes to be constant: ``clone`` what you want to write into. A JAX
    key, uint32, is a key here as ``from_jax(jax.random.key_data(key)).view(torch.int32)``.

    Raises:
        ImportError: if jax is not installed.
        TypeError: if a leaf is an array of typed keys; names its path.

    >>> import jax  # doctest: +SKIP
    >>> from_jax({"w": jax.numpy.ones(2)})  # doctest: +SKIP
    {'w': tensor([1., 1.])}
    """
    jax = _jax("from_jax")

    def convert(path: str, x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
            raise TypeError(
                f"from_jax: expected an array of numbers at {path!r}, got {x.dtype}; use jax.random.key_data"
            )
        return torch.from_dlpack(x)

    return tree.map_with_path(convert, whole)
