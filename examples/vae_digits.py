"""A variational autoencoder of scikit-learn's 8x8 digits: trains, samples, and is measured beside probabilistic PCA.

python examples/vae_digits.py    # about a minute

The decoder gives the mean of every pixel, with one standard deviation for all: the best one, sigma-VAE. So does
probabilistic PCA, whose decoder is linear and whose log-likelihood is known exactly; that of the VAE is bounded from
below by importance sampling (IWAE). Both are densities of the same numbers in [-1, 1], in nats an image. Densities:
they may be positive, and say nothing of the 17 levels.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import command_line
import digits
import torch
from einops import rearrange
from torch import Tensor

import functorch_gen as fg
from functorch_gen import vae
from functorch_gen.models import EncoderDecoder
from functorch_gen.nn import MLP


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/vae_digits"  # folder for pictures, samples and metrics
    steps: int = 1000  # training steps
    batch_size: int = 128  # examples a step
    learning_rate: float = 2e-3  # highest; warm-up, then cosine decay
    latent: int = 16  # size of the code, and number of principal components
    hidden: int = 256  # width of encoder and decoder
    dropout: float = 0.1  # in both
    annealing: int = 200  # steps over which the weight of the divergence rises from 0 to 1
    draws: int = 1000  # importance samples of an image
    validate: bool = False  # train on 0:1000 and measure on 1000:1350, to choose the numbers above
    samples: int = 1000  # in samples.npz
    seed: int = 0  # of everything
    backend: str = "inductor"  # or aten: no generated code


def make_net(config: Config) -> EncoderDecoder:
    """64 pixels to mean and log-variance of q(z | x); z to 64 means."""
    hidden = (config.hidden, config.hidden)
    encoder = MLP(64, hidden, 2 * config.latent, dropout=config.dropout)
    return EncoderDecoder(encoder, MLP(config.latent, hidden, 64, dropout=config.dropout))


@dataclass(frozen=True)
class WithDropout:
    """A net whose halves draw their dropout from a key."""

    net: EncoderDecoder
    key: Tensor

    def encode(self, params: Any, x: Tensor) -> Tensor:
        """Of the net, with dropout."""
        return self.net.encode(params, x, key=self.key)

    def decode(self, params: Any, code: Tensor) -> Tensor:
        """Of the net, with dropout."""
        return self.net.decode(params, code, key=self.key)


def make_loss(config: Config, net: EncoderDecoder) -> Callable[..., Any]:
    """loss_fn(params, step, key, x) -> (loss, step): the negative bound; its state counts steps, for the annealing."""
    beta = fg.optim.linear_schedule(0.0, 1.0, config.annealing)

    def loss_fn(params: Any, step: Tensor, key: Tensor, x: Tensor) -> Any:
        key_dropout, key_latent = fg.random.split(key)
        noisy = WithDropout(net, key_dropout)
        bound = vae.elbo(noisy, params, key_latent, x, likelihood=vae.Gaussian(None), beta=beta(step))
        return -bound.mean(), step + 1

    return loss_fn


def train(config: Config, key: Tensor, net: EncoderDecoder, x: Tensor) -> tuple[fg.step.TrainState, Any]:
    """-> (train_state, history)."""
    warmup = min(100, config.steps // 2)
    rate = fg.optim.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
    tx, average = fg.optim.adamw(rate, b2=0.99, weight_decay=0.01, mask="*weight"), fg.ema.warmup(0.99)
    key_init, key_run, key_data = fg.random.split(key, 3)
    pure_step = fg.step.make_step(make_loss(config, net), tx, average, stateful=True)
    step = fg.jit(pure_step, donate_argnums=0, backend=config.backend)
    count = torch.zeros((), dtype=torch.int64)
    state = fg.step.init_state(net.init(key_init), tx, key_run, count, average)
    batches = fg.data.batches(key_data, x, config.batch_size)
    return fg.train.fit(step, state, batches, steps=config.steps, progress=False)


def ppca(x: Tensor, latent: int) -> fg.exact.MultivariateGaussian:
    """Probabilistic PCA with the highest likelihood of x (n, d): Tipping and Bishop 1999, eq. 7 and 8."""
    values, vectors = torch.linalg.eigh(torch.cov(x.mT, correction=0))
    rest, largest = values.split([len(values) - latent, latent])
    variance = torch.cat([rest.mean().expand(len(rest)), largest])
    return fg.exact.MultivariateGaussian(x.mean(0), (vectors * variance) @ vectors.mT)


def draw_pictures(out: Any, key: Tensor, net: EncoderDecoder, params: Any, x: Tensor, images: Tensor) -> None:
    """Samples; test images above their reconstructions; ways between test images on lines and on arcs."""

    def grid(x: Tensor, path: str, row_labels: Any = ()) -> None:
        images = x.reshape(-1, 1, 8, 8).clamp(-1, 1)
        fg.plot.image_grid(images, out / path, columns=10, row_labels=row_labels)

    grid(images[:100], "samples.png")
    decoded = vae.reconstruct(net, params, x[:10], likelihood=vae.Gaussian())
    grid(torch.cat([x[:10], decoded]), "reconstructions.png", ["x", "decoded"])
    start, end = (vae.posterior(net, params, part).mean for part in (x[:3], x[3:6]))
    fractions = torch.linspace(0, 1, 10)
    ways = [vae.interpolate(start, end, fractions, kind=kind) for kind in ("linear", "spherical")]
    decoded = fg.vmap(lambda z: net.decode(params, z))(torch.cat(ways, 1))
    grid(rearrange(decoded, "n b p -> b n p"), "interpolation.png", ["line"] * 3 + ["arc"] * 3)


def main(config: Config) -> dict[str, float]:
    """Trains, writes pictures, samples and metrics into ``config.out``; returns the metrics."""
    from sklearn.svm import SVC

    out, net = fg.train.check_writable(config.out), make_net(config)
    parts = (slice(0, 1000), slice(1000, 1350)) if config.validate else (digits.TRAIN, digits.TEST)
    data, test = (digits.load(part) for part in parts)
    x, x_test = (part["image"].flatten(1) for part in (data, test))
    key_train, key_std, key_bound, key_sample = fg.random.split(fg.random.key(config.seed), 4)

    begin = time.perf_counter()
    state, history = train(config, key_train, net, x)
    params, seconds = state.ema.average, time.perf_counter() - begin
    drawn = vae.reconstruct(net, params, x, likelihood=vae.Gaussian(), key=key_std)
    likelihood = vae.Gaussian(float(vae.optimal_std(drawn, x)))
    bound = vae.log_prob(net, params, key_bound, x_test, likelihood=likelihood, k=config.draws)
    q = vae.posterior(net, params, x_test)
    spectrum = vae.jacobian_spectrum(lambda z: net.decode(params, z), q.mean)

    shape = config.samples, config.latent
    images = vae.sample(key_sample, net, params, shape, likelihood=likelihood).reshape(-1, 1, 8, 8)
    classifier = SVC().fit(x.numpy(), data["label"].numpy())  # the model knows no labels
    label = torch.from_numpy(classifier.predict(images.flatten(1).clamp(-1, 1).numpy()))
    digits.save(out / "samples.npz", images, label)
    draw_pictures(out, key_sample, net, params, x_test, images)
    fg.plot.curve(history["loss"], out / "loss.png", steps=history["step"], y_label="nats", log=False)
    judged = digits.judge(images, label)
    metrics = {
        "parameters": fg.tree.size(params),
        "seconds_training": seconds,
        "std": likelihood.std,
        "elbo": float(vae.elbo(net, params, key_bound, x_test, likelihood=likelihood).mean()),
        f"iwae_{config.draws}": float(bound.mean()),
        "ppca": float(ppca(x.double(), config.latent).log_prob(x_test.double()).mean()),
        "kl": float(q.kl().sum(1).mean()),
        "used_latents": int((q.kl().mean(0) > 0.1).sum()),
        "jacobian_condition": float((spectrum[:, 0] / spectrum[:, -1]).median()),
        **{name: value for name, value in judged.items() if name != "svc_accuracy"},
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(*[f"{name:24} {value:.4g}" for name, value in main(settings).items()], sep="\n")
    print(f"samples.png, reconstructions.png, interpolation.png and metrics.json are in {settings.out}")
