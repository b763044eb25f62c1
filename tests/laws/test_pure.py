"""Law: functions are pure. Same arguments, same bits; arguments and the global generator stay as they were."""

import torch
from zoo import over

from functorch_gen import tree


@over("pure")
def test_function_is_pure(case):
    args = case.args(0)
    before, generator = tree.map(torch.clone, args), torch.get_rng_state()
    first, second = case.fun(*args), case.fun(*args)
    assert tree.equal(first, second), "the same arguments gave two results"
    assert tree.equal(args, before), "an argument was written to"
    assert torch.equal(torch.get_rng_state(), generator), "drew from the global generator"
