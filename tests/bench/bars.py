"""The ratios the benchmark is judged by, read off the tables."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.bench import sampler
from tests.bench.attention import ATTENTION
from tests.bench.calls import TRAFFIC
from tests.bench.generation import CACHED
from tests.bench.programs import PROGRAMS

__all__ = ["BARS", "Bar", "Results", "best_module"]

Results = dict[str, dict[str, Any]]
"""Tables by section, as they are in the JSON file."""

TREE, FLAT = "fg.jit", "fg.jit, flat"
WHOLE = ", whole step"


@dataclass(frozen=True)
class Bar:
    """A ratio that should not exceed ``bar`` (with ``at_least``: not fall below), by the form of the state.

    Args:
        figures: reads the ratio of each form off the results; KeyError where a row is missing.
    """

    name: str
    figures: Callable[[Results], dict[str, float]]
    bar: float
    aim: float | None = None
    at_least: bool = False
    unit: str = ""

    def met(self, figure: float) -> bool:
        return figure >= self.bar if self.at_least else figure <= self.bar


def median(results: Results, section: str, row: str) -> float:
    return results[section]["rows"][row]["median"]


def fastest(table: dict[str, Any], kind: str) -> str:
    """The fastest row whose name says ``kind``."""
    rows = {name: row["median"] for name, row in table["rows"].items() if kind in name}
    if not rows:
        raise KeyError(kind)
    return min(rows, key=lambda name: rows[name])


def best_module(table: dict[str, Any]) -> str:
    """The fastest row of ``nn.Module``."""
    return fastest(table, "nn.Module")


def forms(results: Results, section: str, suffix: str = "") -> dict[str, float]:
    """Medians of both forms of ``fg.jit``, as far as measured."""
    rows = results[section]["rows"]
    found = {form: rows[form + suffix]["median"] for form in (TREE, FLAT) if form + suffix in rows}
    if not found:
        raise KeyError(TREE)
    return found


def over(results: Results, section: str, row: str, suffix: str = "") -> dict[str, float]:
    """Both forms over a row."""
    return {form: x / median(results, section, row) for form, x in forms(results, section, suffix).items()}


def ratio(section: str, row: str, other: str, factor: float = 1.0) -> Callable[[Results], dict[str, float]]:
    """One row over another."""
    return lambda r: {"": factor * median(r, section, row) / median(r, section, other)}


def deeper(form: str) -> Callable[[Results], dict[str, float]]:
    """48 blocks over 4."""
    return ratio("depth_compile", f"{form}, 48 blocks", f"{form}, 4 blocks")


def misprediction(program: str) -> Callable[[Results], dict[str, float]]:
    """|predicted / measured - 1| of the peak memory."""
    predicted = ratio("predicted_peak", f"{program}, predicted", f"{program}, measured")
    return lambda r: {form: abs(x - 1) for form, x in predicted(r).items()}


def beside_module(title: str, section: str, bar: float, aim: float | None = None) -> Bar:
    """The bar of a step beside the fastest module."""
    return Bar(f"{title} step, fg / best nn.Module", lambda r: over(r, section, best_module(r[section])), bar, aim)


def steps(title: str, section: str, module: tuple[float, float], jax: tuple[float, float]) -> tuple[Bar, Bar]:
    """The two bars of a program's step."""
    return (
        beside_module(title, section, *module),
        Bar(f"{title} step, fg / JAX", lambda r: over(r, section, "JAX"), *jax),
    )


BARS: tuple[Bar, ...] = (
    *steps("MLP", "mlp_step", (0.90, 0.75), (1.0, 0.8)),
    *steps("Tiny MLP", "tiny_mlp_step", (0.45, 0.2), (0.85, 0.5)),
    *steps("U-Net", "unet_step", (0.95, 0.85), (0.55, 0.45)),
    *steps("GPT", "gpt_step", (1.00, 0.9), (0.55, 0.45)),
    beside_module("VAE", "vae_step", 1.00),
    beside_module("Diffusion", "diffusion_step", 1.00),
    beside_module("Flow-matching", "flow_step", 1.00),
    beside_module("MeanFlow", "mean_flow_step", 0.77),
    beside_module("GAN", "gan_step", 0.77),
    beside_module("GAN of perceptrons", "gan_mlp_step", 0.77),
    Bar(
        "Sampler of 20 steps, uncompiled / one program",
        ratio("sampler", sampler.LOOP, sampler.PROGRAM),
        1.5,
        at_least=True,
    ),
    Bar(
        "Generation of 256 tokens, the fastest without a cache / with it",
        lambda r: {"": median(r, "generation", fastest(r["generation"], "no cache")) / median(r, "generation", CACHED)},
        5,
        at_least=True,
    ),
    Bar(
        "U-Net whole-step cold compile, fg / torch.compile of the module alone",
        lambda r: over(r, "unet_compile", "torch.compile, module alone", WHOLE),
        0.65,
        0.3,
    ),
    Bar("GPT whole-step cold compile, fg / JAX", lambda r: over(r, "gpt_compile", "JAX" + WHOLE, WHOLE), 5, 2),
    Bar("Second process with saved artifacts, U-Net", lambda r: forms(r, "warm_start"), 4, 1.5, unit=" s"),
    Bar("Cold compile of 48 blocks / of 4, as a scan", deeper("scan"), 1.3, 1.1),
    Bar("Cold compile of 48 blocks / of 4, as a loop", deeper("loop"), 4, 1.5),
    Bar("Call overhead, 350 leaves, donated, fg / JAX", ratio("call_overhead", TREE, "JAX"), 0.8, 0.5),
    Bar("Call overhead, same as one vector, fg / JAX", ratio("call_overhead", "fg.jit, one vector", "JAX"), 0.15, 0.08),
    Bar("Peak memory of 12 blocks, remat / not", ratio("remat_memory", "fg.jit, fg.remat", TREE), 0.40, 0.33),
    Bar("Time of 12 blocks, remat / not", ratio("remat_time", "fg.jit, fg.remat", TREE), 1.6, 1.35),
    Bar(
        "Peak memory, eager value_and_grad / torch.func.grad_and_value",
        ratio("eager_memory", "fg.value_and_grad", "torch.func.grad_and_value"),
        0.5,
    ),
    Bar(
        "Time, eager value_and_grad / torch.func.grad_and_value",
        ratio("eager_time", "fg.value_and_grad", "torch.func.grad_and_value"),
        0.6,
    ),
    *[
        Bar(
            f"Attention and its gradient, {name}, fg / torch",
            ratio("attention", f"fg.nn.attention, {name}", f"F.scaled_dot_product_attention, {name}"),
            1.05,
        )
        for name in ATTENTION
    ],
    Bar("1M normals, jitted / torch.randn", ratio("normals", TREE, "torch.randn"), 1.5, 1.0),
    Bar("1M normals, jitted / jax.random.normal jitted", ratio("normals", TREE, "JAX"), 0.6, 0.4),
    Bar(
        "AdamW + clip + EMA on 50M: bytes per second / a copy's",
        ratio("update_traffic", "Tensor.copy_", TREE, TRAFFIC),
        0.75,
        0.9,
        at_least=True,
    ),
    *[Bar(f"Predicted peak of the {name} step is off by", misprediction(name), 0.15) for name in PROGRAMS],
)  # fmt: skip
