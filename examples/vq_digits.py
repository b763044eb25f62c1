"""Digits as four integers each: an autoencoder with codebooks (VQ-VAE), and a GPT that writes the integers.

python examples/vq_digits.py    # about two minutes; an upper bound on the discrete negative log-likelihood, and samples

The decoder gives every pixel a distribution over its 17 grey levels, so the two are a model of discrete images,
p(x) = sum over codes z of p(z) p(x | z). For any set S of codes, that of the encoder's one or that of all 16^4,
-log p(x) <= -log sum over z in S of p(z) p(x | z), an upper bound, with equality for all codes.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import command_line
import digits
import torch
from einops import rearrange, repeat
from torch import Tensor

import functorch_gen as fg
from functorch_gen.models import GPT
from functorch_gen.nn import MLP, Flatten, Sequential, Unflatten
from functorch_gen.vae import VQ, DiscretizedLogisticMixture, Quantized, perplexity

LEVELS, CLASSES, PIXELS = 17, 10, 64
LIKELIHOOD = DiscretizedLogisticMixture(LEVELS)


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/vq_digits"  # folder for pictures, samples and metrics
    steps: int = 800  # training steps of the autoencoder
    prior_steps: int = 250  # and of the GPT
    batch_size: int = 128  # examples a step
    learning_rate: float = 2e-3  # highest; warm-up, then cosine decay
    positions: int = 4  # integers an image
    codes: int = 16  # values of each
    features: int = 8  # size of the vector of a code
    hidden: int = 256  # width of encoder and decoder
    dropout: float = 0.4  # in the decoder
    validate: bool = False  # train on 0:1000 and measure on 1000:1350, to choose the numbers above
    samples_per_class: int = 100  # in samples.npz
    seed: int = 0  # of everything
    backend: str = "inductor"  # or aten: no generated code


class Model(NamedTuple):
    """What the parameters belong to."""

    encoder: Sequential  # levels (b, 64) -> (b, positions, features)
    vq: VQ
    decoder: Sequential  # (b, positions, features) -> parameters of the likelihood (b, k, 64)
    prior: GPT  # reads a label, which stands behind the codes in its vocabulary, and the codes so far


def make_model(config: Config) -> Model:
    """Sizes by the configuration."""
    code, hidden, k = (config.positions, config.features), (config.hidden, config.hidden), 6  # two logistics a pixel
    up = MLP(code[0] * code[1], hidden, k * PIXELS, dropout=config.dropout)
    return Model(
        Sequential(lambda x: x / 8 - 1, MLP(PIXELS, hidden, code[0] * code[1]), Unflatten(1, code)),
        VQ(config.codes, config.features, decay=0.98, threshold=0.4),
        Sequential(Flatten(), up, Unflatten(1, (k, PIXELS))),
        GPT(config.codes + CLASSES, config.positions, num_layers=2, num_heads=4, embed_dim=64, dropout=0.3),
    )


def quantize(model: Model, params: Any, books: Any, x: Tensor, **options: Any) -> tuple[Quantized, Any]:
    """Codes (b, positions) of levels x (b, 64); each position has a codebook of its own."""
    z = model.encoder(params["encoder"], x)
    return fg.vmap(lambda book, z: model.vq({}, book, z, **options), in_dims=(0, 1), out_dims=(1, 0))(books, z)


def loss_fn(model: Model, params: Any, books: Any, key: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    """-> (loss, books): van den Oord et al. 2017, eq. 3, with the codebooks of appendix A.1 as state."""
    key_codes, key_dropout = fg.random.split(key)
    y, books = quantize(model, params, books, x, train=True, key=key_codes)
    output = model.decoder(params["decoder"], y.values, key=key_dropout)
    log_prob = LIKELIHOOD.log_prob(output, x[:, None].long())
    distance = model.vq.features * y.commitment.sum(1)  # |z - values|^2; the commitment is a mean
    return (0.25 * distance - log_prob).mean(), books


def prior_loss_fn(model: Model, params: Any, key: Tensor | None, batch: dict[str, Tensor]) -> Tensor:
    """-> (): -log p(codes | label), a cross entropy of each code given those before."""
    tokens = torch.cat([batch["label"][:, None] + model.vq.num_codes, batch["codes"]], 1)
    logits = model.prior(params, tokens[:, :-1], key=key)[..., : model.vq.num_codes]
    return fg.losses.categorical_nll(logits, tokens[:, 1:]).mean()


def train(config: Config, key: Tensor, params: Any, loss: Any, data: Any, steps: int, state: Any = None) -> Any:
    """-> train_state; with a state, ``loss`` is stateful."""
    rate = fg.optim.warmup_cosine_decay_schedule(0.0, config.learning_rate, min(100, steps // 2), steps)
    tx, average = fg.optim.adamw(rate, b2=0.99, weight_decay=0.01, mask="*weight"), fg.ema.warmup(0.99)
    step = fg.step.make_step(loss, tx, average, stateful=state is not None)
    key_run, key_data = fg.random.split(key)
    begin = fg.step.init_state(params, tx, key_run, state, average)
    batches = fg.data.batches(key_data, data, config.batch_size)
    compiled = fg.jit(step, donate_argnums=0, backend=config.backend)
    return fg.train.fit(compiled, begin, batches, steps=steps, progress=False)[0]


def log_prior(model: Model, params: Any, every: Tensor) -> Tensor:
    """log p(z) of all codes in lexical order, the label summed out: (n, positions) -> (n,)."""
    k = model.vq.num_codes
    before = every[::k, :-1]  # one call of the GPT tells the last integer's k probabilities

    def given(label: int) -> Tensor:
        tokens = torch.cat([torch.full((len(before), 1), k + label), before], 1)
        log_probs = model.prior(params, tokens)[..., :k].log_softmax(-1)
        so_far = log_probs[:, :-1].gather(-1, before[..., None])[..., 0].sum(1)
        return (so_far[:, None] + log_probs[:, -1]).flatten()

    return torch.stack([given(label) for label in range(CLASSES)]).logsumexp(0) - torch.tensor(CLASSES).log()


def decode_codes(model: Model, params: Any, books: Any, codes: Tensor) -> Tensor:
    """The parameters of p(x | z): (n, positions) -> (n, k, 64)."""
    return model.decoder(params["decoder"], fg.vmap(model.vq.look_up, in_dims=(0, 1), out_dims=1)(books, codes))


def log_levels(output: Tensor) -> Tensor:
    """log p(level | z) of each pixel: (n, k, 64) -> (n, 64 17)."""
    pixels = rearrange(output, "n k p -> (n p) k 1")
    levels = repeat(torch.arange(LEVELS), "v -> v np 1 1", np=len(pixels))
    log_probs = fg.vmap(LIKELIHOOD.log_prob, in_dims=(None, 0))(pixels, levels)
    return rearrange(log_probs, "v (n p) -> n (p v)", p=PIXELS)


def nll_bounds(model: Model, params: Any, books: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Upper bounds on -log p(x) of levels x (b, 64), in nats: S the encoder's code, S all codes."""
    k = model.vq.num_codes
    every = torch.cartesian_prod(*[torch.arange(k)] * model.prior.context)
    log_z = log_prior(model, params["prior"], every)
    seen = (x[..., None] == torch.arange(LEVELS)).to(x.dtype).flatten(1)
    log_joint = [
        (seen @ log_levels(decode_codes(model, params, books, codes)).mT + log_prob).logsumexp(1)  # (b,)
        for codes, log_prob in zip(every.split(1024), log_z.split(1024), strict=True)
    ]
    codes = quantize(model, params, books, x, train=False)[0].codes
    index = (codes * k ** torch.arange(model.prior.context - 1, -1, -1)).sum(1)
    log_x = (seen * log_levels(decode_codes(model, params, books, codes))).sum(1)
    return -(log_x + log_z[index]), -torch.stack(log_joint).logsumexp(0)


