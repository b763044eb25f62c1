"""Two players: their state, and the turns of which every update of the game is made.

A turn of a player is a step of :func:`functorch_gen.step.make_step` on its own parameters, beside those of the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functorch_gen import random, tree
from functorch_gen.ema import EMA
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.optim import GradientTransformation, identity
from functorch_gen.step import TrainState, make_step
from functorch_gen.step import init_state as init_train_state
from functorch_gen.transforms import cond, grad
from functorch_gen.typing import Key, Params, State

__all__ = ["GANState", "Game", "Lazy", "Player", "init_state"]

Metrics: TypeAlias = dict[str, Any]
"""Of one turn: loss, grad_norm, aux; of a step with the player's prefix."""

Extra: TypeAlias = Callable[[Params], Tensor]
"""A term beside the loss, of a player's parameters."""


class GANState(NamedTuple):
    """All that the training of two players changes; with the batches it determines the rest of the run."""

    d_params: Params  # of the discriminator
    g_params: Params  # of the generator
    d_opt_state: Any
    g_opt_state: Any
    state: State  # of stateful layers and running means, of both; {} if there is none
    ema: Any  # of the generator's moving average, whose tree ``ema.average`` is shaped like g_params; or None
    key: Key  # (2,) int32, the same in every step
    step: Tensor  # () int64, steps taken

    @property
    def params(self) -> Params:
        """Those of both players, ``{"d": ..., "g": ...}``."""
        return {"d": self.d_params, "g": self.g_params}


def init_state(
    d_params: Params,
    g_params: Params,
    d_tx: GradientTransformation,
    g_tx: GradientTransformation,
    key: Key,
    state: State = None,
    ema: EMA | None = None,
) -> GANState:
    """The state before the first step, in memory of its own, as of :func:`functorch_gen.step.init_state`.

    Args:
        state: one tree for both players; None stands for ``{}``.
        ema: the average of the generator's parameters.
    Raises:
        TypeError: if a parameter is no floating-point tensor; names its path, which begins with "d" or "g".
        ValueError: if a parameter is NaN or infinite (names its path), or ``key`` is not (2,).

    >>> from functorch_gen import optim
    >>> players = {"w": torch.zeros(1)}, {"theta": torch.ones(1)}
    >>> init_state(*players, optim.sgd(0.1), optim.sgd(0.1), random.key(0)).params
    {'d': {'w': tensor([0.])}, 'g': {'theta': tensor([1.])}}
    """
    both = identity()._replace(init=lambda params: (d_tx.init(params["d"]), g_tx.init(params["g"])))
    average = None if ema is None else ema._replace(init=lambda params: ema.init(params["g"]))
    held = init_train_state({"d": d_params, "g": g_params}, both, key, state, average)
    d_opt_state, g_opt_state = held.opt_state
    players: Any = held.params
    return GANState(players["d"], players["g"], d_opt_state, g_opt_state, held.state, held.ema, held.key, held.step)


# The players' turns.


@dataclass(frozen=True)
class Lazy:
    """A regulariser of every k-th step, k times as strong: in the mean the same, at a k-th of the cost.

    ``every * penalty(...)`` joins the loss in the turns of the steps 0, k, 2k, ...; all steps are one compiled graph.

    Args:
        penalty: takes what the loss it joins takes, and returns what that returns, without ``aux``.
    Source: Karras et al. 2020, section 3.1, arXiv:1912.04958, who take 16 for R1 and 8 for path lengths.

    >>> Lazy(lambda d_params, g_params, key, batch: d_params["w"].square().sum(), every=16).every
    16
    """

    penalty: Callable[..., Any]
    every: int = 16

    def __post_init__(self) -> None:
        check_sizes("Lazy", every=self.every)


