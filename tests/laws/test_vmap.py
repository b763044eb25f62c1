"""Law: vmap is a loop. Rows that have derivatives have a column for it in the table of compositions."""

from zoo import CASES, DIFFERENTIABLE, assert_trees_close, over

from functorch_gen import tree
from functorch_gen.transforms import vmap


@over("vmap", [case for case in CASES if case not in DIFFERENTIABLE])
def test_vmap_is_a_loop(case):
    batch = [case.args(seed) for seed in range(3)]
    looped = tree.stack([case.fun(*args) for args in batch])
    # Batched kernels sum in another order: some ulp of float64, more where sums cancel.
    assert_trees_close(vmap(case.fun)(*tree.stack(batch)), looped, rtol=1e-9, atol=1e-11)
