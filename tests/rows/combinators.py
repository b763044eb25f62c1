"""Rows of combinators and wrappers of optimizers: two steps each, the second from a state that is not zero."""

from torch import Tensor
from zoo_case import ALIKE, Case, from_draw

from functorch_gen import optim
from functorch_gen.typing import Tree


def from_optimizer(name: str, tx: optim.GradientTransformation, **skip: str) -> Case:
    def fun(params: Tree, first: Tree, second: Tree) -> Tree:
        updates, state = tx.update(first, tx.init(params), params)
        params = optim.apply_updates(params, updates)
        updates, state = tx.update(second, state, params)
        return optim.apply_updates(params, updates)

    return from_draw(f"optim.{name}", fun, lambda d: (d.params(), d.params(), d.params()), **skip)


ADAM, SGD = optim.adam(0.1), optim.sgd(0.1, momentum=0.9)
SCHEDULE_FREE = optim.schedule_free(optim.adam(0.1, b1=0.0), 0.1)
SCALED = optim.dynamic_loss_scale(ADAM, 4.0, growth_interval=1)


def scaled(params: Tree, loss: Tensor) -> Tensor:
    return optim.scale_loss(loss, optim.set(SCALED.init(params), scale=8.0))


def evaluated(params: Tree, grads: Tree) -> Tree:
    updates, state = SCHEDULE_FREE.update(grads, SCHEDULE_FREE.init(params), params)
    params = optim.apply_updates(params, updates)
    return optim.schedule_free_eval_params(state, params), optim.get(state, "z")


CASES = [
    from_optimizer("named_chain", optim.named_chain(("clip", optim.clip(0.5)), ("adam", ADAM)), table=ALIKE),
    from_optimizer("partition", optim.partition({"adam": ADAM, "sgd": SGD}, {"list.*": "adam", "*": "sgd"})),
    from_optimizer("masked", optim.masked(ADAM, ["w", "list.1.0"]), table=ALIKE),
    from_optimizer("freeze", optim.chain(ADAM, optim.freeze("inner.*")), table=ALIKE),
    from_optimizer("set_to_zero", optim.set_to_zero(), table=ALIKE),
    from_optimizer("multi_steps", optim.multi_steps(ADAM, 2)),
    from_optimizer("ema", optim.ema(0.9), table=ALIKE),
    from_optimizer("lookahead", optim.lookahead(ADAM, 2, 0.5), table=ALIKE),
    from_optimizer("schedule_free", SCHEDULE_FREE),
    from_draw("optim.schedule_free_eval_params", evaluated, lambda d: (d.params(), d.params()), table=ALIKE),
    from_optimizer("inject_hyperparams", optim.inject_hyperparams(optim.adamw)(0.1, mask="w"), table=ALIKE),
    from_optimizer("zero_nans", optim.zero_nans(), table=ALIKE),
    from_optimizer("apply_if_finite", optim.apply_if_finite(ADAM)),
    from_optimizer("master_weights", optim.master_weights(ADAM), table=ALIKE),
    from_optimizer("dynamic_loss_scale", SCALED, table=ALIKE),
    from_draw("optim.scale_loss", scaled, lambda d: (d.params(), d()), table=ALIKE),
]
