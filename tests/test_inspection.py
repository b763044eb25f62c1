"""What jit shows of a traced function: its text, with the source of each line, and its cost."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import functorch_gen as fg
from functorch_gen.transforms.tracing import cost, text
from functorch_gen.transforms.tracing.trace import trace


def hidden(params, x):
    return torch.tanh(x @ params["w"])


def loss(params, x):
    return hidden(params, x).square().sum()


def descend(params, x, rate):
    return fg.tree.map(lambda p, g: p - rate * g, params, fg.grad(loss)(params, x))


PARAMS = {"w": torch.linspace(-1, 1, 6).reshape(3, 2)}
X = torch.linspace(0, 1, 12).reshape(4, 3)
ATEN = {"backend": "aten"}


def lower(fun, *args, **options):
    return fg.jit(fun, **{**ATEN, **options}).lower(*args)


def line_of(fun):
    return fun.__code__.co_firstlineno + 1


# Text


def lines(fun, *args):
    """(result, operation, source) of each operation's line."""
    found = re.findall(r"^(\w+): \S.*? = ([\w.]+)\(.*?\)\s+# (.*)$", lower(fun, *args).text(), re.MULTILINE)
    assert found
    return found


def test_text_names_inputs_by_argument_and_path():
    shown = lower(descend, PARAMS, X, 0.1).text().splitlines()
    assert shown[:3] == ["input params.w: f32[3, 2]", "input x: f32[4, 3]", "input rate: f64[]"]
    assert shown[-1].startswith("return w = ")


def test_text_names_the_function_and_line_of_each_operation():
    sources = {operation: source for _, operation, source in lines(loss, PARAMS, X)}
    assert sources["aten.mm"] == f"hidden, test_inspection.py:{line_of(hidden)}"
    assert sources["aten.sum"] == f"loss, test_inspection.py:{line_of(loss)}"


@pytest.mark.parametrize("nested", [False, True], ids=["autograd", "functorch"])
def test_text_leads_backward_operations_to_the_forward_line(nested):
    gradient = fg.grad(lambda p, x: fg.grad(loss)(p, x)["w"].sum()) if nested else fg.grad(loss)
    found = lines(gradient, PARAMS, X)
    backward = {source for _, operation, source in found if operation == "aten.tanh_backward"}
    assert backward == {f"backward of hidden, test_inspection.py:{line_of(hidden)}"}


def test_text_calls_a_layer_within_the_users_function():
    net = fg.nn.Linear(3, 2)
    found = lines(lambda params, x: net(params, x), net.init(fg.random.key(0)), X)
    assert [source.split(", ")[0] for _, operation, source in found if operation == "aten.addmm"] == [
        "test_text_calls_a_layer_within_the_users_function.<lambda> > Linear"
    ]


def test_text_recomputation_keeps_its_own_line():
    found = lines(fg.grad(lambda p, x: fg.remat(hidden)(p, x).sum()), PARAMS, X)
    sources = [source for _, operation, source in found if operation == "aten.tanh"]
    assert sources == 2 * [f"hidden, test_inspection.py:{line_of(hidden)}"]


def test_text_shows_several_results_and_the_body_of_a_loop():
    def f(x):
        total, ys = fg.scan(lambda c, row: (c + row, c.sin()), torch.zeros(3), x)
        return total, torch.var_mean(ys)[1]

    shown = lower(f, X).text()
    assert re.search(r"^\(\w+: f32\[3\], \w+: f32\[4, 3\]\) = higher_order\.scan\(", shown, re.MULTILINE)
    assert re.search(r"^  \w+: f32\[3\] = aten.sin\(", shown, re.MULTILINE)
    assert re.search(r"^\(_, \w+: f32\[\]\) = aten.var_mean\(", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("dtype", "short"),
    [
        (torch.bfloat16, "bf16"),
        (torch.bool, "bool"),
        (torch.complex64, "c64"),
        (torch.float8_e4m3fn, "f8_e4m3fn"),
        (torch.uint8, "u8"),
    ],
    ids=str,
)
def test_text_abbreviates_dtypes(dtype, short):
    assert lower(lambda x: x.clone(), torch.zeros(2).to(dtype)).text().startswith(f"input x: {short}[2]")


