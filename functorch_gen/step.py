"""The training step as a pure function: ``step(train_state, batch) -> (train_state, metrics)``.

The caller compiles it, as a rule with the old state donated::

    step = fg.jit(make_step(loss_fn, tx, ema=ema.constant(0.999)), donate_argnums=0)
    train_state = init_state(params, tx, key, ema=ema.constant(0.999))
    train_state, metrics = step(train_state, batch)
    average = train_state.ema.average  # the averaged parameters, shaped like params

With ``flat=True`` in both, parameters, moments and average are one vector each per dtype and device, and
``train_state.params.tree()`` is the tree, as views; the loss still sees the tree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import random, tree
from functorch_gen.check import check_floating, check_shape
from functorch_gen.ema import EMA
from functorch_gen.leaves import at_least_float32
from functorch_gen.optim import Flat, GradientTransformation, Layout, LossScaleState, apply_updates, get
from functorch_gen.transforms import value_and_grad
from functorch_gen.transforms.context import is_traced
from functorch_gen.typing import Key, Params, State, Tree

__all__ = ["Step", "TrainState", "init_state", "make_step"]


class TrainState(NamedTuple):
    """All that a training run changes; with the batches it determines the rest of the run."""

    params: Tree  # nested dict of floating tensors; flat: optim.Flat
    state: State  # of stateful layers; {} if there is none
    opt_state: Any  # of the optimizer
    ema: Any  # of the moving average, whose tree ``ema.average`` is shaped like params; None if there is none
    key: Key  # (2,) int32, the same in every step
    step: Tensor  # () int64, steps taken


Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
"""A training step: the state and a batch in, the new state and the metrics out."""


def init_state(
    params: Params,
    tx: GradientTransformation,
    key: Key,
    state: State = None,
    ema: EMA | None = None,
    *,
    flat: bool = False,
) -> TrainState:
    """The state before the first step.

    ``params``, ``state`` and ``key`` are copied, and no two leaves share memory: the result may be donated to a
    compiled step, and the tensors given here stay usable.

    Args:
        state: of stateful layers; None stands for ``{}``.
        flat: puts the parameters, and with them all that ``tx`` and ``ema`` keep in their form, into one vector per
            dtype and device (:class:`functorch_gen.optim.Flat`). For element-wise ``tx``, clipping by global norm and
            masks by path; see :func:`functorch_gen.optim.flatten`.
    Raises:
        TypeError: if a parameter is no floating-point tensor; names its path.
        ValueError: if a parameter is NaN or infinite (names its path), or ``key`` is not (2,).

    >>> from functorch_gen import optim
    >>> train_state = init_state({"w": torch.ones(3)}, optim.sgd(0.1), random.key(0))
    >>> train_state.params, train_state.step
    ({'w': tensor([1., 1., 1.])}, tensor(0))
    >>> init_state({"w": torch.ones(3)}, optim.sgd(0.1), random.key(0), flat=True).params.tree()
    {'w': tensor([1., 1., 1.])}
    """
    check_shape(key, "two", "init_state: key", two=2)
    for path, x in tree.names(params).items():
        check_floating(x, f"init_state: params: {path!r}")
        if not is_traced() and not torch.isfinite(x).all():
            raise ValueError(f"init_state: params: expected finite values at {path!r}, got NaN or infinity")
    state = {} if state is None else state
    given = (params, state, key)
    held: Tree = Layout.of(params, aligned=True).ravel(params) if flat else params
    train_state = TrainState(
        params=held,
        state=state,
        opt_state=tx.init(held),
        ema=None if ema is None else ema.init(held),
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
    *,
    flat: bool = False,
) -> Step:
    """The training step of a loss: gradient, update, moving average. A pure function, for the caller to jit.

    ``tx`` is given the loss too, as the keyword ``value``. With an :func:`functorch_gen.optim.dynamic_loss_scale` in
    ``tx`` the gradient is that of the loss times the scale, as it expects.

    Args:
        loss_fn: ``loss_fn(params, key, batch) -> loss``, a 0-d tensor, or ``(loss, aux)`` with ``has_aux``. If
            ``stateful``: ``loss_fn(params, state, key, batch) -> (loss, state)``, or ``(loss, (state, aux))``. Its key
            in step n is ``fold_in(train_state.key, n)``.
        flat: for a state of ``init_state(..., flat=True)``; the results are those of the tree, to rounding.
    Returns:
        ``step(train_state, batch) -> (train_state, metrics)``; the metrics are ``loss``, ``grad_norm`` (the Euclidean
        norm over all gradients, before clipping) and, with ``has_aux``, ``aux``.
    Raises:
        ValueError: by the step, if the loss is not 0-d, or only one of step and state has an average.
        TypeError: by the step, if ``loss_fn`` does not return the pair it should, or the state is flat and the step
            not, or the other way round.

    >>> from functorch_gen import optim
    >>> tx = optim.sgd(0.5)
    >>> step = make_step(lambda params, key, batch: (params["w"] * batch).sum(), tx)
    >>> train_state = init_state({"w": torch.ones(2)}, tx, random.key(0))
    >>> train_state, metrics = step(train_state, torch.tensor([3.0, 4.0]))
    >>> train_state.params, metrics
    ({'w': tensor([-0.5000, -1.0000])}, {'loss': tensor(7.), 'grad_norm': tensor(5.)})
    """
    objective = _objective(loss_fn, stateful, has_aux)
    differentiate = value_and_grad(_scaled(_of_tree(objective) if flat else objective), has_aux=True)

    def step(train_state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        params, state, opt_state, ema_state, key, count = train_state
        _check_form(params, flat)
        if (ema is None) != (ema_state is None):
            raise ValueError("make_step: expected init_state to be given the same ema, got one with and one without")
        extra = {"layout": params.layout} if flat else {}
        scale = _loss_scale(opt_state)
        (_, (loss, state, aux)), grads = differentiate(params, scale, state, random.fold_in(key, count), batch)
        norm = tree.norm(grads) if scale is None else tree.norm(grads) / scale
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, **extra)
        params = apply_updates(params, updates)
        if ema is not None:
            _, ema_state = ema.update(params, ema_state)
        metrics = {"loss": loss, "grad_norm": norm, **({"aux": aux} if has_aux else {})}
        return TrainState(params, state, opt_state, ema_state, key, count + 1), metrics

    return step


def _check_form(params: Tree, flat: bool) -> None:
    if isinstance(params, Flat) != flat:
        want, got = ("flat", "one of trees") if flat else ("of trees", "a flat one")
        raise TypeError(f"make_step: expected a train_state {want}, got {got}; give init_state and make_step one flat=")


def _loss_scale(opt_state: State) -> Tensor | None:
    """What the optimizer wants the loss to be multiplied by, if it does."""
    return get(opt_state, LossScaleState.__name__).scale if _holds_scale(opt_state) else None


def _holds_scale(state: State) -> bool:
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return isinstance(state, LossScaleState) or any(_holds_scale(child) for child in children)


def _scaled(objective: Callable[..., Any]) -> Callable[..., Any]:
    """The loss times a scale, in at least float32, where float16 would overflow; the loss itself joins the rest."""

    def scaled(params: Any, scale: Tensor | None, *rest: Any) -> tuple[Tensor, tuple[Tensor, State, Any]]:
        loss, (state, aux) = objective(params, *rest)
        return loss if scale is None else at_least_float32(loss) * scale, (loss, state, aux)

    return scaled


def _of_tree(objective: Callable[..., Any]) -> Callable[..., Any]:
    """The objective as a function of flat parameters; its gradient is flat too."""
    return lambda params, *rest: objective(params.tree(), *rest)


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
