"""Metrics of classifiers and regressors against scikit-learn and loops."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from zoo_case import Draw

from functorch_gen import metrics
from functorch_gen.transforms import grad, jit, vmap

D = Draw(0)
SCORES, LABELS = D(40, 4), D.labels(4, 40)
PREDICTED = D.labels(4, 40)
NEVER = torch.where(PREDICTED == 2, 0, PREDICTED)  # class 2 is never predicted


def close(found, expected) -> None:
    assert found.item() == pytest.approx(expected, rel=1e-14, abs=1e-16)


def test_accuracy_equals_sklearn():
    expected = sk.accuracy_score(LABELS, SCORES.argmax(1))
    close(metrics.accuracy(SCORES, LABELS), expected)
    assert metrics.accuracy(SCORES.argmax(1), LABELS).item() == pytest.approx(expected, rel=1e-7)  # float32


def test_accuracy_counts_every_position():
    scores, labels = D(3, 4, 2, 5), D.labels(4, 3, 2, 5)
    close(metrics.accuracy(scores, labels), (scores.argmax(1) == labels).double().mean().item())
    close(metrics.top_k_accuracy(scores, labels, 1), metrics.accuracy(scores, labels).item())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_accuracy_equals_sklearn(k):
    expected = sk.top_k_accuracy_score(LABELS, SCORES.numpy(), k=k, labels=range(4))
    close(metrics.top_k_accuracy(SCORES, LABELS, k), expected)


def test_constant_scores_are_not_accurate():
    """Ties go to one class each, so a network that says nothing is right as often as chance."""
    labels = torch.arange(40) % 4
    assert metrics.accuracy(torch.zeros(40, 4), labels).item() == 0.25
    assert metrics.top_k_accuracy(torch.zeros(40, 4), labels, 2).item() == 0.5


@pytest.mark.parametrize("predicted", [PREDICTED, NEVER], ids=["all predicted", "one never predicted"])
def test_confusion_matrix_and_its_ratios_equal_sklearn(predicted):
    confusion = metrics.confusion_matrix(LABELS, predicted, 4)
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == sk.confusion_matrix(LABELS, predicted, labels=range(4)).tolist()
    found = torch.stack([metrics.precision(confusion), metrics.recall(confusion), metrics.f1_score(confusion)])
    expected = sk.precision_recall_fscore_support(LABELS, predicted, labels=range(4), zero_division=0)[:3]
    torch.testing.assert_close(found.double(), torch.from_numpy(np.stack(expected)), rtol=1e-7, atol=0)  # float32


def test_confusion_matrix_leaves_out_ignored_labels_and_adds_up():
    labels = torch.where(LABELS == 3, -100, LABELS)
    confusion = metrics.confusion_matrix(labels, PREDICTED, 4)
    assert confusion.tolist()[:3] == metrics.confusion_matrix(LABELS, PREDICTED, 4).tolist()[:3]
    assert confusion[3].tolist() == [0, 0, 0, 0]
    halves = [metrics.confusion_matrix(labels[i::2], PREDICTED[i::2], 4) for i in (0, 1)]
    assert torch.equal(halves[0] + halves[1], confusion)
    assert metrics.confusion_matrix(labels[:0], PREDICTED[:0], 2).tolist() == [[0, 0], [0, 0]]


def test_counts_trace_and_batch():
    count = lambda labels, predicted: metrics.confusion_matrix(labels, predicted, 4)
    pairs = LABELS.reshape(4, 10), PREDICTED.reshape(4, 10)
    expected = torch.stack([count(*pair) for pair in zip(*pairs, strict=True)])
    assert torch.equal(vmap(count)(*pairs), expected)
    assert torch.equal(jit(count, backend="aten")(LABELS, PREDICTED), expected.sum(0))


def calibration_error(probs: list[list[float]], labels: list[int], bins: int) -> float:
    confident: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probs, labels, strict=True):
        confidence = max(row)
        confident.setdefault(math.ceil(confidence * bins), []).append((confidence, row.index(confidence) == label))
    gaps = [abs(sum(hit for _, hit in found) - sum(c for c, _ in found)) for found in confident.values()]
    return sum(gaps) / len(labels)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_expected_calibration_error_is_a_loop_over_bins(bins):
    probs = torch.softmax(2 * SCORES, 1)
    expected = calibration_error(probs.tolist(), LABELS.tolist(), bins)
    close(metrics.expected_calibration_error(probs, LABELS, bins=bins), expected)


def test_calibration_error_of_sure_predictions_is_the_share_of_wrong_ones():
    probs = torch.nn.functional.one_hot(PREDICTED, 4).double()
    wrong = 1 - metrics.accuracy(PREDICTED, LABELS).item()
    assert metrics.expected_calibration_error(probs, LABELS).item() == pytest.approx(wrong, rel=1e-6)


def test_calibration_error_can_be_differentiated():
    """Of sure and wrong predictions it is the mean confidence."""
    x = torch.tensor([[0.2, 0.8], [0.7, 0.3]], dtype=torch.float64)
    gradient = grad(lambda x: metrics.expected_calibration_error(x, torch.tensor([0, 1])))(x)
    assert gradient.tolist() == [[0.0, 0.5], [0.5, 0.0]]


@pytest.mark.parametrize("shape", [(30,), (30, 3)])
def test_regression_metrics_equal_sklearn(shape):
    x, y = D(*shape), D(*shape)
    close(metrics.mean_squared_error(x, y), sk.mean_squared_error(y, x))
    found, expected = metrics.r2_score(x, y), sk.r2_score(y, x)
    assert found.item() == pytest.approx(expected, rel=1e-13)


def test_r2_score_of_constant_targets_equals_sklearn():
    x, y = torch.ones(5, 2), torch.ones(5, 2)
    x[:, 1] = 2
    assert metrics.r2_score(x, y).item() == sk.r2_score(y, x) == 0.5


def test_bfloat16_scores_are_counted_in_float32():
    scores = SCORES.to(torch.bfloat16)
    for found in (metrics.accuracy(scores, LABELS), metrics.top_k_accuracy(scores, LABELS, 2)):
        assert found.dtype == torch.float32
    assert metrics.expected_calibration_error(scores.softmax(1), LABELS).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.accuracy(torch.ones(2, 3), torch.arange(3)),
            r"accuracy: labels: expected shape \(2,\), got \(3,\)",
        ),
        (
            lambda: metrics.accuracy(torch.ones(2), torch.ones(2)),
            r"accuracy: predictions: expected shape \(b, c, ...\), got \(2,\)",
        ),
        (lambda: metrics.top_k_accuracy(SCORES, LABELS, 5), "top_k_accuracy: expected 1 <= k <= 4, got 5"),
        (
            lambda: metrics.confusion_matrix(LABELS, PREDICTED[1:], 4),
            r"confusion_matrix: labels: expected shape \(39,\), got \(40,\)",
        ),
        (
            lambda: metrics.confusion_matrix(LABELS, PREDICTED, 0),
            "confusion_matrix: expected num_classes > 0, got -?0",
        ),
        (lambda: metrics.precision(torch.ones(2, 3)), r"precision: confusion: expected shape \(c, c\), got \(2, 3\)"),
        (
            lambda: metrics.expected_calibration_error(SCORES, LABELS, bins=0),
            "expected_calibration_error: expected bins > 0, got 0",
        ),
        (
            lambda: metrics.r2_score(torch.ones(2), torch.ones(3)),
            r"r2_score: targets: expected shape \(2,\), got \(3,\)",
        ),
    ],
)
def test_error_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.accuracy(torch.ones(2, 3), torch.ones(2)),
            "accuracy: labels: expected a tensor of integers, got torch.float32",
        ),
        (lambda: metrics.accuracy([1], LABELS), "accuracy: predictions: expected a floating-point tensor, got list"),
        (
            lambda: metrics.confusion_matrix(LABELS.float(), PREDICTED, 4),
            "confusion_matrix: labels: expected a tensor of classes, got torch.float32",
        ),
        (
            lambda: metrics.mean_squared_error(torch.ones(2), [1.0]),
            "mean_squared_error: targets: expected a tensor, got list",
        ),
    ],
    ids=["scores", "list", "confusion", "targets"],
)
def test_error_names_the_argument_of_the_wrong_type(call, message):
    with pytest.raises(TypeError, match=message):
        call()