def test_text_shows_results_without_names_when_some_are_donated():
    traced = trace(lambda x: (x, x + 1), [torch.ones(2)])
    output = next(n for n in traced.graph.graph.nodes if n.op == "output")
    output.args = (output.args[0][1:],)
    assert text.readable(traced, ["x"]).splitlines()[-1] == "return add"


# Cost


def test_cost_counts_the_flops_of_products():
    expected = 2 * 4 * 3 * 2 + 3 * (4 * 2) - (4 * 2 - 1)  # mm, tanh and square of (4, 2), sum of () instead of (4, 2)
    assert lower(loss, PARAMS, X).cost().flops == expected


def test_cost_counts_a_convolution_as_torch_does():

    x, w = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3)
    with FlopCounterMode(display=False) as counter:
        F.conv2d(x, w, padding=1)
    assert lower(lambda x, w: F.conv2d(x, w, padding=1), x, w).cost().flops == counter.get_total_flops()


def chain(x):
    return ((x + 1).sin() * 2).exp()


def test_cost_of_an_unfused_chain_moves_every_intermediate():
    found = lower(chain, torch.ones(1000)).cost()
    assert found.bytes == 4 * 2 * 4000  # each of four operations reads and writes 1,000 float32
    assert found.peak == 3 * 4000  # the input, and one operation's input and output


def test_cost_of_a_fused_chain_moves_its_ends():
    found = lower(chain, torch.ones(1000), backend="inductor").cost()
    assert (found.bytes, found.peak) == (2 * 4000, 2 * 4000)


def test_cost_counts_donated_buffers_once():
    x = torch.ones(1000)
    kept = lower(chain, x, backend="inductor").cost().peak
    assert fg.jit(chain, donate_argnums=0).lower(x.clone()).cost().peak == kept - 4000


def test_cost_frees_donated_inputs_that_are_not_written_to():
    graph = trace(chain, [torch.ones(1000)]).graph
    assert cost.estimate(graph, {0}, fused=False).peak == 2 * 4000


def test_cost_of_a_fused_reduction_reads_once():
    found = lower(lambda x: (x - x.mean()) / x.var().sqrt(), torch.ones(1000), backend="inductor").cost()
    assert 3 * 4000 <= found.bytes <= 3 * 4000 + 6 * 4  # x for the moments, x and the result, and the moments


def test_cost_counts_a_loop_body_once_a_step():
    def f(x, w):
        return fg.scan(lambda c, row: (torch.mv(w, c) + row, c), torch.zeros(3), x)

    products = 4 * 2 * 3 * 3
    found = lower(f, X, torch.ones(3, 3)).cost()
    assert products <= found.flops <= products + 4 * 12 + 12 + 24  # and additions, copies, the stacked results


def test_cost_table_adds_up():
    found = lower(descend, PARAMS, X, 0.1).cost()
    assert {"hidden", "backward of hidden", "loss", "backward of loss"} <= found.functions.keys()
    assert found.flops == sum(row.flops for row in found.functions.values())
    table = str(found).splitlines()
    assert table[0].split() == ["function", "ops", "flops", "bytes"]
    assert table[-2].split()[-2:] == [f"{found.flops:,}", f"{found.bytes:,}"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aten", "inductor"])
@pytest.mark.parametrize("name", ["mlp", "tiny", "unet", "gpt"])
def test_cost_predicts_the_peak_of_a_training_step(name, backend):
    """Measured by torch's profiler, which sees every allocation; the bound is the issue's."""
    from tests.bench.memory import peak_bytes
    from tests.bench.programs import PROGRAMS

    program = next(make() for key, make in PROGRAMS.items() if name in key.lower())
    average = fg.ema.constant(0.999)
    tx = fg.optim.chain(fg.optim.clip_by_global_norm(1.0), fg.optim.adamw(1e-3))
    step = fg.jit(fg.step.make_step(program.loss, tx, ema=average), donate_argnums=0, backend=backend)
    state = fg.step.init_state(program.params, tx, fg.random.key(0), ema=average)
    predicted = step.lower(state, program.batch).cost().peak
    state, _ = step(state, program.batch)
    inputs = fg.tree.nbytes((state, program.batch))
    measured = inputs + peak_bytes(lambda: step(state, program.batch))
    assert predicted == pytest.approx(measured, rel=0.15)
