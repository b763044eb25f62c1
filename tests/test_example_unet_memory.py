"""examples/unet_memory.py: what it measures, a tiny run; the whole of it, slow."""

import json

import pytest
import torch
import unet_memory as example
from PIL import Image

TINY = {"side": 8, "batch_sizes": "2", "widths": "8", "num_blocks": 1, "calls": 1, "backend": "aten"}


def test_it_writes_metrics_and_a_picture(tmp_path):
    metrics = example.main(example.Config(out=str(tmp_path), **TINY))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    (row,) = metrics.values()
    for name in ("without", "with"):
        assert row[f"measured MB, {name}"] == pytest.approx(row[f"predicted MB, {name}"], rel=0.02)
    with Image.open(tmp_path / "memory.png") as image:
        assert min(image.size) > 100


def test_live_bytes_rise_and_fall():
    def run() -> torch.Tensor:
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return torch.cat([b[:1], b[1:2]])

    live = example.live_bytes(run)
    assert max(live) == pytest.approx(8_000_000, abs=100)  # a and b
    assert max(live[-2:]) <= 4_008_100  # b and the result, which is dropped too


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="Config: expected widths > 0, got 0"):
        example.Config(widths="8,0")


@pytest.mark.slow  # compiles six programs
def test_remat_needs_less_memory_and_more_time(tmp_path):
    rows = example.main(example.Config(out=str(tmp_path)))
    for row in rows.values():
        assert row["predicted MB, with"] < 0.85 * row["predicted MB, without"]
        for name in ("without", "with"):
            if f"measured MB, {name}" in row:
                assert row[f"predicted MB, {name}"] == pytest.approx(row[f"measured MB, {name}"], rel=0.15)
