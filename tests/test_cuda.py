"""backend="cudagraph": recording and replaying with a stand-in for the device, and the whole where there is one."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import functorch_gen as fg
from functorch_gen import optim, random, step
from functorch_gen.transforms.tracing import backends
from functorch_gen.transforms.tracing.cudagraph import Replayed, cuda_device, on_device
from functorch_gen.transforms.tracing.trace import trace

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Stand:
    """Records as a device does: nothing runs and results hold garbage until the first replay, at fixed addresses."""

    device = torch.device("cpu")

    def __init__(self):
        self.warm_runs = self.records = 0
        self.given = []  # to the last recording

    def warm(self, run, inputs):
        self.warm_runs += 1
        return run(*inputs)

    def record(self, run, inputs):
        self.records += 1
        self.given = inputs
        kept = [x.detach() for x in inputs]  # the same memory, whatever becomes of the caller's tensors
        before = [x.clone() for x in kept]
        results = [x.clone() for x in run(*kept)]
        for x, old in zip(kept, before, strict=True):
            x.copy_(old)
        for x in results:
            x.fill_(float("nan"))

        def replay():
            for held, x in zip(results, run(*kept), strict=True):
                held.copy_(x)

        return replay, results


def update(state, x):
    """A donated step: ``state += x``, and a result of its own."""
    state += x
    return [(state * x).sum()]


def stepped(count=1):
    """A recorded step on ``count`` states in turn."""
    stand = Stand()
    return stand, Replayed(update, [True, False], stand), [torch.full((3,), float(i)) for i in range(count)]


# Recording and replaying.


def test_replayed_steps_equal_the_plain_loop():
    stand, run, (state,) = stepped()
    expected, told = state.clone(), []
    for i in range(5):
        x = torch.full((3,), 0.5 + i)  # of another address and value each time
        (result,) = run(state, x)
        expected = expected + x
        told.append((result, (expected * x).sum()))
        assert torch.equal(state, expected)
    assert all(torch.equal(a, b) for a, b in told)  # results are not written over by later calls
    assert (stand.warm_runs, stand.records) == (1, 1)


def test_recording_copies_what_moves_and_nothing_else():
    stand, run, (state,) = stepped()
    x = torch.ones(3)
    for _ in range(2):
        run(state, x)
    assert [a.data_ptr() == b.data_ptr() for a, b in zip(stand.given, (state, x), strict=True)] == [True, False]


def test_states_in_turn_are_recorded_each():
    stand, run, states = stepped(2)
    for _ in range(4):
        for state in states:
            run(state, torch.ones(3))
    assert [x.tolist() for x in states] == [[4.0] * 3, [5.0] * 3]
    assert (stand.warm_runs, stand.records) == (2, 2)


def test_state_that_moves_is_never_recorded():
    stand, run, _ = stepped()
    kept = [torch.zeros(3) for _ in range(6)]  # alive, so that no address comes twice
    for state in kept:
        run(state, torch.ones(3))
    assert all(torch.equal(x, torch.ones(3)) for x in kept)
    assert (stand.warm_runs, stand.records) == (6, 0)


def test_recording_does_not_touch_a_state_that_was_given_up():
    _, run, (first,) = stepped()
    for _ in range(3):
        run(first, torch.ones(3))
    second = torch.zeros(3)
    for _ in range(3):
        run(second, torch.ones(3))
    assert torch.equal(first, torch.full((3,), 3.0))


def test_failure_to_record_leaves_the_state_and_says_what_to_do():
    class Refusing(Stand):
        def record(self, run, inputs):
            raise RuntimeError("operation not permitted when stream is capturing")

    run, state = Replayed(update, [True, False], Refusing()), torch.zeros(3)
    run(state, torch.ones(3))
    with pytest.raises(RuntimeError, match="capturing") as caught:
        run(state, torch.ones(3))
    assert "backend='inductor'" in caught.value.__notes__[0]
    assert torch.equal(state, torch.ones(3))


# The whole of jit, on the stand-in.


@pytest.fixture
def stand(monkeypatch):
    """jit takes the CPU for a CUDA device, and runs operation by operation what it would compile."""
    made = Stand()
    monkeypatch.setattr(backends, "cuda_device", lambda graph: made.device)
    monkeypatch.setattr(backends, "CudaRecorder", lambda device: made)
    monkeypatch.setattr(backends, "_standalone", backends.run_as_is)
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    return made


def training(device):
    """A state, a step and batches of a small regression with noise."""
    net = fg.nn.Linear(3, 2)
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
    key = random.key(0, device=device)

    def loss_fn(params, key, batch):
        x, y = batch
        return (net(params, x + 0.1 * random.normal(key, x.shape)) - y).square().mean()

    state = step.init_state(net.init(key), tx, key)
    keys = random.split(random.key(1, device=device), 6)
    batches = [(random.normal(k, (4, 3)), random.normal(k, (4, 2))) for k in keys]
    return state, step.make_step(loss_fn, tx), batches


def test_recorded_training_equals_eager(stand):
    state, train, batches = training("cpu")
    recorded, given = fg.jit(train, donate_argnums=0, backend="cudagraph"), fg.tree.map(torch.clone, state)
    addresses = [x.data_ptr() for x in fg.tree.leaves(given)]
    for batch in batches:
        state, metrics = train(state, batch)
        given, got = recorded(given, batch)
        assert fg.tree.equal(got, metrics)
    assert fg.tree.equal(given, state)
    assert [x.data_ptr() for x in fg.tree.leaves(given)] == addresses
    assert (stand.warm_runs, stand.records) == (1, 1)


def test_recorded_program_follows_numbers_and_closed_over_tensors(stand):
    offset = torch.zeros(3)
    run = fg.jit(lambda x, n: n * x + offset, backend="cudagraph")
    for i in range(5):
        offset += 1
        assert torch.equal(run(torch.full((3,), float(i)), 0.5 * i), torch.full((3,), 0.5 * i * i + i + 1))
    assert stand.given[-1].data_ptr() == offset.data_ptr()


# What a recording can hold: traced for a device that need not be there.


def cuda(*shape, index=0):
    with FakeTensorMode():
        return torch.empty(shape, device=f"cuda:{index}")


def graph(f, *leaves):
    return trace(f, leaves).graph


def test_cuda_device_is_the_one_of_all_tensors():
    assert cuda_device(graph(lambda x, n: x * (2 * n + 1), cuda(3, index=1), 0.5)) == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("f", "leaves", "got"),
    [
        (lambda x: 2 * x, [torch.ones(3)], "got cpu"),
        (lambda x, y: (x, 2 * y), [cuda(3), cuda(3, index=1)], "got cuda:0 and cuda:1"),
        (lambda n: 2 * n, [1.0], "got numbers only"),
        (lambda x: x + torch.arange(3).to(x.device), [cuda(3)], 'got cuda:0 and cpu, in .*: ".*torch.arange'),
        (lambda x: x.sum().cpu(), [cuda(3)], "got cuda:0 and cpu"),
        (lambda x: fg.debug.print("x = {x}", x=x) or x, [cuda(3)], "got debug.print"),
    ],
    ids=["cpu", "two devices", "numbers", "tensor made elsewhere", "fetched number", "callback"],
)
def test_cuda_device_names_what_is_elsewhere(f, leaves, got):
    with pytest.raises(ValueError, match=rf"^jit: expected .* for backend='cudagraph', {got}"):
        cuda_device(graph(f, *leaves))


def test_jit_refuses_cudagraph_on_the_cpu_and_keeps_the_state():
    run, x = fg.jit(lambda x: 2 * x, donate_argnums=0, backend="cudagraph"), torch.ones(3)
    with pytest.raises(ValueError, match="on one CUDA device for backend='cudagraph', got cpu"):
        run(x)
    assert torch.equal(x, torch.ones(3))


def test_on_device_leaves_no_number_on_the_cpu():
    original = graph(lambda x, n: (x * (2 * n + 1), torch.full((3,), n, device=x.device)), cuda(3), 0.5)
    text = original.code
    nodes = on_device(original, torch.device("cuda:0")).graph.nodes
    assert all(n.meta["val"].device.type == "cuda" for n in nodes if n.op == "placeholder")
    assert {str(n.kwargs["device"]) for n in nodes if "device" in n.kwargs} == {"cuda:0"}
    assert original.code == text


def test_update_stays_on_its_device():
    """Run over tensors without data, which refuse to be mixed with those of another device. Without derivatives and
    keys, for which torch asks the device itself."""

    def update(params, moments, learning_rate):
        tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(learning_rate))
        updates, moments = tx.update(fg.tree.map(torch.sin, params), moments, params)
        return optim.apply_updates(params, updates), moments, 2 * learning_rate

    params = fg.nn.Linear(3, 2).init(random.key(0))
    moments = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1)).init(params)
    leaves, treedef = fg.tree.flatten((params, moments))
    with FakeTensorMode():
        leaves = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in leaves]
    original = graph(lambda n, *leaves: update(*fg.tree.unflatten(treedef, leaves), n), 0.1, *leaves)
    moved = on_device(original, cuda_device(original))
    inputs = [n.meta["val"] for n in moved.graph.nodes if n.op == "placeholder"]
    with inputs[0].fake_mode:
        results = moved(*inputs)
    assert {x.device.type for x in (*inputs, *results)} == {"cuda"}


# On a device.


@needs_cuda
@pytest.mark.parametrize("backend", ["aten", "inductor", "cudagraph"])
def test_step_on_cuda_equals_eager(backend):
    """Tolerance: float32 rounding of one step, 1e-6, times the 6 steps."""
    state, train, batches = training("cuda")
    compiled = fg.jit(train, donate_argnums=0, backend=backend)
    given = fg.tree.map(torch.clone, state)
    for batch in batches:
        state, metrics = train(state, batch)
        given, got = compiled(given, batch)
        assert fg.tree.allclose(got, metrics, rtol=1e-5, atol=1e-5)
    assert fg.tree.allclose(given.params, state.params, rtol=1e-5, atol=1e-5)
    assert compiled.traces == 1


@needs_cuda
def test_cudagraph_follows_numbers_batches_and_closed_over_tensors():
    offset = torch.zeros(3, device="cuda")
    run = fg.jit(lambda x, n: n * x + offset, backend="cudagraph")
    results = []
    for i in range(5):
        offset += 1
        results.append((run(torch.full((3,), float(i), device="cuda"), 0.5 * i), 0.5 * i * i + i + 1))
    assert all(torch.equal(x, torch.full_like(x, expected)) for x, expected in results)


@needs_cuda
def test_cudagraph_keeps_the_donated_state_where_it_is():
    run = fg.jit(lambda x: x + 1, donate_argnums=0, backend="cudagraph")
    x = torch.zeros(3, device="cuda")
    address = x.data_ptr()
    for _ in range(4):
        x = run(x)
    assert x.data_ptr() == address
    assert torch.equal(x, torch.full_like(x, 4.0))
