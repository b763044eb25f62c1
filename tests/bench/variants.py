"""One training step of a program in every form: gradient, clip by global norm, AdamW, moving average.

A variant is a function without arguments that takes one step from the state it holds and returns the loss.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import functorch_gen as fg
from tests.bench.programs import Program

__all__ = ["FunctionalStep", "ModuleStep", "jax_step", "makers"]

MAX_NORM, RATE, B1, B2, EPS, WEIGHT_DECAY, DECAY = 1.0, 1e-3, 0.9, 0.999, 1e-8, 0.01, 0.999


class FunctionalStep:
    """``fg.jit`` of ``make_step`` with the old state donated.

    Args:
        flat: the state lies in one vector per dtype and device.
    """

    def __init__(self, program: Program, *, flat: bool = False, backend: str = "inductor"):
        tx = fg.optim.chain(
            fg.optim.clip_by_global_norm(MAX_NORM),
            fg.optim.adamw(RATE, B1, B2, EPS, weight_decay=WEIGHT_DECAY),
        )
        average = fg.ema.constant(DECAY)
        self.batch = program.batch
        self.state = fg.step.init_state(program.params, tx, fg.random.key(2), ema=average, flat=flat)
        step = fg.step.make_step(program.loss, tx, ema=average, flat=flat)
        self.step = fg.jit(step, donate_argnums=0, backend=backend)

    def __call__(self) -> Tensor:
        self.state, metrics = self.step(self.state, self.batch)
        return metrics["loss"]


class ModuleStep:
    """The step with ``torch.nn`` and ``torch.optim``: fused AdamW, foreach clipping and average, or all compiled.

    Args:
        compiled: ``torch.compile`` of module and loss.
        compiled_update: ``torch.compile`` of clipping, AdamW (the learning rate a tensor, as torch's tutorial on
            compiled optimizers has it) and average too.
    """

    def __init__(
        self, program: Program, *, compiled: bool = False, compiled_update: bool = False, channels_last: bool = False
    ):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.module = program.module()
        self.module.load_state_dict(fg.tree.names(program.params), strict=True)
        self.module.to(memory_format=layout)
        self.batch = {
            name: x.contiguous(memory_format=layout) if x.ndim == 4 else x for name, x in program.batch.items()
        }
        self.parameters = list(self.module.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=torch.tensor(RATE) if compiled_update else RATE,
            betas=(B1, B2),
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            fused=not compiled_update,
        )
        self.loss = torch.compile(program.module_loss, fullgraph=True) if compiled else program.module_loss
        self.update = torch.compile(self._update, dynamic=False) if compiled_update else self._update

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, MAX_NORM, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - DECAY)

    def gradient(self) -> Tensor:
        """Forward and backward pass."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.module, self.batch)
        loss.backward()
        return loss.detach()

    def __call__(self) -> Tensor:
        loss = self.gradient()
        self.update()
        return loss


def jax_step(program: Program) -> Callable[[], Any]:
    """``jax.jit`` with optax and the old state donated; waits for the result."""
    if program.family is None:
        raise ValueError("jax_step: expected a program with a JAX form, got one without")
    import jax
    import optax

    from tests.bench.jax_programs import LOSSES, batch_of, params_of

    loss_fn = LOSSES[program.family](program.sizes)
    tx = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adamw(RATE, B1, B2, EPS, weight_decay=WEIGHT_DECAY))

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_state, average = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: DECAY * a + (1 - DECAY) * p, average, params)
        return (params, opt_state, average), loss

    jitted, params, batch = jax.jit(step, donate_argnums=0), params_of(program), batch_of(program.batch)
    state = [(params, tx.init(params), jax.tree.map(lambda p: p.copy(), params))]

    def run() -> Any:
        state[0], loss = jitted(state[0], batch)
        return loss.block_until_ready()

    return run


def makers(program: Program, backend: str = "inductor") -> dict[str, Callable[[], Callable[[], Any]]]:
    """How to build every variant, by name; compiled modules only beside a compiled functional step."""
    built: dict[str, Callable[[], Callable[[], Any]]] = {
        "fg.jit": lambda: FunctionalStep(program, backend=backend),
        "fg.jit, flat": lambda: FunctionalStep(program, flat=True, backend=backend),
    }
    forms: dict[str, dict[str, bool]] = {"eager": {}}
    if backend != "aten" and program.compiles:
        forms["compiled"] = {"compiled": True}
        forms["compiled with its update"] = {"compiled": True, "compiled_update": True}
    elif backend != "aten":
        forms["with its update compiled"] = {"compiled_update": True}
    for form, options in forms.items():
        for last in (False, True) if program.images else (False,):
            name = f"nn.Module {form}{', channels-last' if last else ''}"
            built[name] = lambda options=options, last=last: ModuleStep(program, channels_last=last, **options)
    return built if program.family is None else {**built, "JAX": lambda: jax_step(program)}
