"""The training step of two players as one pure function: ``step(state, batch) -> (state, metrics)``.

Each player is a tree of parameters with a loss of its own, whose first argument is what it may change::

    d_loss(d_params, g_params, key, batch) -> ()
    g_loss(g_params, d_params, key, batch) -> ()

    step = fg.jit(make_step(d_loss, g_loss, d_tx, g_tx, ema=average), donate_argnums=0)
    state = init_state(d_params, g_params, d_tx, g_tx, key, ema=average)
    state, metrics = step(state, batch)
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from functorch_gen import random, tree
from functorch_gen.check import check_number
from functorch_gen.ema import EMA
from functorch_gen.gan.game import Game, GANState, Lazy, Metrics, Player
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.optim import GradientTransformation
from functorch_gen.transforms import grad, jacrev
from functorch_gen.typing import Key, Number, Params

__all__ = ["Update", "alternating", "consensus", "extragradient", "game_jacobian", "make_step", "simultaneous"]

Update: TypeAlias = Callable[[Game, GANState, Key, Any], tuple[GANState, Metrics]]
"""``update(game, state, key, batch) -> (state, metrics)``: how the players take turns."""


def alternating(game: Game, state: GANState, key: Key, batch: Any) -> tuple[GANState, Metrics]:
    """The discriminator's turn, then the generator's, who sees it moved.

    Source: Goodfellow et al. 2014, algorithm 1, arXiv:1406.2661.

    >>> import torch
    >>> from functorch_gen import gan, optim
    >>> loss = lambda sign: lambda params, others, key, batch: sign * params["w"] * others["w"]
    >>> players, tx = ({"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}), optim.sgd(1.0)
    >>> step = make_step(loss(1.0), loss(-1.0), tx, tx, update=alternating)
    >>> step(gan.init_state(*players, tx, tx, random.key(0)), None)[0].params
    {'d': {'w': tensor(-1.)}, 'g': {'w': tensor(1.)}}
    """
    d_key, g_key = random.split(key)
    state, d_metrics = game.d_turn(state, d_key, batch)
    state, g_metrics = game.g_turn(state, g_key, batch)
    return state, d_metrics | g_metrics


def simultaneous(game: Game, state: GANState, key: Key, batch: Any) -> tuple[GANState, Metrics]:
    """Both turns from the same point.

    Source: Mescheder et al. 2017, algorithm 1, arXiv:1705.10461.

    >>> import torch
    >>> from functorch_gen import gan, optim
    >>> loss = lambda sign: lambda params, others, key, batch: sign * params["w"] * others["w"]
    >>> players, tx = ({"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}), optim.sgd(1.0)
    >>> step = make_step(loss(1.0), loss(-1.0), tx, tx, update=simultaneous)
    >>> step(gan.init_state(*players, tx, tx, random.key(0)), None)[0].params
    {'d': {'w': tensor(-1.)}, 'g': {'w': tensor(3.)}}
    """
    d_key, g_key = random.split(key)
    after, d_metrics = game.d_turn(state, d_key, batch)
    after, g_metrics = game.g_turn(after, g_key, batch, at=state)
    return after, d_metrics | g_metrics


def extragradient(game: Game, state: GANState, key: Key, batch: Any) -> tuple[GANState, Metrics]:
    """Looks a simultaneous update ahead, and moves from where it was by the gradients there.

    w' = w - eta F(w), w <- w - eta F(w'), F the gradients of both. Optimizers with memory see both gradients, as in
    ExtraAdam, so their counts and schedules advance by two in a step. Each gradient has a key of its own.

    Source: Gidel et al. 2019, algorithm 4, arXiv:1802.10551.

    >>> import torch
    >>> from functorch_gen import gan, optim
    >>> loss = lambda sign: lambda params, others, key, batch: sign * params["w"] * others["w"]
    >>> players, tx = ({"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}), optim.sgd(0.5)
    >>> step = make_step(loss(1.0), loss(-1.0), tx, tx, update=extragradient)
    >>> step(gan.init_state(*players, tx, tx, random.key(0)), None)[0].params
    {'d': {'w': tensor(-0.2500)}, 'g': {'w': tensor(2.)}}
    """
    ahead_key, d_key, g_key = random.split(key, 3)
    ahead, _ = simultaneous(game, state, ahead_key, batch)
    after = ahead._replace(d_params=state.d_params, g_params=state.g_params)
    after, d_metrics = game.d_turn(after, d_key, batch, at=ahead)
    after, g_metrics = game.g_turn(after, g_key, batch, at=ahead)
    return after, d_metrics | g_metrics


def consensus(weight: Number) -> Update:
    """Simultaneous updates of which both players also lessen weight / 2 |F|^2, F the gradients of both.

    It damps the rotation of the game around its equilibrium; derivatives of second order. The metrics are those of the
    losses alone, the gradients' norms those of the whole.

    Source: Mescheder et al. 2017, algorithm 2, arXiv:1705.10461, who take 10.

    >>> import torch
    >>> from functorch_gen import gan, optim
    >>> loss = lambda sign: lambda params, others, key, batch: sign * params["w"] * others["w"]
    >>> players, tx = ({"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}), optim.sgd(0.5)
    >>> step = make_step(loss(1.0), loss(-1.0), tx, tx, update=consensus(1.0))
    >>> step(gan.init_state(*players, tx, tx, random.key(0)), None)[0].params
    {'d': {'w': tensor(-0.5000)}, 'g': {'w': tensor(1.5000)}}
    """
    check_number("consensus", "weight", weight, low=0)

    def update(game: Game, state: GANState, key: Key, batch: Any) -> tuple[GANState, Metrics]:
        keys = random.split(key)

        def disagreement(d_params: Params, g_params: Params) -> Tensor:
            field = game.gradients(d_params, g_params, state, keys, batch)
            return tree.vdot(field, tree.scale(field, 0.5 * weight))

        after, d_metrics = game.d_turn(state, keys[0], batch, extra=lambda d: disagreement(d, state.g_params))
        after, g_metrics = game.g_turn(after, keys[1], batch, at=state, extra=lambda g: disagreement(state.d_params, g))
        return after, d_metrics | g_metrics

    return update


def make_step(
    d_loss: Callable[..., Any],
    g_loss: Callable[..., Any],
    d_tx: GradientTransformation,
    g_tx: GradientTransformation,
    n_critic: int = 1,
    *,
    update: Update = alternating,
    ema: EMA | None = None,
    stateful: bool = False,
    has_aux: bool = False,
    d_lazy: Lazy | None = None,
    g_lazy: Lazy | None = None,
    d_project: Callable[[Params], Params] | None = None,
) -> Callable[[GANState, Any], tuple[GANState, Metrics]]:
    """The training step of two players: turns, moving average of the generator. A pure function, for the caller to jit.

    Step n has the key ``fold_in(state.key, n)``; every turn draws from one of its own. Two time-scales (Heusel et al.
    2017, arXiv:1706.08500) are two learning rates.

    Args:
        d_loss: ``d_loss(d_params, g_params, key, batch) -> loss``, a 0-d tensor, or ``(loss, aux)`` with ``has_aux``.
            If ``stateful``: ``d_loss(d_params, g_params, state, key, batch) -> (loss, state)``, or
            ``(loss, (state, aux))``; the state is one tree that both players see and hand on.
        g_loss: the same with ``g_params`` first.
        n_critic: turns of the discriminator for one of the generator. All see the same batch: a loss that wants
            another part of it in each turn draws it with its key.
        update: how the players take turns, the last of the discriminator's among them: :func:`alternating`,
            :func:`simultaneous`, :func:`extragradient`, ``consensus(weight)``, or a function of your own.
        d_lazy, g_lazy: regularisers of every k-th step.
        d_project: maps the discriminator's parameters back after each of its turns: weight clipping is
            ``lambda params: fg.tree.clip(params, -0.01, 0.01)``.
    Returns:
        ``step(state, batch) -> (state, metrics)``; the metrics are ``d_loss``, ``g_loss`` (without regularisers),
        ``d_grad_norm``, ``g_grad_norm`` (before clipping) and, with ``has_aux``, ``d_aux``, ``g_aux``, each of the
        player's last turn.
    Raises:
        ValueError: if ``n_critic`` < 1; by the step, if a loss is not 0-d, or one of step and state has an average.
        TypeError: if a regulariser is no :class:`Lazy`; by the step, if a loss does not return the pair it should.

    >>> import torch
    >>> from functorch_gen import optim
    >>> from functorch_gen.gan import init_state
    >>> d_loss = lambda d, g, key, batch: d["w"] * (g["mean"] - batch.mean())
    >>> g_loss = lambda g, d, key, batch: -d["w"] * g["mean"]
    >>> d_tx, g_tx = optim.sgd(1.0), optim.sgd(0.5)
    >>> step = make_step(d_loss, g_loss, d_tx, g_tx)
    >>> state = init_state({"w": torch.tensor(0.0)}, {"mean": torch.tensor(0.0)}, d_tx, g_tx, random.key(0))
    >>> state, metrics = step(state, torch.tensor([2.0, 4.0]))
    >>> state.params, sorted(metrics)
    ({'d': {'w': tensor(3.)}, 'g': {'mean': tensor(1.5000)}}, ['d_grad_norm', 'd_loss', 'g_grad_norm', 'g_loss'])
    """
    check_sizes("gan.make_step", n_critic=n_critic)

    forms = {"stateful": stateful, "has_aux": has_aux}
    d = Player.of("d", d_loss, d_tx, d_lazy, d_project, **forms)
    game = Game(d, Player.of("g", g_loss, g_tx, g_lazy, None, **forms))

    def step(state: GANState, batch: Any) -> tuple[GANState, Metrics]:
        if (ema is None) != (state.ema is None):
            raise ValueError(
                "gan.make_step: expected init_state to be given the same ema, got one with and one without"
            )
        *early, last = random.split(random.fold_in(state.key, state.step), n_critic)
        for key in early:
            state, _ = game.d_turn(state, key, batch)
        state, metrics = update(game, state, last, batch)
        _, average = (None, None) if ema is None else ema.update(state.g_params, state.ema)
        metrics = {name: value for name, value in metrics.items() if has_aux or not name.endswith("aux")}
        return state._replace(ema=average, step=state.step + 1), metrics

    return step


def game_jacobian(
    d_loss: Callable[..., Tensor],
    g_loss: Callable[..., Tensor],
    d_params: Params,
    g_params: Params,
    key: Key,
    batch: Any,
) -> Tensor:
    """The Jacobian of the direction in which both players move, at a point of the game: -> (n, n).

    v = (-grad d_loss in d_params, -grad g_loss in g_params), raveled, as a function of both, raveled. Near an
    equilibrium the flow of v converges if all eigenvalues have a negative real part; simultaneous steps of size eta do
    if |1 + eta eigenvalue| < 1 for all. It is not symmetric: imaginary parts are rotation.

    Args:
        d_loss, g_loss: as of :func:`make_step`, without state or aux.
    Source: Mescheder et al. 2017, section 2, arXiv:1705.10461; Mescheder et al. 2018, section 2, arXiv:1801.04406.

    >>> import torch
    >>> d_loss = lambda d, g, key, batch: d["w"] * g["w"] + d["w"] ** 2
    >>> g_loss = lambda g, d, key, batch: -d["w"] * g["w"] - g["w"] ** 2
    >>> game_jacobian(d_loss, g_loss, {"w": torch.tensor(0.0)}, {"w": torch.tensor(0.0)}, random.key(0), None)
    tensor([[-2., -1.],
            [ 1.,  2.]])
    """
    d_key, g_key = random.split(key)
    point, unravel = tree.ravel((d_params, g_params))

    def velocity(point: Tensor) -> Tensor:
        d, g = unravel(point)
        slopes = grad(d_loss)(d, g, d_key, batch), grad(g_loss)(g, d, g_key, batch)
        return -tree.ravel(slopes)[0]

    return jacrev(velocity)(point)