def draw_codes(key: Tensor, model: Model, params: Any, label: Tensor) -> Tensor:
    """From the prior, one after the other: (n,) -> (n, positions)."""
    tokens = label[:, None] + model.vq.num_codes
    for i in range(model.prior.context):
        logits = model.prior(params, tokens)[:, -1, : model.vq.num_codes]
        tokens = torch.cat([tokens, fg.random.categorical(fg.random.fold_in(key, i), logits)[:, None]], 1)
    return tokens[:, 1:]


def main(config: Config) -> dict[str, float]:
    """Trains both models, writes pictures, samples and metrics into ``config.out``; returns the metrics."""
    out, model = fg.train.check_writable(config.out), make_model(config)
    parts = (slice(0, 1000), slice(1000, 1350)) if config.validate else (digits.TRAIN, digits.TEST)
    data, test = (digits.load(part) for part in parts)
    x, x_test = (digits.to_levels(part["image"]).flatten(1) for part in (data, test))
    key_nets, key_prior, key_train, key_codes, key_sample = fg.random.split(fg.random.key(config.seed), 5)
    params = fg.nn.init_parts({"encoder": model.encoder, "decoder": model.decoder}, key_nets)
    books = fg.tree.stack([model.vq.init_state()] * config.positions)
    begin = time.perf_counter()
    trained = train(config, key_train, params, partial(loss_fn, model), x, config.steps, books)
    params, books = trained.ema.average, trained.state
    pairs = {"codes": quantize(model, params, books, x, train=False)[0].codes, "label": data["label"]}
    prior = model.prior.init(key_prior), partial(prior_loss_fn, model), pairs, config.prior_steps
    params = {**params, "prior": train(config, key_codes, *prior).ema.average}
    seconds = time.perf_counter() - begin
    label = torch.arange(CLASSES).repeat_interleave(config.samples_per_class)
    drawn = draw_codes(key_sample, model, params["prior"], label)
    seen = quantize(model, params, books, x_test[:10], train=False)[0].codes
    outputs = (decode_codes(model, params, books, codes) for codes in (drawn, seen))
    images, decoded = (LIKELIHOOD.mean(output).reshape(-1, 1, 8, 8) / 8 - 1 for output in outputs)
    digits.save(out / "samples.npz", images, label)
    fg.plot.image_grid(images[:: max(1, len(images) // 100)][:100], out / "samples.png", columns=10)
    fg.plot.image_grid(torch.cat([test["image"][:10], decoded]), out / "reconstructions.png", columns=10)
    one_code, all_codes = nll_bounds(model, params, books, x_test)
    metrics = {
        "parameters": fg.tree.size(params),
        "seconds_training": seconds,
        "nll_bound_one_code": float(one_code.mean()),
        "nll_bound_all_codes": float(all_codes.mean()),
        "perplexity": float(fg.vmap(lambda c: perplexity(c, config.codes), in_dims=1)(pairs["codes"]).mean()),
        **digits.judge(images, label),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(*[f"{name:24} {value:.4g}" for name, value in main(settings).items()], sep="\n")
    print(f"samples.png, reconstructions.png, samples.npz and metrics.json are in {settings.out}")
