"""Text as integers and back: characters of an alphabet, or bytes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["ByteTokenizer", "CharTokenizer"]


@dataclass(frozen=True)
class CharTokenizer:
    """Characters as their places in an alphabet.

    It is its two fields, which JSON and the metadata of a checkpoint can hold:
    ``CharTokenizer(**dataclasses.asdict(tokenizer))``.

    Args:
        alphabet: distinct characters.
        unknown: the one of them that stands for every other character; None makes those an error.
    Raises:
        ValueError: if the alphabet repeats a character, or does not hold ``unknown``.

    >>> tokenizer = CharTokenizer.from_text("hello")
    >>> tokenizer, tokenizer.encode("hole")
    (CharTokenizer(alphabet='ehlo', unknown=None), tensor([1, 3, 2, 0]))
    >>> tokenizer.decode(torch.tensor([1, 0, 2, 2, 3]))
    'hello'
    """

    alphabet: str
    unknown: str | None = None

    def __post_init__(self) -> None:
        twice = sorted({char for char in self.alphabet if self.alphabet.count(char) > 1})
        if twice:
            raise ValueError(f"CharTokenizer: expected an alphabet of distinct characters, got {twice} more than once")
        if self.unknown is not None and (len(self.unknown) != 1 or self.unknown not in self.alphabet):
            raise ValueError(f"CharTokenizer: expected unknown to be a character of the alphabet, got {self.unknown!r}")

    @classmethod
    def from_text(cls, text: str, unknown: str | None = None) -> "CharTokenizer":
        """The alphabet of all characters of a text, and ``unknown``, in their order."""
        return cls("".join(sorted({*text, *(unknown or "")})), unknown)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(self.alphabet)

    def encode(self, text: str) -> Tensor:
        """The tokens of a text: -> (n,) int64.

        Raises:
            TypeError: if the text is no string.
            ValueError: if characters are not of the alphabet and there is no ``unknown``; names them.
        """
        _check_text(text, "CharTokenizer")
        place = {char: i for i, char in enumerate(self.alphabet)}
        if self.unknown is None:
            strangers = sorted(set(text) - set(place))
            if strangers:
                named = ", ".join(repr(char) for char in strangers[:10])
                more = f" and {len(strangers) - 10} more" if len(strangers) > 10 else ""
                raise ValueError(f"CharTokenizer: expected characters of the alphabet, got {named}{more}")
            return torch.tensor([place[char] for char in text], dtype=torch.int64)
        other = place[self.unknown]
        return torch.tensor([place.get(char, other) for char in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens (n,).

        Raises:
            TypeError: if they are no tensor of integers.
            ValueError: if there are other axes, or a token is none of the alphabet.
        """
        return "".join(self.alphabet[token] for token in _listed(tokens, "CharTokenizer", self.vocab_size))


@dataclass(frozen=True)
class ByteTokenizer:
    """The bytes of text in UTF-8, 256 tokens: no alphabet to keep, no unknown character.

    >>> ByteTokenizer().encode("é")
    tensor([195, 169])
    >>> ByteTokenizer().decode(torch.tensor([195, 169]))
    'é'
    """

    vocab_size: ClassVar[int] = 256

    def encode(self, text: str) -> Tensor:
        """The tokens of a text: -> (n,) int64.

        Raises:
            TypeError: if the text is no string.
        """
        _check_text(text, "ByteTokenizer")
        return torch.tensor(list(text.encode()), dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens (n,); what is not UTF-8 becomes U+FFFD.

        Raises:
            TypeError: if they are no tensor of integers.
            ValueError: if there are other axes, or a token is no byte.
        """
        return bytes(_listed(tokens, "ByteTokenizer", self.vocab_size)).decode(errors="replace")


def _check_text(text: str, name: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected text to be a str, got {type(text).__name__}")


def _listed(tokens: Tensor, name: str, vocab_size: int) -> list[int]:
    if not isinstance(tokens, Tensor) or tokens.dtype == torch.bool or tokens.is_floating_point():
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name}: expected tokens to be a tensor of integers, got {got}")
    if tokens.ndim != 1:
        raise ValueError(f"{name}: expected tokens (n,), got {tuple(tokens.shape)}")
    found = tokens.tolist()
    wrong = next((token for token in found if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"{name}: expected tokens in [0, {vocab_size}), got {wrong}")
    return found
