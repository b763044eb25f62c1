"""The sections of the benchmark, in the order of the page."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench import calls, memory, starts
from tests.bench.attention import attention_times
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
    "mlp_step": Section("MLP step", "784-512-512-10 with ReLU, batch 128.", step_times("mlp")),
    "tiny_mlp_step": Section("Tiny MLP step", "64-32-32-10 with ReLU, batch 32.", step_times("tiny_mlp")),
    "unet_step": Section(
        "U-Net step",
        "32 base channels, two levels of one block, no attention, ten classes; batch 32 of 3x16x16. The functional form"
        " is channels-last, JAX has its images as (b, h, w, c).",
        step_times("unet"),
    ),
    "gpt_step": Section(
        "GPT step", "4 layers, width 192, 6 heads; batch 8, length 128, vocabulary 256.", step_times("gpt")
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