class Player(NamedTuple):
    """What a player minimises and how its parameters move."""

    loss: Callable[..., Any]  # (params, others, state, key, batch) -> (loss, (state, aux))
    penalty: Callable[..., Any] | None  # the same
    every: int  # steps from one penalty to the next
    tx: GradientTransformation
    project: Callable[[Params], Params] | None  # back to the parameters that are allowed

    @classmethod
    def of(
        cls,
        name: str,
        loss: Callable[..., Any],
        tx: GradientTransformation,
        lazy: Lazy | None,
        project: Callable[[Params], Params] | None,
        *,
        stateful: bool,
        has_aux: bool,
    ) -> "Player":
        """From a loss in any of its four forms; ``name`` is for errors."""
        if not (lazy is None or isinstance(lazy, Lazy)):
            raise TypeError(f"gan.make_step: expected {name}_lazy to be a gan.Lazy, got {type(lazy).__name__}")
        penalty = None if lazy is None else _normal_form(f"{name}_lazy.penalty", lazy.penalty, stateful, False)
        every = 1 if lazy is None else lazy.every
        return cls(_normal_form(f"{name}_loss", loss, stateful, has_aux), penalty, every, tx, project)

    def objective(self, params: Params, others: Params, state: State, key: Key, batch: Any, step: Tensor) -> Any:
        """The loss with its regulariser: -> (total, (state, (loss, aux)))."""
        if self.penalty is None:
            loss, (state, aux) = self.loss(params, others, state, key, batch)
            return loss, (state, (loss, aux))
        key_loss, key_penalty = random.split(key)
        loss, (state, aux) = self.loss(params, others, state, key_loss, batch)
        penalty = self.penalty

        def due(params: Params, state: State) -> tuple[Tensor, State]:
            value, (state, _) = penalty(params, others, state, key_penalty, batch)
            return (self.every * value).to(loss.dtype), state

        def not_due(params: Params, state: State) -> tuple[Tensor, State]:
            return torch.zeros_like(loss), state

        value, state = cond(step % self.every == 0, due, not_due, params, state)
        return loss + value, (state, (loss, aux))

    def turn(
        self, held: TrainState, batch: Any, here: Params, others: Params, extra: Extra | None
    ) -> tuple[TrainState, Metrics]:
        """Moves ``held.params`` by the gradient at ``here`` against ``others``, of the objective and ``extra``."""
        shift = None if here is held.params else tree.sub(here, held.params)

        def loss_fn(params: Params, state: State, key: Key, batch: Any) -> Any:
            params = params if shift is None else tree.add(params, shift)
            total, rest = self.objective(params, others, state, held.key, batch, held.step)
            return total if extra is None else total + extra(params), rest

        after, found = make_step(loss_fn, self.tx, stateful=True, has_aux=True)(held, batch)
        loss, aux = found["aux"]
        params = after.params if self.project is None else self.project(after.params)
        return after._replace(params=params), {**found, "loss": loss, "aux": aux}


@dataclass(frozen=True)
class Game:
    """The turns of both players, which an ``update(game, state, key, batch) -> (state, metrics)`` puts together.

    A turn starts from ``state``. Its gradient may be that ``at`` another point of the game, and may have an ``extra``
    term, a function of the player's parameters.

    >>> from functorch_gen import gan, optim
    >>> loss = lambda sign: lambda params, others, key, batch: sign * params["w"] * others["w"]
    >>> def only_the_generator(game, state, key, batch):
    ...     return game.g_turn(state, key, batch)
    >>> tx = optim.sgd(1.0)
    >>> step = gan.make_step(loss(1.0), loss(-1.0), tx, tx, update=only_the_generator)
    >>> step(init_state({"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}, tx, tx, random.key(0)), None)[0].params
    {'d': {'w': tensor(1.)}, 'g': {'w': tensor(3.)}}
    """

    d: Player
    g: Player

    def d_turn(
        self, state: GANState, key: Key, batch: Any, *, at: GANState | None = None, extra: Extra | None = None
    ) -> tuple[GANState, Metrics]:
        """The discriminator's turn."""
        held = TrainState(state.d_params, state.state, state.d_opt_state, None, key, state.step)
        here = state if at is None else at
        after, found = self.d.turn(held, batch, here.d_params, here.g_params, extra)
        state = state._replace(d_params=after.params, d_opt_state=after.opt_state, state=after.state)
        return state, {f"d_{name}": value for name, value in found.items()}

    def g_turn(
        self, state: GANState, key: Key, batch: Any, *, at: GANState | None = None, extra: Extra | None = None
    ) -> tuple[GANState, Metrics]:
        """The generator's turn."""
        held = TrainState(state.g_params, state.state, state.g_opt_state, None, key, state.step)
        here = state if at is None else at
        after, found = self.g.turn(held, batch, here.g_params, here.d_params, extra)
        state = state._replace(g_params=after.params, g_opt_state=after.opt_state, state=after.state)
        return state, {f"g_{name}": value for name, value in found.items()}

    def gradients(self, d_params: Params, g_params: Params, state: GANState, keys: Tensor, batch: Any) -> Any:
        """Those of both objectives, each in its own player's parameters; two keys."""
        d_key, g_key = keys
        d, _ = grad(self.d.objective, has_aux=True)(d_params, g_params, state.state, d_key, batch, state.step)
        g, _ = grad(self.g.objective, has_aux=True)(g_params, d_params, state.state, g_key, batch, state.step)
        return d, g


def _normal_form(name: str, fun: Callable[..., Any], stateful: bool, has_aux: bool) -> Callable[..., Any]:
    """Any of the four forms of a loss as ``(params, others, state, key, batch) -> (loss, (state, aux))``."""
    forms = {(True, True): "(loss, (state, aux))", (True, False): "(loss, state)", (False, True): "(loss, aux)"}

    def pair(x: Any) -> tuple[Any, Any]:
        if not (isinstance(x, tuple) and len(x) == 2):
            form = forms[stateful, has_aux]
            raise TypeError(f"gan.make_step: expected {name} to return {form}, got {type(x).__name__}")
        return x

    def normal(params: Params, others: Params, state: State, key: Key, batch: Any) -> tuple[Tensor, tuple[State, Any]]:
        result = fun(params, others, state, key, batch) if stateful else fun(params, others, key, batch)
        loss, rest = pair(result) if stateful or has_aux else (result, None)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"gan.make_step: expected {name} to return a 0-d loss (take the mean), got {got}")
        if stateful and has_aux:
            return loss, pair(rest)
        return loss, (rest, None) if stateful else (state, rest)

    return normal
