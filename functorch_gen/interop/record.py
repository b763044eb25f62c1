"""What a call of a module draws and writes."""

from torch import Tensor

from functorch_gen import random
from functorch_gen.typing import Key

__all__ = ["Record"]


class Record:
    """Keys for the draws of one call, and new values for its buffers.

    >>> import torch
    >>> record = Record(random.key(0))
    >>> torch.equal(record.next_key("dropout"), random.fold_in(random.key(0), 0))
    True
    """

    def __init__(self, key: Key | None):
        self.key = key
        self._draws = 0
        self._written: list[tuple[Tensor, Tensor]] = []  # buffers and their new values

    def next_key(self, name: str) -> Key:
        """The key of the n-th draw, ``fold_in(key, n)``; raises TypeError if there is none to fold into."""
        if self.key is None:
            raise TypeError(f"from_module: expected a key, for forward calls {name}; got None")
        self._draws += 1
        return random.fold_in(self.key, self._draws - 1)

    def write(self, buffer: Tensor, new: Tensor) -> None:
        """Gives a buffer a new value, which need not fit into its memory (under ``vmap`` there are many)."""
        self._written.append((buffer, new))

    def value(self, buffer: Tensor) -> Tensor:
        """The newest value of a buffer."""
        for old, new in reversed(self._written):
            if old is buffer:
                return new
        return buffer
