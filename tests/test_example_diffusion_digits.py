"""The demo's other choices, its bound in nats and their table; tests/test_examples.py has the rest of the demo."""

import math

import diffusion_choices
import diffusion_digits as demo
import digits
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from digits_bound import bound_nats

import functorch_gen as fg

TINY = {"steps": 2, "base_channels": 8, "batch_size": 8, "sample_steps": 2, "samples_per_class": 30, "sample_every": 2}
LEVELS = torch.arange(17) / 8 - 1


def grey_levels(part: slice) -> torch.Tensor:
    """Of each pixel: (n, 64), 0 to 16."""
    return digits.to_levels(digits.load(part)["image"]).long().flatten(1)


@pytest.mark.slow
def test_bound_of_independent_pixels_is_their_likelihood_and_little_more():
    # a model that knows how often each pixel of the training digits has each level: its denoiser is known, and so is
    # its likelihood, 106.3 nats and log 10 for the label (ORACLES: 106.4). 1000 steps lose a nat or two
    counts = F.one_hot(grey_levels(digits.TRAIN), 17).sum(0) + 1.0
    log_p, schedule = (counts / counts.sum(1, keepdim=True)).log(), fg.noise.VPCosine()

    def net(params, x_t, t, label):
        alpha, sigma = schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]
        gap = (x_t.flatten(1)[..., None] - alpha * LEVELS) / sigma
        return ((log_p - 0.5 * gap**2).softmax(-1) @ LEVELS).unflatten(1, (1, 8, 8))

    exact = -log_p[torch.arange(64), grey_levels(digits.TEST)].sum(1).mean() + math.log(10)
    draws = torch.tensor([bound_nats(fg.random.key(i), {}, net, schedule, "x", draws=3) for i in range(6)])
    error = 4 * draws.std() / math.sqrt(6)
    assert -error < draws.mean() - exact < 3 + error
    assert error < 5


def test_demo_trains_with_other_choices():
    choices = {"schedule": "VPCosine", "prediction": "v", "weighting": "min_snr"}
    config = demo.Config(backend="aten", progress=False, **TINY, **choices)
    data = demo.load_data(config)
    model = demo.make_model(config, data)
    assert (model.schedule, model.prediction.kind) == (fg.noise.VPCosine(), "v")
    state, history = demo.train(fg.random.key(0), config, model, data)
    assert np.isfinite(history["loss"]).all()
    assert math.log(10) < bound_nats(fg.random.key(1), state.params, *model, draws=1) < math.inf


@pytest.mark.parametrize(("name", "value"), [("schedule", "DDPM"), ("prediction", "y"), ("weighting", "none")])
def test_demo_names_an_unknown_choice(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"to be one of .*, got '{value}'"):
        demo.main(demo.Config(out=str(tmp_path), backend="aten", progress=False, **TINY, **{name: value}))


def test_table_has_a_row_for_each_choice(tmp_path, monkeypatch):
    numbers = dict.fromkeys(("frechet_ratio", "nearest_ratio", "forest_accuracy", "bound_nats"), 1.25)
    monkeypatch.setattr(demo, "main", lambda config: {"svc_accuracy": 0.985, **numbers})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- choices -->\n<!-- /choices -->\nafter\n")
    monkeypatch.setattr(diffusion_choices, "PAGE", page)
    diffusion_choices.main(demo.Config(out=str(tmp_path)))
    lines = page.read_text().splitlines()
    assert lines[2].startswith("| schedule | prediction |")
    assert lines[4] == "| `EDM` | `edm` | `edm` | 98.5 % | 1.25 | 1.25 | 1.250 | 1.2 |"
    assert len(lines) == 6 + len(diffusion_choices.CHOICES)
