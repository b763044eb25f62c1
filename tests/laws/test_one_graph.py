"""Law: one trace serves all values. The graph of one call, run on the arguments of another, gives its result."""

from zoo import assert_trees_close, over

from functorch_gen.transforms import jit


@over("one_graph")
def test_one_graph_serves_other_values(case):
    traced = jit(case.fun, backend="aten")
    for seed in (0, 1):
        args = case.args(seed)
        # The same kernels, but batch rules and decompositions may sum in another order.
        assert_trees_close(traced(*args), case.fun(*args), rtol=1e-10, atol=1e-12)
