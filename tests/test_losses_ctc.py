"""CTC against torch, against a sum over all alignments, and its second derivatives, which torch has not."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from zoo_case import Draw

from functorch_gen import losses
from functorch_gen.transforms import grad, hessian, hvp, jacfwd, jacrev, jit, jvp, vmap

# Repeated labels, one, none, as many as frames; a last row of more than fit in its frames.
LABELS = torch.tensor([[1, 1, 3, 2], [2, 3, 2, 1], [4, 0, 0, 0], [0, 0, 0, 0], [3, 3, 1, 2]])
INPUT_LENGTHS = torch.tensor([6, 4, 6, 3, 4])
LABEL_LENGTHS = torch.tensor([4, 4, 1, 0, 4])


def logits(seed: int = 0, b: int = 5, t: int = 6, c: int = 5) -> Tensor:
    return 2 * Draw(seed)(b, t, c)


def ours(x: Tensor, **settings) -> Tensor:
    return losses.ctc_loss(x, LABELS, INPUT_LENGTHS, LABEL_LENGTHS, **settings)


def torchs(x: Tensor, **settings) -> Tensor:
    log_probs = torch.log_softmax(x, 2).transpose(0, 1)
    return F.ctc_loss(log_probs, LABELS, INPUT_LENGTHS, LABEL_LENGTHS, reduction="none", **settings)


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_loss_equals_torch(zero_infinity):
    found, expected = ours(logits(), zero_infinity=zero_infinity), torchs(logits(), zero_infinity=zero_infinity)
    assert (expected == (0.0 if zero_infinity else math.inf)).tolist() == [False, False, False, False, True]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)  # roundings of float64


def test_gradient_equals_torch():
    x = logits().requires_grad_()
    (expected,) = torch.autograd.grad(torchs(x, zero_infinity=True).sum(), x)
    found = grad(lambda x: ours(x, zero_infinity=True).sum())(x.detach())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_gradient_in_log_probabilities_equals_torchs():
    """Torch's takes it that they come from a log_softmax."""
    log_probs = torch.log_softmax(logits(), 2).requires_grad_()
    loss = F.ctc_loss(
        log_probs.transpose(0, 1), LABELS, INPUT_LENGTHS, LABEL_LENGTHS, reduction="sum", zero_infinity=True
    )
    (expected,) = torch.autograd.grad(loss, log_probs)
    found = grad(lambda x: ours(x, zero_infinity=True).sum())(log_probs.detach())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("batch", [3, 1, 0])
def test_lengths_are_the_sizes_by_default(batch, blank):
    x, labels = logits(1, batch), (Draw(2).labels(4, batch, 2) + blank + 1) % 5
    full = [torch.full((batch,), size) for size in (6, 2)]
    expected = (
        F.ctc_loss(torch.log_softmax(x, 2).transpose(0, 1), labels, *full, blank=blank, reduction="none")
        if batch
        else torch.zeros(0, dtype=torch.float64)
    )
    torch.testing.assert_close(losses.ctc_loss(x, labels, blank=blank), expected, rtol=1e-13, atol=1e-13)


def test_empty_labels_cost_the_blanks():
    x = logits()
    found = losses.ctc_loss(x, torch.zeros(5, 0, dtype=torch.int64))
    torch.testing.assert_close(found, -torch.log_softmax(x, 2)[:, :, 0].sum(1), rtol=1e-14, atol=0)


def test_no_frames_read_as_nothing():
    labels, lengths = torch.ones(2, 1, dtype=torch.int64), torch.tensor([0, 1])
    assert losses.ctc_loss(torch.zeros(2, 0, 3), labels, label_lengths=lengths).tolist() == [0.0, math.inf]


def reads_as(alignment: tuple[int, ...]) -> list[int]:
    return [label for label, _ in itertools.groupby(alignment) if label != 0]


def by_enumeration(x: Tensor, labels: list[int]) -> Tensor:
    """-log of the sum over all alignments: (t, c) -> ()."""
    log_probs = torch.log_softmax(x, 1)
    frames = range(x.shape[0])
    terms = [
        sum(log_probs[i, label] for i, label in zip(frames, alignment, strict=True))
        for alignment in itertools.product(range(x.shape[1]), repeat=x.shape[0])
        if reads_as(alignment) == labels
    ]
    return -torch.logsumexp(torch.stack(terms), 0)


