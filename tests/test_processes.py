"""Collectives over processes: two of them, each with an example of its own, against one vmap over both examples.

The processes run all programs once; the tests compare what they left. ``vmap`` itself has its own tests.
"""

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

import functorch_gen as fg
from functorch_gen import tree

SIZE = 2
W = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
X = torch.tensor([[1.0, 2.0, -0.5], [0.4, -1.2, 0.8]], dtype=torch.float64)  # (process, feature)
BATCH = (
    torch.linspace(-3, 3, SIZE * 4 * 3, dtype=torch.float64).reshape(SIZE, 4, 3).sin()
)  # (process, example, feature)
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}  # the order of float64 sums


def start(folder, rank: int, size: int) -> None:
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timeout)


def loss(x):
    total, mean, rows = fg.psum(x * x, "data"), fg.pmean(x.sin(), "data"), fg.all_gather(x, "data")
    return (total.sin() * x).sum() + (mean**2).sum() + ((rows - x) ** 3).sum() * (1 + fg.axis_index("data"))


def scanned(x):
    return fg.scan(lambda c, _: ((c + fg.psum(c * x, "data")).sin(), c), x, None, length=3)[0].sum()


def product(x):
    return fg.hvp(loss, (x,), (x.cos(),))


def normalised(rows):
    """Statistics over the batches of all processes."""

    def one(x):
        mean = fg.pmean(x, ("batch", "data"))
        variance = fg.pmean((x - mean) ** 2, ("batch", "data"))
        return (x - mean) / (variance + 1e-5).sqrt()

    return fg.vmap(one, axis_name="batch")(rows)


# program -> (function, its argument on each process)
PROGRAMS = {
    "value": (loss, X),
    "extremes": (lambda x: [fg.pmax(x, "data"), fg.pmin(x, "data"), fg.ppermute(x, "data", [(0, 1)])], X),
    "index": (lambda x: x * fg.axis_index("data") + fg.axis_size("data"), X),
    "tiled": (lambda x: fg.all_gather({"x": x}, "data", axis=-1, tiled=True), X),
    "count": (lambda x: fg.psum({"above": x > 0, "scalar": x[0], "complex": x * 1j}, "data"), X),
    "grad": (fg.grad(loss), X),
    "grad of grad": (fg.grad(lambda x: (fg.grad(loss)(x) ** 2).sum()), X),
    "jvp": (lambda x: fg.jvp(loss, (x,), (x.cos(),)), X),
    "hvp": (product, X),
    "hessian": (fg.hessian(loss), X),
    "vmap of grad": (fg.vmap(fg.grad(loss)), BATCH),
    "grad of vmap": (fg.grad(lambda rows: fg.vmap(loss)(rows).sum()), BATCH),
    "statistics": (normalised, BATCH),
    "grad of statistics": (fg.grad(lambda rows: (normalised(rows) ** 3).sum()), BATCH),
    "remat": (fg.grad(fg.remat(loss)), X),
    "grad of scan": (fg.grad(scanned), X),
}
COMPILED = {
    "jit of grad": (lambda: fg.jit(fg.grad(loss), backend="aten"), "grad"),
    "jit with Inductor": (lambda: fg.jit(fg.grad(loss)), "grad"),
    "jit of hvp": (lambda: fg.jit(product, backend="aten"), "hvp"),
    "jit of vmap of grad": (lambda: fg.jit(fg.vmap(fg.grad(loss)), backend="aten"), "vmap of grad"),
    "jit of scan": (lambda: fg.jit(fg.grad(scanned), backend="aten"), "grad of scan"),
    "torch.compile": (lambda: torch.compile(fg.grad(loss), fullgraph=True, backend="aot_eager"), "grad"),
}


def squared_error(w, rows):
    return ((rows @ w - rows.sum(-1).sin()) ** 2).mean()


def descend(w, rows):
    """A step of gradient descent on all processes' rows."""
    return w - 0.1 * fg.pmean(fg.grad(squared_error)(w, rows), "data")


