"""Law: the dtype of the result follows the input's."""

import torch
from zoo import over

from functorch_gen import tree


@over("dtype")
def test_dtype_follows_the_input(case):
    for dtype in (torch.float64, torch.float32):
        result = case.fun(*tree.cast(case.args(0), dtype))
        found = {path: x.dtype for path, x in tree.names(result).items() if x.is_floating_point()}
        assert set(found.values()) <= {dtype}, found
