"""Connectionist temporal classification: the likelihood of a sequence of labels whose alignment is unknown."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from functorch_gen.check import check_floating, check_shape
from functorch_gen.losses.per_example import check_integers, in_float32
from functorch_gen.transforms import scan

__all__ = ["ctc_loss"]

_NEVER = -1e30  # log of 0 for paths that do not exist: finite, so that differences of two of them are


@in_float32
def ctc_loss(
    logits: Tensor,
    labels: Tensor,
    input_lengths: Tensor | None = None,
    label_lengths: Tensor | None = None,
    *,
    blank: int = 0,
    zero_infinity: bool = False,
) -> Tensor:
    """-log of the probability of all alignments that read ``labels``: (b, t, c), (b, s) -> (b,).

    An alignment gives each frame a label or the blank; it reads as its labels without blanks, repeats merged. The sum
    over alignments is the forward recursion of eq. 6 in the log domain, a :func:`scan`, so all derivatives exist.

    Equals ``torch.nn.functional.ctc_loss(reduction="none")`` of ``logits.log_softmax(2)`` with the first two axes
    swapped, in value and gradient. Log-probabilities are logits too, whose softmax changes nothing; torch's gradient in
    them is that of the logits. Where torch's ``reduction="mean"`` divides by the lengths of the labels, do so.

    Args:
        labels: integers other than ``blank``; what is behind the length of a row is not looked at.
        input_lengths: how many frames each example has, (b,); by default all.
        label_lengths: how many labels each example has, (b,); by default all.
        blank: the class of no label.
        zero_infinity: labels that do not fit into the frames cost 0 instead of infinity; their gradient is 0 in any
            case.
    Raises:
        TypeError: if the logits are not floating, or the labels no integers.
        ValueError: if a shape differs, or ``blank`` is no class.
    Source: Graves et al. 2006, Connectionist temporal classification.

    >>> ctc_loss(torch.zeros(1, 2, 2), torch.tensor([[1]]))  # -log(3 / 4): of four alignments, one is empty
    tensor([0.2877])
    """
    b, t, c = check_shape(logits, "b t c", "ctc_loss: logits").values()
    check_floating(logits, "ctc_loss: logits")
    s = check_shape(labels, "b s", "ctc_loss: labels", b=b)["s"]
    check_integers("ctc_loss: labels", labels, (b, s))
    if not 0 <= blank < c:
        raise ValueError(f"ctc_loss: expected 0 <= blank < {c}, got {blank}")
    input_lengths = _lengths("input_lengths", input_lengths, t, labels)
    label_lengths = _lengths("label_lengths", label_lengths, s, labels)
    states = _with_blanks(labels, label_lengths, blank)
    log_probs = torch.log_softmax(logits, 2).clamp(min=_NEVER)
    emitted = log_probs.gather(2, repeat(states, "b n -> b t n", t=t))
    total = _final(_forward(emitted, states, input_lengths), label_lengths)
    return torch.where(total < _NEVER / 2, 0.0 if zero_infinity else math.inf, -total)


def _lengths(name: str, lengths: Tensor | None, size: int, labels: Tensor) -> Tensor:
    if lengths is None:
        return labels.new_full(labels.shape[:1], size, dtype=torch.int64)
    check_integers(f"ctc_loss: {name}", lengths, (labels.shape[0],))
    return lengths


def _with_blanks(labels: Tensor, label_lengths: Tensor, blank: int) -> Tensor:
    """Blanks before, between and after the labels: (b, s), (b,) -> (b, 2 s + 1); blanks behind the length."""
    exists = torch.arange(labels.shape[1], device=labels.device) < rearrange(label_lengths, "b -> b 1")
    labels = torch.where(exists, labels, blank).long()
    pairs = torch.stack([torch.full_like(labels, blank), labels], 2)
    return F.pad(rearrange(pairs, "b s two -> b (s two)"), (0, 1), value=blank)


def _forward(emitted: Tensor, states: Tensor, input_lengths: Tensor) -> Tensor:
    """log alpha after the last frame: (b, t, n), (b, n), (b,) -> (b, n).

    alpha_t(n) = p_t(n) (alpha(n) + alpha(n - 1) + alpha(n - 2)), the last where state n is a label other than that of
    state n - 2: blanks between two different labels may be left out.
    """
    n = states.shape[1]
    skips = F.pad(states[:, 2:] != states[:, :-2], (2, 0))[:, :n]

    def behind(alpha: Tensor, k: int) -> Tensor:
        return F.pad(alpha, (k, 0), value=_NEVER)[:, :n]

    def step(alpha: Tensor, frame: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        time, log_prob = frame
        skipped = torch.where(skips, behind(alpha, 2), _NEVER)
        moved = torch.logsumexp(torch.stack([alpha, behind(alpha, 1), skipped]), 0)
        return torch.where(rearrange(time < input_lengths, "b -> b 1"), moved + log_prob, alpha), None

    start = F.pad(torch.zeros_like(states[:, :1], dtype=emitted.dtype), (0, n - 1), value=_NEVER)
    frames = torch.arange(emitted.shape[1], device=emitted.device), rearrange(emitted, "b t n -> t b n")
    return scan(step, start, frames)[0]


def _final(alpha: Tensor, label_lengths: Tensor) -> Tensor:
    """log of the sum of alpha at the last label and at the blank behind it: (b, n), (b,) -> (b,)."""
    last = 2 * rearrange(label_lengths, "b -> b 1").long()
    behind = alpha.gather(1, last)
    label = torch.where(last > 0, alpha.gather(1, (last - 1).clamp(min=0)), _NEVER)
    return torch.logsumexp(torch.cat([behind, label], 1), 1)
