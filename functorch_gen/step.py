"""The training step as a pure function: ``step(train_state, batch) -> (train_state, metrics)``.

The caller compiles it, as a rule with the old state donated::

    step = fg.jit(make_step(loss_fn, tx, ema=ema.constant(0.999)), donate_argnums=0)
    train_state = init_state(params, tx, key, ema=ema.constant(0.999))
    train_state, metrics = step(train_state, batch)
    average = train_state.ema.average  # the averaged parameters, shaped like params
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import random, tree
from functorch_gen.check import check_floating, check_shape
from functorch_gen.ema import EMA
from functorch_gen.optim import GradientTransformation, apply_updates
from functorch_gen.transforms import value_and_grad
from functorch_gen.transforms.context import is_traced
from functorch_gen.typing import Key, Params, State, Tree

__all__ = ["Step", "TrainState", "init_state", "make_step"]


class TrainState(NamedTuple):
    """All that a training run changes; with the batches it determines the rest of the run."""

    params: Params  # nested dict of floating tensors
    state: State  # of stateful layers; {} if there is none
    opt_state: Any  # of the optimizer
    ema: Any  # of the moving average, whose tree ``ema.average`` is shaped like params; None if there is none
    key: Key  # (2,) int32, the same in every step
    step: Tensor  # () int64, steps taken


Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
"""A training step: the state and a batch in, the new state and the metrics out."""


def init_state(
    params: Params, tx: GradientTransformation, key: Key, state: State = None, ema: EMA | None = None
) -> TrainState:
    """The state before the first step.

    ``params``, ``state`` and ``key`` are copied, and no two leaves share memory: the result may be donated to a
    compiled step, and the tensors given here stay usable.

    Args:
        state: of stateful layers; None stands for ``{}``.
    Raises:
        TypeError: if a parameter is no floating-point tensor; names its path.
        ValueError: if a parameter is NaN or infinite (names its path), or ``key`` is not (2,).

    >>> from functorch_gen import optim
    >>> train_state = init_state({"w": torch.ones(3)}, optim.sgd(0.1), random.key(0))
    >>> train_state.params, train_state.step
    ({'w': tensor([1., 1., 1.])}, tensor(0))
    """
    check_shape(key, "two", "init_state: key", two=2)
    for path, x in tree.names(params).items():
        check_floating(x, f"init_state: params: {path!r}")
        if not is_traced() and not torch.isfinite(x).all():
            raise ValueError(f"init_state: params: expected finite values at {path!r}, got NaN or infinity")
    given = (params, {} if state is None else state, key)
    params, state, key = given
    train_state = TrainState(
        params=params,
        state=state,
        opt_state=tx.init(params),
        ema=None if ema is None else ema.init(params),
        key=key,
        step=torch.zeros((), dtype=torch.int64, device=key.device),
    )
    return train_state if is_traced() else _unshared(train_state, given)


def _unshared(train_state: TrainState, given: Tree) -> TrainState:
    """Copies the leaves whose memory is the caller's or that of an earlier leaf."""
    taken = {_address(x) for x in tree.leaves(given)}

    def own(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if _address(x) in taken:
            x = x.clone()
        taken.add(_address(x))
        return x

    return tree.map(own, train_state)


def _address(x: Any) -> int:
    return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else 0


def make_step(
    loss_fn: Callable[..., Any],
    tx: GradientTransformation,
    ema: EMA | None = None,
    stateful: bool = False,
    has_aux: bool = False,
) -> Step:
    """The training step of a loss: gradient, update, moving average. A pure function, for the caller to jit.

    Args:
        loss_fn: ``loss_fn(params, key, batch) -> loss``, a 0-d tensor, or ``(loss, aux)`` with ``has_aux``. If
            ``stateful``: ``loss_fn(params, state, key, batch) -> (loss, state)``, or ``(loss, (state, aux))``. Its key
            in step n is ``fold_in(train_state.key, n)``.
    Returns:
        ``step(train_state, batch) -> (train_state, metrics)``; the metrics are ``loss``, ``grad_norm`` (the Euclidean
        norm over all gradients, before clipping) and, with ``has_aux``, ``aux``.
    Raises:
        ValueError: by the step, if the loss is not 0-d.
        TypeError: by the step, if ``loss_fn`` does not return the pair it should.

    >>> from functorch_gen import optim
    >>> tx = optim.sgd(0.5)
    >>> step = make_step(lambda params, key, batch: (params["w"] * batch).sum(), tx)
    >>> train_state = init_state({"w": torch.ones(2)}, tx, random.key(0))
    >>> train_state, metrics = step(train_state, torch.tensor([3.0, 4.0]))
    >>> train_state.params, metrics
    ({'w': tensor([-0.5000, -1.0000])}, {'loss': tensor(7.), 'grad_norm': tensor(5.)})
    """
    differentiate = value_and_grad(_objective(loss_fn, stateful, has_aux), has_aux=True)

    def step(train_state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        params, state, opt_state, ema_state, key, count = train_state
        (loss, (state, aux)), grads = differentiate(params, state, random.fold_in(key, count), batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = apply_updates(params, updates)
        if ema is not None:
            _, ema_state = ema.update(params, ema_state)
        metrics = {"loss": loss, "grad_norm": tree.norm(grads), **({"aux": aux} if has_aux else {})}
        return TrainState(params, state, opt_state, ema_state, key, count + 1), metrics

    return step


def _objective(loss_fn: Callable[..., Any], stateful: bool, has_aux: bool) -> Callable[..., Any]:
    """Any of the four forms of ``loss_fn`` as ``(params, state, key, batch) -> (loss, (state, aux))``."""

    def objective(params: Params, state: State, key: Key, batch: Any) -> tuple[Tensor, tuple[State, Any]]:
        result = loss_fn(params, state, key, batch) if stateful else loss_fn(params, key, batch)
        loss, rest = _pair(result, "(loss, ...)") if stateful or has_aux else (result, None)
        if stateful and has_aux:
            state, aux = _pair(rest, "(loss, (state, aux))")
        else:
            state, aux = (rest, None) if stateful else (state, rest)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"make_step: expected loss_fn to return a 0-d loss (take the mean), got {got}")
        return loss, (state, aux)

    return objective


def _pair(result: Any, form: str) -> tuple[Any, Any]:
    if not (isinstance(result, tuple) and len(result) == 2):
        got = f"tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise TypeError(f"make_step: expected loss_fn to return {form}, got {got}")
    return result
