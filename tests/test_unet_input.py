"""What the U-Net refuses, and the functions on its labels."""

from typing import Any

import pytest
import torch

from functorch_gen import random
from functorch_gen.models import UNet, check_labels, drop_labels


def config(**changes: Any) -> dict[str, Any]:
    """Sizes of a small U-Net."""
    return {"base_channels": 8, "num_blocks": 1, "num_heads": 2, "num_classes": 3, "num_groups": 4} | changes


BAD_SIZES: list[tuple[dict[str, Any], str]] = [
    ({"attention_levels": (2,)}, r"UNet: expected attention_levels in 0\.\.1, got \(2,\)"),
    ({"attention_levels": (-1,)}, r"UNet: expected attention_levels in 0\.\.1, got \(-1,\)"),
    ({"base_channels": 12, "num_groups": 8}, r"UNet: expected channels of level 0 divisible by num_groups=8, got 12"),
    ({"num_heads": 3}, r"UNet: expected channels of level 1 divisible by num_heads=3, got 16"),
    ({"base_channels": 3, "num_groups": 1, "num_heads": 1}, r"UNet: expected base_channels to be even, got 3"),
    ({"channel_mults": ()}, r"UNet: expected channel_mults with at least 1 sizes"),
    ({"num_blocks": 0}, r"UNet: expected num_blocks >= 1, got 0"),
    ({"num_classes": 0}, r"UNet: expected num_classes >= 1, got 0"),
    ({"embed_dim": 0}, r"UNet: expected embed_dim >= 1, got 0"),
    ({"dropout": 1.5}, r"UNet: expected 0 <= dropout <= 1, got 1\.5"),
    ({"time_scale": 0.0}, r"UNet: expected time_scale > 0, got 0\.0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SIZES)
def test_unet_refuses_bad_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(1, **config(**changes))


X, T, LABEL = torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
BAD_INPUTS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((torch.zeros(2, 3, 8, 8), T), ValueError, r"UNet: x: expected shape \(b, c=1, h, w\), got \(2, 3, 8, 8\)"),
    ((X[0], T), ValueError, r"UNet: x: expected shape"),
    (
        (torch.zeros(2, 1, 7, 7), T),
        ValueError,
        r"UNet: x: expected height and width divisible by 2, got \(2, 1, 7, 7\)",
    ),
    ((torch.zeros(2, 1, 8, 7), T), ValueError, r"divisible by 2, got \(2, 1, 8, 7\)"),
    ((X, torch.zeros(3)), ValueError, r"UNet: t: expected shape \(b=2,\), got \(3,\)"),
    ((X, torch.zeros(())), ValueError, r"UNet: t: expected shape \(b=2,\), got \(\)"),
    ((X, 0.5), TypeError, r"UNet: t: expected a tensor"),
    ((X, LABEL), TypeError, r"UNet: t: expected a floating-point tensor, got torch.int64"),
    ((X, T, LABEL[:1]), ValueError, r"UNet: label: expected shape \(b=2,\), got \(1,\)"),
    ((X, T, LABEL.float()), TypeError, r"UNet: label: expected an int64 or int32 tensor, got torch.float32"),
    ((X, T, 3), TypeError, r"UNet: label: expected a tensor"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD_INPUTS)
def test_unet_refuses_bad_inputs(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    unet = UNet(1, **config())
    with pytest.raises(error, match=message):
        unet(unet.init(random.key(0)), *args)


def test_unet_without_classes_refuses_labels() -> None:
    unet = UNet(1, **config(num_classes=None))
    with pytest.raises(ValueError, match="UNet: label: expected None without num_classes, got a tensor"):
        unet(unet.init(random.key(0)), X, T, LABEL)


# Labels.


@pytest.mark.parametrize("labels", [[], [0], [0, 9, 10]])
def test_check_labels_accepts_classes_and_none(labels: list[int]) -> None:
    check_labels(torch.tensor(labels, dtype=torch.int64), 10)


@pytest.mark.parametrize(("labels", "message"), [([1, -1], "got -1 at index 1"), ([11], "got 11 at index 0")])
def test_check_labels_names_the_first_out_of_range(labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"expected labels in 0\.\.10, {message}"):
        check_labels(torch.tensor(labels), 10)


@pytest.mark.parametrize("labels", [torch.zeros(2), [0, 1]])
def test_check_labels_refuses_other_types(labels: Any) -> None:
    with pytest.raises(TypeError, match="check_labels: label: expected an int64 or int32 tensor"):
        check_labels(labels, 10)


def test_drop_labels_drops_at_the_given_rate() -> None:
    n, rate = 40_000, 0.2
    label = torch.arange(n) % 10
    dropped = drop_labels(random.key(0), label, rate, 10)
    gone = dropped == 10
    assert torch.equal(dropped[~gone], label[~gone])
    assert abs(gone.double().mean().item() - rate) < 5 * (rate * (1 - rate) / n) ** 0.5  # five standard errors


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_drop_labels_keeps_dtype_and_at_rate_zero_the_labels(dtype: torch.dtype) -> None:
    label = torch.arange(5, dtype=dtype)
    assert torch.equal(drop_labels(random.key(0), label, 0.0, 10), label)
    assert drop_labels(random.key(0), label, 0.5, 10).dtype == dtype