@pytest.mark.parametrize("labels", [[1, 1], [1, 2], [2], []])
def test_loss_and_two_derivatives_equal_the_sum_over_alignments(labels):
    x = logits(3, 4, 3, 1).reshape(4, 3)
    rows = torch.tensor([labels], dtype=torch.int64)
    loss = lambda x: losses.ctc_loss(x[None], rows)[0]
    plain = lambda x: by_enumeration(x, labels)
    torch.testing.assert_close(loss(x), plain(x), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad(loss)(x), grad(plain)(x), rtol=1e-12, atol=1e-13)
    expected = hessian(plain)(x)
    for curvature in (hessian(loss), jacrev(jacrev(loss)), jacrev(jacfwd(loss))):
        torch.testing.assert_close(curvature(x), expected, rtol=1e-11, atol=1e-13)


def test_transforms_compose():
    x, v = logits(), logits(5)
    total = lambda x: ours(x, zero_infinity=True).sum()
    expected = grad(total)(x)
    torch.testing.assert_close(jit(grad(total), backend="aten")(x), expected, rtol=1e-12, atol=1e-13)
    one = lambda x, labels, n, s: losses.ctc_loss(x[None], labels[None], n[None], s[None], zero_infinity=True)[0]
    mapped = vmap(grad(one))(x, LABELS, INPUT_LENGTHS, LABEL_LENGTHS)
    torch.testing.assert_close(mapped, expected, rtol=1e-12, atol=1e-13)
    tangent = jvp(grad(total), (x,), (v,))[1]
    torch.testing.assert_close(hvp(total, (x,), (v,)), tangent, rtol=1e-11, atol=1e-12)
    assert torch.equal(grad(total)(x)[4], torch.zeros(6, 5, dtype=torch.float64))  # of the row that does not fit


@pytest.mark.slow
def test_compiled_loss_equals_eager():
    x = logits()
    loss = lambda x: ours(x, zero_infinity=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(jit(loss)(x), loss(x), rtol=1e-13, atol=1e-13)


def test_masked_classes_do_not_matter():
    """A logit of -inf is a class that never comes."""
    x = torch.cat([logits(), torch.full((5, 6, 1), -math.inf, dtype=torch.float64)], 2)
    torch.testing.assert_close(ours(x), ours(logits()), rtol=1e-14, atol=0)
    gradient = grad(lambda x: ours(x, zero_infinity=True).sum())(x)
    torch.testing.assert_close(gradient[:, :, :5], grad(lambda x: ours(x, zero_infinity=True).sum())(logits()))
    assert torch.equal(gradient[:, :, 5], torch.zeros(5, 6, dtype=torch.float64))
    never = x.clone()
    never[2, :, 4] = -math.inf  # its only label
    assert ours(never)[2].item() == math.inf


def test_long_sequences_keep_float32():
    x = logits(7, 2, 300, 5).float()
    labels = Draw(8).labels(4, 2, 40) + 1
    exact = losses.ctc_loss(x.double(), labels)
    torch.testing.assert_close(losses.ctc_loss(x, labels).double(), exact, rtol=1e-5, atol=0)  # 300 roundings
    assert losses.ctc_loss(x.to(torch.bfloat16), labels).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: losses.ctc_loss(torch.zeros(2, 3), torch.zeros(2, 1).long()),
            ValueError,
            r"ctc_loss: logits: expected shape \(b, t, c\), got \(2, 3\)",
        ),
        (
            lambda: losses.ctc_loss(torch.zeros(2, 3, 4), torch.zeros(3, 1).long()),
            ValueError,
            r"ctc_loss: labels: expected shape \(b=2, s\), got \(3, 1\)",
        ),
        (
            lambda: losses.ctc_loss(torch.zeros(2, 3, 4), torch.zeros(2, 1)),
            TypeError,
            "ctc_loss: labels: expected a tensor of integers, got torch.float32",
        ),
        (
            lambda: losses.ctc_loss(torch.zeros(2, 3, 4), torch.zeros(2, 1).long(), torch.tensor([3])),
            ValueError,
            r"ctc_loss: input_lengths: expected shape \(2,\), got \(1,\)",
        ),
        (
            lambda: losses.ctc_loss(torch.zeros(1, 3, 4), torch.zeros(1, 1).long(), None, torch.ones(1)),
            TypeError,
            "ctc_loss: label_lengths: expected a tensor of integers, got torch.float32",
        ),
        (
            lambda: losses.ctc_loss(torch.zeros(2, 3, 4), torch.zeros(2, 1).long(), blank=4),
            ValueError,
            "ctc_loss: expected 0 <= blank < 4, got 4",
        ),
    ],
)
def test_error_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
