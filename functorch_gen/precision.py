"""Training in 16 bits: parameters with a float32 copy, and losses scaled against underflow."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_number, check_positive
from functorch_gen.gradient_transformation import GradientTransformation, apply_updates, require_params, update_if
from functorch_gen.leaves import at_least_float32, check_params, copies, map_same, scalar_zero
from functorch_gen.paths import get
from functorch_gen.typing import Params, State, Tree

__all__ = ["LossScaleState", "MasterWeightsState", "dynamic_loss_scale", "master_weights", "scale_loss"]


class MasterWeightsState(NamedTuple):
    """State of :func:`master_weights`."""

    master: Params  # like the parameters, at least float32
    inner_state: State


def master_weights(tx: GradientTransformation) -> GradientTransformation:
    """Runs ``tx`` on a float32 copy of 16-bit parameters: after each step they equal the copy, rounded once.

    The updates of 16-bit leaves are float64, in which p + (copy - p) is the copy. ``update`` needs the parameters.

    Source: Micikevicius et al. 2018, section 3.1, arXiv:1710.03740.

    >>> from functorch_gen import optim
    >>> tx, params = master_weights(optim.zero_nans()), [torch.ones(1, dtype=torch.bfloat16)]
    >>> tx.update([torch.tensor([0.001])], tx.init(params), params)[1].master
    [tensor([1.0010])]
    """

    def init(params: Params) -> MasterWeightsState:
        check_params("master_weights", params)
        master = copies(params)
        return MasterWeightsState(master, tx.init(master))

    def update(grads: Tree, state: Any, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
        params, grads = require_params("master_weights", params), tree.map(at_least_float32, grads)
        updates, inner = tx.update(grads, state.inner_state, state.master, **extra)
        master = apply_updates(state.master, updates)

        def difference(p: Tensor, m: Tensor, u: Tensor) -> Tensor:
            return u if p.dtype == m.dtype else m.double() - p.double()

        return map_same("master_weights", difference, params, master, updates), MasterWeightsState(master, inner)

    return GradientTransformation(init, update)


class LossScaleState(NamedTuple):
    """State of :func:`dynamic_loss_scale`."""

    scale: Tensor  # () float32
    good_steps: Tensor  # () int64: updates since the scale last changed
    skipped: Tensor  # () int64: updates left out so far
    inner_state: State


def dynamic_loss_scale(
    tx: GradientTransformation,
    init_scale: float = 2.0**15,
    growth_interval: int = 2000,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    min_scale: float = 1.0,
) -> GradientTransformation:
    """Takes gradients of a loss times ``state.scale`` (:func:`scale_loss`) and gives ``tx`` those of the loss itself.

    Where one is infinite or NaN, parameters and ``tx`` stay as they are and the scale shrinks by ``backoff_factor``;
    after ``growth_interval`` finite ones in a row it grows by ``growth_factor``, as far as float32 goes. The rule of
    ``torch.amp.GradScaler``, but for ``min_scale``. What clips gradients belongs into ``tx``.

    Source: Micikevicius et al. 2018, section 3.2, arXiv:1710.03740.

    >>> from functorch_gen import optim
    >>> tx, grads = dynamic_loss_scale(optim.zero_nans(), init_scale=4.0), [torch.tensor(8.0)]
    >>> tx.update(grads, tx.init(grads))
    ([tensor(2.)], LossScaleState(scale=tensor(4.), good_steps=tensor(1), skipped=tensor(0), inner_state=EmptyState()))
    """
    check_positive("dynamic_loss_scale", init_scale=init_scale, growth_interval=growth_interval, min_scale=min_scale)
    check_number("dynamic_loss_scale", "growth_factor", growth_factor, low=1)
    check_number("dynamic_loss_scale", "backoff_factor", backoff_factor, low=0, high=1)

    def init(params: Params) -> LossScaleState:
        count = scalar_zero(params, torch.int64)
        return LossScaleState(count.float() + init_scale, count, count.clone(), tx.init(params))

    def update(grads: Tree, state: LossScaleState, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
        scale, good = state.scale, state.good_steps + 1
        grads = tree.map(lambda g: at_least_float32(g) / scale, grads)
        finite = tree.all_finite(grads)
        updates, inner = update_if(finite, tx, grads, state.inner_state, params, **extra)
        due = good >= growth_interval
        grown = torch.where(due & (scale * growth_factor).isfinite(), scale * growth_factor, scale)
        scale = torch.where(finite, grown, (scale * backoff_factor).clamp(min=min_scale)).to(scale.dtype)
        good = torch.where(finite & ~due, good, 0)
        return updates, LossScaleState(scale, good, state.skipped + (~finite).long(), inner)

    return GradientTransformation(init, update)


def scale_loss(loss: Tensor, opt_state: State) -> Tensor:
    """The loss, in at least float32, times the scale of the :func:`dynamic_loss_scale` anywhere in ``opt_state``.

    >>> from functorch_gen import optim
    >>> scale_loss(torch.tensor(3.0), dynamic_loss_scale(optim.zero_nans(), 4.0).init([torch.ones(1)]))
    tensor(12.)
    """
    return at_least_float32(loss) * get(opt_state, "LossScaleState").scale
