"""The sections of the benchmark, in the order of the page."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench import calls, memory, starts
from tests.bench.adversaries import convolutional, gan_times, perceptrons
from tests.bench.attention import attention_times
from tests.bench.families import FAMILIES
from tests.bench.generation import generation_times
from tests.bench.programs import PROGRAMS
from tests.bench.sampler import sampler_times
from tests.bench.steps import step_times
from tests.bench.table import Options, Table

__all__ = ["SECTIONS", "Section"]


@dataclass(frozen=True)
class Section:
    """One table, measured in a process of its own.

    Args:
        what: a sentence or two for the page.
    """

    title: str
    what: str
    measure: Callable[[Options], Table]


SECTIONS: dict[str, Section] = {
    "mlp_step": Section("MLP step", "784-512-512-10 with ReLU, batch 128.", step_times(PROGRAMS["mlp"])),
    "tiny_mlp_step": Section("Tiny MLP step", "64-32-32-10 with ReLU, batch 32.", step_times(PROGRAMS["tiny_mlp"])),
    "unet_step": Section(
        "U-Net step",
        "32 base channels, two levels of one block, no attention, ten classes; batch 32 of 3x16x16. The functional form"
        " is channels-last, JAX has its images as (b, h, w, c).",
        step_times(PROGRAMS["unet"]),
    ),
    "gpt_step": Section(
        "GPT step", "4 layers, width 192, 6 heads; batch 8, length 128, vocabulary 256.", step_times(PROGRAMS["gpt"])
    ),
    "vae_step": Section(
        "VAE step",
        "Perceptrons 64-256-256-16 and back with ReLU, Bernoulli likelihood; batch 128. In the steps of the families"
        " all draws come with the batch.",
        step_times(FAMILIES["vae"]),
    ),
    "diffusion_step": Section(
        "Diffusion step",
        "EDM's loss of the U-Net of examples/diffusion_digits.py: 32 base channels, two levels of one block, ten"
        " classes; batch 128 of 1x8x8.",
        step_times(FAMILIES["diffusion"]),
    ),
    "flow_step": Section("Flow-matching step", "The same network and batch.", step_times(FAMILIES["flow"])),
    "mean_flow_step": Section(
        "MeanFlow step",
        "The same network of two times; half of the batch has r < t and goes through `jvp`, in the module"
        " `torch.func.jvp`, on which `torch.compile` fails (torch 2.13, group norm in forward mode).",
        step_times(FAMILIES["mean_flow"]),
    ),
    "gan_step": Section(
        "GAN step",
        "R3GAN's losses, with R1 and R2, of the networks of examples/gan_digits.py: 32 and 64 channels, a residual"
        " block at 8x8 and at 4x4; batch 64. Both players' turns, AdamW without clipping. Logits and penalties come of"
        " one forward pass: in `fg.jit` by `vmap(value_and_grad)`, with weights channels-last; in the module by"
        " `torch.autograd.grad(..., create_graph=True)`, which `torch.compile` refuses, or by `torch.func`.",
        gan_times(convolutional),
    ),
    "gan_mlp_step": Section(
        "GAN step, perceptrons",
        "The same game of perceptrons 74-256-256-1 and 42-256-256-64, where operations are small.",
        gan_times(perceptrons),
    ),
    "sampler": Section(
        "Sampler of 20 steps",
        "Heun's method, 39 evaluations of the U-Net of examples/diffusion_digits.py, at batch 1.",
        sampler_times,
    ),
    "generation": Section(
        "Generation of 256 tokens",
        "A GPT of 4 layers, width 192 and 6 heads continues 16 tokens to 256, at batch 1: with keys and values of"
        " earlier tokens kept, or all computed again for each token.",
        generation_times,
    ),
    "unet_compile": Section(
        "U-Net, cold compile",
        "Whole step: trace, compile, first run. Module alone: forward and backward pass, no update.",
        starts.cold_times(
            {
                "fg.jit, whole step": "unet fg",
                "fg.jit, flat, whole step": "unet fg flat",
                "torch.compile, module alone": "unet module",
                "JAX, whole step": "unet jax",
            }
        ),
    ),
    "gpt_compile": Section(
        "GPT, cold compile",
        "As above.",
        starts.cold_times(
            {
                "fg.jit, whole step": "gpt fg",
                "fg.jit, flat, whole step": "gpt fg flat",
                "torch.compile, module alone": "gpt module",
                "JAX, whole step": "gpt jax",
            }
        ),
    ),
    "warm_start": Section(
        "U-Net, second process",
        "From imports done to first step done (weights, state, `step.load`, step), from what another process saved"
        " with `step.save`, with an empty Inductor cache.",
        starts.warm_times,
    ),
    "depth_compile": Section(
        "Cold compile by depth",
        "Gradient and SGD of residual blocks x + linear(gelu(linear(layernorm(x)))) of width 64, batch 32.",
        starts.cold_times({f"{form}, {n} blocks": f"depth {form} {n}" for form in ("scan", "loop") for n in (4, 48)}),
    ),
    "call_overhead": Section("Call overhead", "x -> 0.999 x of 350 donated leaves of 4 floats.", calls.call_overhead),
    "remat_memory": Section(
        "Remat, memory",
        "Compiled gradient of 12 blocks of 3 tanh layers (4096 x 512), each block under `fg.remat` or not. What the"
        " call allocates, its result included, its arguments not.",
        memory.remat_memory,
    ),
    "remat_time": Section("Remat, time", "The same gradients.", memory.remat_times),
    "eager_memory": Section(
        "Eager gradient, memory", "The same blocks, uncompiled, counted in the same way.", memory.eager_memory
    ),
    "eager_time": Section("Eager gradient, time", "The same gradients.", memory.eager_times),
    "attention": Section(
        "Attention, uncompiled",
        "Output and gradients of q, k and v through `torch.autograd`; shapes are (batch, heads, length, width).",
        attention_times,
    ),
    "normals": Section("A million normals", "Jitted; torch's draw from its global generator.", calls.normals),
    "update_traffic": Section(
        "Update of one flat vector",
        "AdamW, clipping and average of 50M float32, donated, beside a copy of a vector of the same size. The update"
        " moves at least 2 GB (six reads, four writes), the copy 0.4 GB.",
        calls.update_traffic,
    ),
    "predicted_peak": Section(
        "Peak memory by `.cost()`", "Of the step of each program, arguments included.", memory.predicted_peaks
    ),
}
