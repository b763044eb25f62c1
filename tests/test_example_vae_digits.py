"""The autoencoder examples: tiny runs, what they write, and what they measure."""

import itertools
import json
import math

import digits
import numpy as np
import pytest
import torch
import vae_digits
import vq_digits
from PIL import Image

import functorch_gen as fg

TINY_VAE = {"steps": 2, "batch_size": 8, "hidden": 8, "latent": 3, "draws": 4, "samples": 300, "annealing": 2}
TINY_VQ = {"steps": 2, "prior_steps": 2, "batch_size": 8, "hidden": 8, "positions": 2, "codes": 3, "features": 2}
EVERY = torch.tensor(list(itertools.product(range(3), repeat=2)))
"""All codes of the tiny model."""


@pytest.fixture(scope="module", autouse=True)
def no_forest():
    """The forest that judges samples takes longer than all else here; it has its own test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "two_sample_forest", lambda samples, held_out: 0.5)
        yield


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    return folder, vae_digits.main(vae_digits.Config(out=str(folder), backend="aten", **TINY_VAE))


@pytest.fixture(scope="module")
def vq_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    return folder, vq_digits.main(vq_digits.Config(out=str(folder), backend="aten", samples_per_class=30, **TINY_VQ))


@pytest.mark.parametrize(("name", "pictures"), [("vae", 4), ("vq", 2)])
def test_example_writes_pictures_samples_and_metrics(name, pictures, request):
    folder, metrics = request.getfixturevalue(f"{name}_run")
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert len(list(folder.glob("*.png"))) == pictures
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 100
    with np.load(folder / "samples.npz") as file:
        assert file["images"].shape == (300, 1, 8, 8)
        assert set(np.unique(file["images"])) <= set(range(17))
        assert file["labels"].shape == (300,)


def test_ppca_is_the_density_of_scikit_learns():
    from sklearn.decomposition import PCA

    x, test = (digits.load(part)["image"].flatten(1).double() for part in (digits.TRAIN, digits.TEST))
    pca = PCA(16, svd_solver="full").fit(x.numpy())
    # scikit-learn divides by n - 1, so its variances are larger by n / (n - 1)
    pca.explained_variance_ *= (len(x) - 1) / len(x)
    pca.noise_variance_ *= (len(x) - 1) / len(x)
    expected = pca.score_samples(test.numpy())
    found = vae_digits.ppca(x, 16).log_prob(test)
    torch.testing.assert_close(found, torch.from_numpy(expected))


@pytest.fixture(scope="module")
def small_vq():
    """A model of nine codes with random parameters."""
    config = vq_digits.Config(**TINY_VQ)
    model = vq_digits.make_model(config)
    keys = fg.random.split(fg.random.key(0), 4)
    params = fg.nn.init_parts({"encoder": model.encoder, "decoder": model.decoder}, keys[0])
    params["prior"] = fg.tree.scale(model.prior.init(keys[1]), 5.0)
    books = [{**model.vq.init_state(), "codebook": fg.random.normal(key, (3, 2))} for key in keys[2:]]
    return model, params, fg.tree.stack(books)


def test_prior_over_all_codes_is_a_distribution(small_vq):
    model, params, _ = small_vq
    log_z = vq_digits.log_prior(model, params["prior"], EVERY)
    assert log_z.shape == (9,)
    assert float(log_z.logsumexp(0)) == pytest.approx(0, abs=1e-5)
    for i, codes in enumerate(EVERY.tolist()):
        each = []
        for label in range(10):
            batch = {"label": torch.tensor([label]), "codes": torch.tensor([codes])}
            each.append(-float(vq_digits.prior_loss_fn(model, params["prior"], None, batch)) - math.log(10))
        assert float(log_z[i]) == pytest.approx(float(torch.tensor(each).logsumexp(0)), abs=1e-4)


def test_bounds_are_sums_over_codes_one_by_one(small_vq):
    """And the pixels have a distribution over the 17 levels, so the model is one of discrete images."""
    model, params, state = small_vq
    x = digits.to_levels(digits.load(slice(0, 5))["image"]).flatten(1)
    one_code, all_codes = vq_digits.nll_bounds(model, params, state, x)
    log_z = vq_digits.log_prior(model, params["prior"], EVERY)
    table = vq_digits.log_levels(vq_digits.decode_codes(model, params, state, EVERY)).unflatten(1, (64, 17))
    torch.testing.assert_close(table.logsumexp(-1), torch.zeros(9, 64), rtol=0, atol=1e-4)
    joint = torch.stack(
        [log_z[i] + torch.stack([table[i, p, x[:, p].long()] for p in range(64)]).sum(0) for i in range(9)]
    )
    torch.testing.assert_close(all_codes, -joint.logsumexp(0), rtol=1e-4, atol=1e-3)
    codes = vq_digits.quantize(model, params, state, x, train=False)[0].codes
    chosen = joint.gather(0, (3 * codes[:, 0] + codes[:, 1])[None])[0]
    torch.testing.assert_close(one_code, -chosen, rtol=1e-4, atol=1e-3)
    assert (all_codes <= one_code + 1e-3).all()


@pytest.mark.slow  # trains
def test_vae_is_better_than_ppca(tmp_path):
    metrics = vae_digits.main(vae_digits.Config(out=str(tmp_path)))
    assert metrics["iwae_1000"] > metrics["elbo"]
    assert metrics["iwae_1000"] > metrics["ppca"]


@pytest.mark.slow  # trains
def test_vq_with_gpt_is_better_than_a_histogram_of_neighbours(tmp_path):
    """A histogram of each pixel given those to the left and above has 95.9 nats (ORACLES)."""
    metrics = vq_digits.main(vq_digits.Config(out=str(tmp_path)))
    assert metrics["nll_bound_all_codes"] < 95
    assert metrics["nll_bound_all_codes"] < metrics["nll_bound_one_code"]
