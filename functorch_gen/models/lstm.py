"""LSTM over tokens: a class for each sequence, or a prediction at each step."""

from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

from functorch_gen.check import check_choice
from functorch_gen.nn import LSTM, Bound, Dropout, Embedding, Linear, init_parts
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.typing import Key, Layer, Params

__all__ = ["LSTMModel"]


@dataclass(frozen=True)
class LSTMModel:
    """Embedding, stacked LSTM, linear head: (..., l) tokens -> (..., out_features) or (..., l, out_features).

    Args:
        num_embeddings: how many tokens there are.
        dropout: of the LSTM's inputs, of its outputs, and between its layers, when a key is given.
        readout: what the head reads: "last", the last state, of both directions where there are two (classification);
            or "all", the output at each step (language models, tagging).
    Source: Zaremba et al. 2014, arXiv:1409.2329.

    >>> import torch
    >>> from functorch_gen import random
    >>> model = LSTMModel(10, 2, embed_dim=4, hidden_size=8, bidirectional=True)
    >>> tokens, lengths = torch.tensor([[3, 1, 4], [1, 5, 0]]), torch.tensor([3, 2])
    >>> model(model.init(random.key(0)), tokens, lengths=lengths).shape
    torch.Size([2, 2])
    """

    num_embeddings: int
    out_features: int
    embed_dim: int = 128
    hidden_size: int = 256
    num_layers: int = 1
    dropout: float = 0.0
    bidirectional: bool = False
    readout: str = "last"

    def __post_init__(self) -> None:
        check_sizes("LSTMModel", num_embeddings=self.num_embeddings, out_features=self.out_features)
        check_sizes("LSTMModel", embed_dim=self.embed_dim, hidden_size=self.hidden_size, num_layers=self.num_layers)
        check_choice("LSTMModel", "readout", self.readout, ("last", "all"))
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"LSTMModel: expected 0 <= dropout <= 1, got {self.dropout}")

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        options: dict[str, Any] = {"dropout": self.dropout, "bidirectional": self.bidirectional}
        return {
            "embedding": Embedding(self.num_embeddings, self.embed_dim),
            "dropout": Dropout(self.dropout),
            "lstm": LSTM(self.embed_dim, self.hidden_size, self.num_layers, **options),
            "head": Linear(self._directions * self.hidden_size, self.out_features),
        }

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Tensor, *, lengths: Tensor | None = None, key: Key | None = None) -> Tensor:
        """(..., l) integers -> (..., out_features), or (..., l, out_features) with readout "all".

        Args:
            lengths: (...) integers: how many tokens of each sequence count.
            key: draws the dropout.
        """
        return self.run(params, x, lengths=lengths, key=key)[0]

    def run(
        self,
        params: Params,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        key: Key | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What a call returns, and the last state, from which the next piece of a text goes on.

        Args:
            state: (h, c) of :class:`~functorch_gen.nn.LSTM`; zeros when None.

        >>> import torch
        >>> from functorch_gen import random
        >>> model = LSTMModel(10, 10, embed_dim=4, hidden_size=8, readout="all")
        >>> params, tokens = model.init(random.key(0)), torch.tensor([3, 1, 4, 1])
        >>> first, state = model.run(params, tokens[:2])
        >>> rest, _ = model.run(params, tokens[2:], state)
        >>> torch.allclose(torch.cat([first, rest]), model(params, tokens), atol=1e-6)
        True
        """
        f = Bound(self.parts, params, key=key)
        y, (h, c) = f.lstm(f.dropout(f.embedding(x)), state, lengths=lengths)
        if self.readout == "last":
            y = rearrange(h[-self._directions :], "directions ... h -> ... (directions h)")
        return f.head(f.dropout(y)), (h, c)
