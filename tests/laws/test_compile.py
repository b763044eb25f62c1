"""Law: plain ``torch.compile(fullgraph=True)`` traces the function without a break."""

import pytest
import torch
from zoo import assert_trees_close, over


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Dynamo is slow: a row of each kind always, the others in the slow run.
QUICK = {
    "tree.lerp",
    "tree.norm",
    "tree.partition",
    "tree.ravel",
    "random.split",
    "random.normal",
    "nn.Sequential with a key",
    "models.SpatialAttention",
    "optim.sgd",
    "ema.warmup",
    "noise.VPCosine",
    "diffusion.loss_at edm",
    "exact.Gaussian",
    "metrics.mmd",
    "scan of remat",
    "grad of a loss",
}


@over("compile", quick=QUICK)
def test_torch_compile_equals_eager(case):
    args = case.args(0)
    compiled = torch.compile(case.fun, fullgraph=True, backend="aot_eager")
    assert_trees_close(compiled(*args), case.fun(*args), rtol=1e-10, atol=1e-12)
