"""Compiled programs in a file: another process runs them without tracing or compiling; everything else is refused."""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree

MODEL = """
import torch
import functorch_gen as fg

FORBIDDEN = False


def loss(params, x):
    return (torch.tanh(x @ params["w"] + params["b"]).softmax(-1).square()).mean()


def step(state, x, rate):
    if FORBIDDEN:
        raise RuntimeError("the Python of the function ran")
    params, count = state
    grads = fg.grad(loss)(params, x)
    return (fg.tree.map(lambda p, g: p - rate * g, params, grads), count + 1), fg.tree.norm(grads)


def arguments():
    key = fg.random.key(3)
    params = {"w": fg.random.normal(key, (5, 4)), "b": torch.zeros(4)}
    return (params, torch.zeros((), dtype=torch.int64)), torch.linspace(-1, 1, 15).reshape(3, 5), 0.5
"""

LOADER = """
import sys, torch
import functorch_gen as fg
import model

torch.set_num_threads(int(sys.argv[3]))
model.FORBIDDEN = True
step = fg.jit(model.step, donate_argnums=0)
step.load(sys.argv[1])
state, x, rate = model.arguments()
old = state
for _ in range(3):
    state, norm = step(state, x, rate)
assert step.traces == 1 and all(leaf.shape == (0,) for leaf in fg.tree.leaves(old))
assert "torch._inductor.compile_fx" not in sys.modules
torch.save((state, norm), sys.argv[2])
"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    spec = importlib.util.spec_from_file_location("model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_saved_programs_run_in_another_process_without_tracing_or_compiler(tmp_path, model):
    step = fg.jit(model.step, donate_argnums=0)
    state, x, rate = model.arguments()
    step.lower(state, x, rate)
    step.save(tmp_path / "step.bin")  # compiles what has only been traced
    (tmp_path / "load.py").write_text(LOADER)
    package = Path(fg.__file__).parents[1]
    environment = {"PATH": "/nonexistent", "CXX": "/bin/false", "PYTHONPATH": f"{package}:{tmp_path}", "HOME": "/tmp"}
    command = [sys.executable, "load.py", "step.bin", "out.pt", str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for _ in range(3):
        state, norm = model.step(state, x, rate)
    got = torch.load(tmp_path / "out.pt")
    assert tree.allclose(got, (state, norm), rtol=1e-5, atol=1e-6)  # float32, sums in another order


def plus(x):
    return x + 1


@pytest.fixture
def saved(tmp_path):
    jitted = fg.jit(plus)
    jitted(torch.ones(3))
    jitted.save(tmp_path / "plus.bin")
    return tmp_path / "plus.bin"


def test_load_recognises_the_signature(saved):
    other = fg.jit(plus)
    other.load(saved)
    assert torch.equal(other(torch.zeros(3)), torch.ones(3))
    assert other.traces == 1
    assert torch.equal(other(torch.zeros(2)), torch.ones(2))  # another signature is traced
    assert other.traces == 2


def test_load_refuses_other_code(saved):
    changed = {"plus": lambda x: x + 2}["plus"]
    for fun in (changed, lambda x: x + 1):  # by name too
        with pytest.raises(ValueError, match=r"to be made with function .*got plus"):
            fg.jit(fun).load(saved)


def test_load_sees_what_a_function_closes_over(tmp_path):
    def scaled(factor):
        return fg.jit(lambda x: factor * x)

    two = scaled(2)
    two(torch.ones(3))
    two.save(tmp_path / "scaled.bin")
    scaled(2).load(tmp_path / "scaled.bin")
    with pytest.raises(ValueError, match="to be made with function"):
        scaled(3).load(tmp_path / "scaled.bin")


@pytest.mark.parametrize("where", ["magic", "digest", "body", "end", "empty"])
def test_load_refuses_a_damaged_file(saved, where):
    data = bytearray(saved.read_bytes())
    place = {"magic": 0, "digest": 30, "body": len(data) // 2}
    if where in place:
        data[place[where]] ^= 1
    saved.write_bytes(data[:-1] if where == "end" else b"" if where == "empty" else bytes(data))
    with pytest.raises(ValueError, match=r"expected a file of compiled programs at .*plus\.bin, got a damaged"):
        fg.jit(plus).load(saved)


@pytest.mark.parametrize(
    ("target", "attribute", "there", "message"),
    [
        (torch, "__version__", "9.9.9", "with torch 9.9.9"),
        (torch, "get_num_threads", lambda: 77, "with threads 77"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "VECTOR", "VECTOR, got"),
    ],
)
def test_load_refuses_what_was_made_elsewhere(saved, monkeypatch, target, attribute, there, message):
    monkeypatch.setattr(target, attribute, there)
    with pytest.raises(ValueError, match=message):
        fg.jit(plus).load(saved)


OUTSIDE = torch.ones(2)


@pytest.mark.parametrize(
    ("fun", "backend", "message"),
    [
        (lambda x: x + OUTSIDE, "inductor", r"to close over no tensors, .* got shapes \(2,\)"),
        (lambda x: (fg.debug.print("{}", x), x)[1], "inductor", r"to call nothing back, .* got debug.print"),
        (lambda x: x + 1, "aten", "to be compiled with backend='inductor'"),
    ],
    ids=["closed over", "debug.print", "aten"],
)
def test_save_refuses_what_another_process_has_not(tmp_path, fun, backend, message):
    jitted = fg.jit(fun, backend=backend)
    jitted.lower(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        jitted.save(tmp_path / "f.bin")
    assert not list(tmp_path.iterdir())


def test_save_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="to be traced before it is saved"):
        fg.jit(plus).save(tmp_path / "f.bin")


def test_save_replaces_a_file_whole(saved, monkeypatch):
    before = saved.read_bytes()
    jitted = fg.jit(plus)
    jitted(torch.ones(3))

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        jitted.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_executables_can_be_pickled():
    jitted = fg.jit(
        lambda x: {"a": x.softmax(-1).cumsum(0), "b": x.to(torch.float64, memory_format=torch.contiguous_format)}
    )
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = jitted(x)
    ((plan, executable),) = [program.saved() for program in jitted._programs.values()]
    run = pickle.loads(pickle.dumps(executable)).load()
    assert tree.equal(plan.outputs.get(run(x)), expected)
