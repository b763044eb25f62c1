"""Twenty steps of a sampler on the network of examples/diffusion_digits.py: a loop in Python, and one program."""

from collections.abc import Callable

from torch import Tensor

import functorch_gen as fg
from functorch_gen import diffusion
from functorch_gen.typing import Key, Params
from tests.bench.programs import initial
from tests.bench.steps import SETTLE
from tests.bench.table import Options, Table, attempt
from tests.bench.timing import interleave

__all__ = ["LOOP", "NETWORK", "PROGRAM", "sampler_times"]

LOOP, NETWORK, PROGRAM = "uncompiled", "fg.jit of the network", "fg.jit of the sampler"

Network = Callable[[Params, Tensor, Tensor], Tensor]


def sampler_times(options: Options, base_channels: int = 32, steps: int = 20) -> Table:
    """Milliseconds of a sample by Heun's method, 39 evaluations at batch 1."""
    unet = fg.models.UNet(
        1, base_channels, num_blocks=1, attention_levels=(), num_classes=10, time_scale=10.0, channels_last=True
    )
    params, key = initial(unet), fg.random.key(0)
    schedule, prediction = fg.noise.EDM(), diffusion.Prediction("edm")
    label = fg.random.randint(fg.random.key(1), (1,), 0, 10).long()

    def network(params: Params, x_t: Tensor, c_noise: Tensor) -> Tensor:
        return unet(params, x_t, c_noise, label)

    def sampler(network: Network) -> Callable[[Key, Params], Tensor]:
        def sample(key: Key, params: Params) -> Tensor:
            bound = lambda x_t, c_noise: network(params, x_t, c_noise)
            denoise = diffusion.denoiser(bound, schedule=schedule, prediction=prediction)
            return diffusion.sample_heun(key, denoise, (1, 1, 8, 8), schedule=schedule, steps=steps)

        return sample

    def called(sample: Callable[[Key, Params], Tensor]) -> Callable[[], Tensor]:
        sample(key, params)
        return lambda: sample(key, params)

    makers = {
        LOOP: lambda: called(sampler(network)),
        NETWORK: lambda: called(sampler(fg.jit(network, backend=options.backend))),
        PROGRAM: lambda: called(fg.jit(sampler(network), backend=options.backend)),
    }
    runs, failures = attempt(makers)
    times = interleave(runs, options.rounds, settle=SETTLE)
    return Table("s", times, failures).scaled(1e3, "ms")
