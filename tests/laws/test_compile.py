"""Law: plain ``torch.compile(fullgraph=True)`` traces the function without a break.

Rows of the table of compositions have a column for it.
"""

import pytest
import torch
from zoo import CASES, TABLE, assert_trees_close, over


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Dynamo is slow: a row of each kind always, the others in the slow run.
QUICK = {"tree.add", "random.split", "random.normal", "random.categorical", "optim.sgd"}


@over("compile", [case for case in CASES if case not in TABLE], quick=QUICK)
def test_torch_compile_equals_eager(case):
    args = case.args(0)
    compiled = torch.compile(case.fun, fullgraph=True, backend="aot_eager")
    assert_trees_close(compiled(*args), case.fun(*args), rtol=1e-10, atol=1e-12)