def run(rank: int, folder: str) -> None:
    """What one process does: every program, on its own arguments."""
    torch.set_num_threads(1)
    start(folder, rank, SIZE)
    step = fg.jit(descend, backend="aten")
    with fg.process_axis("data"):
        left = {name: fun(args[rank]) for name, (fun, args) in PROGRAMS.items()}
        left |= {name: make()(PROGRAMS[same][1][rank]) for name, (make, same) in COMPILED.items()}
        left["step"] = descend(W, BATCH[rank])
        left["three steps"] = step(step(step(W, BATCH[rank]), BATCH[rank]), BATCH[rank])
        left["numbers"] = [fg.psum(1, "data"), fg.psum(0.5 + rank, "data"), fg.pmean(rank, "data")]
    torch.save(left, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(run, (str(folder),), nprocs=SIZE)
    return [torch.load(Path(folder) / str(rank)) for rank in range(SIZE)]


@pytest.mark.slow
@pytest.mark.parametrize("program", [*PROGRAMS, *COMPILED])
def test_processes_equal_vmap(left, program):
    same = COMPILED[program][1] if program in COMPILED else program
    fun, args = PROGRAMS[same]
    want = tree.unstack(fg.vmap(fun, axis_name="data")(args))
    for rank in range(SIZE):
        assert tree.allclose(left[rank][program], want[rank], **TOLERANCE)


@pytest.mark.slow
def test_data_parallel_step_equals_that_of_the_full_batch(left):
    rows = BATCH.flatten(0, 1)
    want = [W]
    for _ in range(3):
        want.append(want[-1] - 0.1 * fg.grad(squared_error)(want[-1], rows))
    for rank in range(SIZE):
        assert torch.allclose(left[rank]["step"], want[1], **TOLERANCE)
        assert torch.allclose(left[rank]["three steps"], want[3], **TOLERANCE)


@pytest.mark.slow
def test_statistics_are_those_of_the_rows_of_all_processes(left):
    rows = BATCH.flatten(0, 1)
    want = torch.nn.functional.batch_norm(rows, None, None, training=True, eps=1e-5)
    assert torch.allclose(torch.cat([left[rank]["statistics"] for rank in range(SIZE)]), want, **TOLERANCE)


@pytest.mark.slow
def test_numbers_of_the_processes_are_added_up(left):
    want = [torch.tensor(2), torch.tensor(2.0), torch.tensor(0.5)]
    assert all(tree.equal(left[rank]["numbers"], want) for rank in range(SIZE))


# One process: what needs no other.


@pytest.fixture
def one_process(tmp_path):
    start(tmp_path, 0, 1)
    yield
    dist.destroy_process_group()


def test_one_process_is_an_axis_of_one(one_process):
    with fg.process_axis("data"):
        got = fg.vmap(fg.grad(lambda x: (fg.psum(x, ("batch", "data")) ** 2).sum()), axis_name="batch")(X)
        assert fg.axis_size("data") == 1
        assert fg.all_gather(torch.tensor(2.0), "data").shape == (1,)
    assert torch.allclose(got, (4 * X.sum(0)).expand(2, 3), **TOLERANCE)


def test_process_axis_takes_a_group(one_process):
    group = dist.new_group([0])
    with fg.process_axis("data", group):
        assert fg.psum(1, "data") == 1
    elsewhere = fg.process_axis("data", dist.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(ValueError, match="process_axis: expected a group that holds this process, got"), elsewhere:
        pass


def test_program_is_traced_anew_where_the_axis_is_not_bound(one_process):
    f = fg.jit(lambda x: fg.psum(x, "data"), backend="aten")
    with fg.process_axis("data"):
        assert torch.equal(f(X), X)
    with pytest.raises(
        NameError, match=r"psum: expected a name that vmap or process_axis binds here \(none\), got 'data'"
    ):
        f(X)


def test_process_axis_needs_a_process_group():
    message = r"process_axis: expected torch\.distributed\.init_process_group to have been called"
    with pytest.raises(RuntimeError, match=message), fg.process_axis("data"):
        pass
