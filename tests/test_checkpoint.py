"""Checkpoints: every kind of leaf bit for bit, every broken file an error, and runs that are killed."""

import fcntl
import multiprocessing
import os
import pickle
import random as chance
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import killed_run
import numpy as np
import pytest
import safetensors.torch
import torch

import functorch_gen as fg
from functorch_gen import optim, tree
from functorch_gen.step import init_state
from functorch_gen.train import checkpoint
from functorch_gen.train.checkpoint import CheckpointError, latest, load, read_metadata, save, save_step, steps

KEY = fg.random.key(0)
X = torch.arange(24.0).reshape(2, 3, 4)


class Pair(NamedTuple):
    left: Any
    right: Any


def bits(x):
    """The bytes of a leaf: tells 0 from -0, and NaN from NaN."""
    if not isinstance(x, torch.Tensor):
        return type(x), repr(x)
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.dtype, tuple(x.shape), bytes(x.contiguous().reshape(-1).view(torch.uint8).tolist())


def same_bits(a, b):
    return tree.structure(a) == tree.structure(b) and list(map(bits, tree.leaves(a))) == list(map(bits, tree.leaves(b)))


def blank(whole):
    """A template without the values."""
    return tree.map(lambda x: torch.zeros_like(x) if isinstance(x, torch.Tensor) else type(x)(), whole)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


# What comes back.

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool]


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3), (2, 3)], ids=str)
def test_load_gives_every_dtype_and_shape_bit_for_bit(path, dtype, shape):
    x = fg.random.normal(KEY, shape, torch.float64).to(dtype)
    save(path, {"x": x})
    assert same_bits(load(path, like={"x": torch.empty(shape, dtype=dtype)}), {"x": x})


def test_load_gives_values_that_compare_unequal_bit_for_bit(path):
    x = torch.tensor([-0.0, torch.nan, -torch.nan, torch.inf, 5e-324], dtype=torch.float64)
    x[2:3].view(torch.int64).add_(7)  # a NaN with a payload
    save(path, [x])
    assert same_bits(load(path, like=[x]), [x])


NESTS = {
    "every node": {
        "a": [X, (X + 1,)],
        "b": Pair(X * 2, None),
        "c": OrderedDict(z=X, y=X - 1),
        "empty": {},
        "none": None,
    },
    "a bare tensor": X,
    "no leaf": {},
    "Python leaves": {"i": 3, "big": 10**30, "f": 0.1, "inf": float("-inf"), "flag": True, "text": "\u00e9\n", "x": X},
    "keys that are numbers": {0: X, 1: X + 1},
}


@pytest.mark.parametrize("name", NESTS)
def test_load_gives_the_structure_of_the_template(path, name):
    save(path, NESTS[name])
    assert same_bits(load(path, like=blank(NESTS[name])), NESTS[name])


TXS = {
    "adamw": optim.adamw(1e-3),
    "chain": optim.chain(optim.clip_by_global_norm(1.0), optim.adam(1e-3)),
    "flat": optim.flatten(optim.adamw(1e-3)),
}


@pytest.mark.parametrize("flat", [False, True], ids=["tree", "flat"])
@pytest.mark.parametrize("name", TXS)
def test_load_gives_a_train_state(path, name, flat):
    if flat and name == "flat":
        return
    net = fg.nn.MLP(3, (4,), 2)

    def state(seed):
        key = fg.random.key(seed)
        return init_state(net.init(key), TXS[name], key, {"count": torch.tensor(seed)}, fg.ema.constant(0.9), flat=flat)

    save(path, state(1))
    assert same_bits(load(path, like=state(2)), state(1))


def test_load_of_a_key_draws_the_same(path):
    key = fg.random.split(KEY, 3)[1]
    save(path, {"key": key})
    drawn = fg.random.normal(load(path, like={"key": KEY})["key"], (5,))
    assert torch.equal(drawn, fg.random.normal(key, (5,)))


def test_load_without_a_template_gives_dicts_by_path(path):
    save(path, {"layers": [{"w": X}, {"w": X + 1}], "rate": 0.5, "none": None})
    assert same_bits(load(path), {"layers": {"0": {"w": X}, "1": {"w": X + 1}}, "rate": 0.5})


@pytest.mark.parametrize(
    "x",
    [
        X.permute(2, 0, 1),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        X[:, 1:, ::2],
        X[:1].expand(3, 3, 4),
        torch.randn(3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj(),
        torch.nn.Parameter(X.clone()),
    ],
    ids=["permuted", "channels last", "gaps", "expanded", "conjugate", "parameter"],
)
def test_load_keeps_the_memory_layout(path, x):
    """The strides are those of a dense copy; the sums of a convolution depend on them."""
    save(path, {"x": x})
    found = load(path)["x"]
    assert same_bits(found, x.detach())
    assert found.stride() == torch.empty_like(x).stride()
    assert not found.requires_grad


def test_load_ties_what_was_tied(path):
    w = X.clone()
    whole = {"embed": w, "head": w, "other": w.clone(), "part": w[0], "turned": w.mT}
    save(path, whole)
    found = load(path, like=tree.zeros_like(whole))
    assert same_bits(found, whole)
    assert found["embed"] is found["head"]
    assert len({x.untyped_storage().data_ptr() for x in found.values()}) == 4
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["embed", "other", "part", "turned"]


def test_load_does_not_tie_what_is_read_otherwise(path):
    """These share memory, shape and strides."""
    z = torch.complex(torch.arange(4.0), torch.ones(4)).reshape(2, 2)
    whole = {"z": z, "conjugate": z.conj(), "imaginary": z.imag, "minus": z.conj().imag}
    save(path, whole)
    assert same_bits(load(path, like=whole), tree.map(torch.clone, whole))


def test_load_gives_memory_of_its_own(path):
    save(path, {"x": X})
    first = load(path)
    first["x"].zero_()
    path.write_bytes(b"")
    assert first["x"].sum() == 0


@pytest.mark.parametrize("template", ["meta", "eval_shape"])
def test_load_takes_a_template_without_memory(path, template):
    net = fg.nn.MLP(3, (4,), 2)
    params = net.init(KEY)
    save(path, params)
    like = fg.eval_shape(net.init, KEY) if template == "eval_shape" else tree.to(params, "meta")
    assert same_bits(load(path, like=like), params)


def test_save_leaves_the_tree_alone(path):
    x = X.clone()
    save(path, {"x": x, "y": x.mT})
    assert torch.equal(x, X)


def test_file_is_read_by_safetensors(path):
    save(path, {"layer": {"w": X, "b": torch.ones(2, dtype=torch.bfloat16)}})
    found = safetensors.torch.load_file(path)
    assert tree.equal(found, {"layer.w": X, "layer.b": torch.ones(2, dtype=torch.bfloat16)})


def test_metadata_comes_back(path):
    metadata = {"config": {"lr": 1e-3, "layers": [1, 2]}, "checksum": '"checksum":"' + "0" * 64 + '"', "text": "\u00e9"}
    save(path, {"x": X}, metadata=metadata)
    assert read_metadata(path) == metadata
    assert same_bits(load(path), {"x": X})


# Another tree.

SAVED = {"w": torch.zeros(3, 2), "b": torch.zeros(2), "nest": [torch.zeros(1), {"n": 3}], "opt": Pair(X, None)}


@pytest.mark.parametrize(
    ("like", "lines"),
    [
        ({**SAVED, "w": torch.zeros(2, 3)}, ["different: 'w': expected float32 (2, 3), got float32 (3, 2)"]),
        ({**SAVED, "b": torch.zeros(2).double()}, ["different: 'b': expected float64 (2,), got float32 (2,)"]),
        ({**SAVED, "new": {"z": X}}, ["missing from the file: 'new' (dict)",
                                      "missing from the file: 'new.z' (float32 (2, 3, 4))"]),
        ({k: v for k, v in SAVED.items() if k != "b"}, ["unexpected in the file: 'b' (float32 (2,))"]),
        ({**SAVED, "nest": (torch.zeros(1), {"n": 3})}, ["different: 'nest': expected tuple, got list"]),
        ({**SAVED, "nest": [torch.zeros(1), {"n": 3.0}]}, ["different: 'nest.1.n': expected float, got int"]),
        ({**SAVED, "nest": [torch.zeros(1), {"n": torch.tensor(3)}]},
         ["different: 'nest.1.n': expected int64 (), got int"]),
        ({**SAVED, "b": None}, ["different: 'b': expected NoneType, got float32 (2,)"]),
        ({**SAVED, "opt": Pair(None, X)}, ["different: 'opt.left': expected NoneType, got float32 (2, 3, 4)",
                                           "different: 'opt.right': expected float32 (2, 3, 4), got NoneType"]),
        (X, ["different: '': expected float32 (2, 3, 4), got dict"]),
    ],
    ids=["shape", "dtype", "missing", "unexpected", "node", "number", "tensor", "none", "exchanged", "leaf"],
)  # fmt: skip
def test_load_of_another_tree_lists_the_differences(path, like, lines):
    save(path, SAVED)
    with pytest.raises(ValueError, match="expected the tree of the template, got another in") as caught:
        load(path, like=like)
    assert not isinstance(caught.value, CheckpointError)
    assert all(f"\n  {line}" in str(caught.value) for line in lines), str(caught.value)
    if like is not X:
        assert len(str(caught.value).splitlines()) == 1 + len(lines)


def test_load_of_another_tree_lists_twenty_differences(path):
    save(path, {})
    with pytest.raises(ValueError, match=r"and 10 more$") as caught:
        load(path, like={f"x{i:02}": X for i in range(30)})
    assert str(caught.value).count("missing from the file") == 20


def test_load_compares_static_leaves(path):
    """Flat vectors of one length whose leaves lie in another order are another tree."""
    params = {"a": torch.zeros(2, 3), "b": torch.zeros(3, 2)}
    save(path, optim.Layout.of(params).ravel(params))
    exchanged = {"a": params["b"], "b": params["a"]}
    with pytest.raises(
        ValueError, match=r"different: 'layout': expected \.\.\..*shape=\(3, 2\).*, got \.\.\..*shape=\(2, 3\)"
    ):
        load(path, like=optim.Layout.of(exchanged).ravel(exchanged))
    assert same_bits(load(path, like=optim.Layout.of(params).ravel(params)).tree(), params)


# Broken files.


def test_load_of_a_truncated_file_is_an_error(path):
    save(path, {"x": torch.arange(4)}, metadata={"a": 1})
    whole = path.read_bytes()
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match="expected a whole checkpoint, got"):
            load(path)


def test_load_of_a_file_with_one_bit_flipped_is_an_error(path):
    """Every bit of it: length, header, checksum, values."""
    save(path, {"x": torch.arange(3, dtype=torch.int16)}, metadata={"text": "\u00e9"})
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for i in range(8 * len(whole)):
            byte = whole[i // 8]
            file.seek(i // 8)
            file.write(bytes([byte ^ 1 << i % 8]))
            with pytest.raises(CheckpointError, match="expected a whole checkpoint, got"):
                load(path)
            file.seek(i // 8)
            file.write(bytes([byte]))
    assert load(path)["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("added", [b"\0", b"x" * 100])
def test_load_of_a_longer_file_is_an_error(path, added):
    save(path, {"x": X})
    path.write_bytes(path.read_bytes() + added)
    with pytest.raises(CheckpointError, match=r"truncated or corrupt \(its checksum is another\)"):
        load(path)


def test_load_of_another_file_is_an_error_and_runs_nothing(path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(path) + ".exploded",)

    safetensors.torch.save_file({"x": X}, path)
    foreign = path.read_bytes()
    for content in (b"", b"text", pickle.dumps(Bomb()), foreign):
        path.write_bytes(content)
        for read in (load, read_metadata):
            with pytest.raises(CheckpointError, match=f"{read.__name__}: expected a "):
                read(path)
    torch.save(Bomb(), path)
    with pytest.raises(CheckpointError, match="expected a whole checkpoint"):
        load(path)
    assert not Path(f"{path}.exploded").exists()


def test_load_of_a_later_version_is_an_error(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_VERSION", 2)
    save(path, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="load: expected a checkpoint of version 1, got 2 in"):
        load(path)


def test_load_of_no_file_is_an_error(path):
    for read in (load, read_metadata):
        with pytest.raises(FileNotFoundError, match="state"):
            read(path)


@pytest.mark.parametrize(
    ("whole", "error", "message"),
    [
        ({"a": [object()]}, TypeError, r"checkpoint.save: expected a tensor, number or string at 'a.0', got object"),
        ({"a": np.float64(1)}, TypeError, r"expected a tensor, number or string at 'a', got float64 \(\)"),
        ({"a.b": X, "a": {"b": X}}, ValueError, r"checkpoint: expected one node at 'a\.b', got two"),
        ({"__metadata__": X}, ValueError, r"checkpoint: expected no leaf at '__metadata__', a name that safetensors"),
    ],
)
def test_save_of_a_bad_tree_is_an_error_and_writes_nothing(path, whole, error, message):
    with pytest.raises(error, match=message):
        save(path, whole)
    assert list(path.parent.iterdir()) == []


def test_save_in_a_trace_is_an_error(path):
    with pytest.raises(TypeError, match=r"checkpoint\.save: expected values, got a tree that is being traced"):
        fg.vmap(lambda x: save(path, {"x": x}))(X)


def test_save_that_fails_keeps_the_old_file(path, monkeypatch):
    save(path, {"x": X})
    for place, broken in ((os, "fsync"), (Path, "replace")):

        def fail(*_):
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(place, broken, fail)
            with pytest.raises(OSError, match="disk full"):
                save(path, {"x": X + 1})
        assert same_bits(load(path), {"x": X})
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("module", ["safetensors"])
def test_checkpoint_names_the_extra_that_it_needs(path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    for use in (lambda: save(path, {}), lambda: read_metadata(path)):
        with pytest.raises(ImportError, match=r"needs safetensors: pip install functorch_gen\[train\]"):
            use()


# Folders.


def test_save_step_keeps_the_newest(tmp_path):
    for n in (5, 10, 99_999_999, 100_000_000):
        save_step(tmp_path, n, {"n": n}, keep=2)
    assert list(steps(tmp_path)) == [99_999_999, 100_000_000]
    newest = latest(tmp_path)
    assert newest == tmp_path / "step_100000000.safetensors"
    assert load(newest) == {"n": 100_000_000}


def test_save_step_of_an_earlier_step_is_not_removed_at_once(tmp_path):
    for n in (10, 20, 5):
        save_step(tmp_path, n, {}, keep=2)
    assert 5 in steps(tmp_path)


def test_save_step_keeps_all_if_told_so(tmp_path):
    for n in range(6):
        save_step(tmp_path / "run", n, {}, keep=None, metadata={"n": n})
    assert list(steps(tmp_path / "run")) == list(range(6))
    assert read_metadata(steps(tmp_path / "run")[4]) == {"n": 4}


def test_steps_are_the_numbered_files_alone(tmp_path):
    for name in ("step_x.safetensors", "step_1.pt", ".step_00000007.safetensors", "best.safetensors"):
        (tmp_path / name).touch()
    assert steps(tmp_path) == {}
    assert latest(tmp_path) is None


@pytest.mark.parametrize(
    ("step", "keep", "message"),
    [(-1, 3, "save_step: expected step >= 0, got -1"), (0, 0, "save_step: expected keep > 0, got 0")],
)
def test_save_step_of_a_bad_number_is_an_error(tmp_path, step, keep, message):
    with pytest.raises(ValueError, match=message):
        save_step(tmp_path, step, {}, keep=keep)


def leave(folder):
    """What a process leaves that is killed as it writes."""
    left = folder / ".step_00000001.safetensors.0123.checkpoint-tmp"
    left.mkdir()
    (left / "new").write_bytes(b"half")
    return left


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    left, other = leave(tmp_path), tmp_path / ".other.tmp"
    other.mkdir()
    assert steps(tmp_path) == {}
    save_step(tmp_path, 4, {})
    assert (left.exists(), other.exists()) == (False, True)


def test_leftovers_stay_while_another_process_writes(tmp_path):
    left = leave(tmp_path)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    save_step(tmp_path, 4, {})
    assert left.exists()
    os.close(descriptor)
    save_step(tmp_path, 5, {})
    assert not left.exists()


def test_file_has_the_rights_of_a_new_file(path):
    save(path, {"x": X})
    usual = path.with_name("usual")
    usual.touch()
    assert path.stat().st_mode == usual.stat().st_mode


def test_threads_that_save_one_path_leave_one_of_their_trees(path):
    def write(n):
        for _ in range(10):
            save(path, {"x": torch.full((1000,), n)})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = load(path)["x"]
    assert (found == found[0]).all()
    assert list(path.parent.iterdir()) == [path]


# Runs that are killed.


def killed_at_random_moments(start, folder, kills):
    """Starts a run ``kills`` times and kills it, further on each time; then lets it end. -> the exit codes."""
    codes = []
    for n in range(kills + 1):
        process = start(folder)
        try:
            if n < kills:
                first, last = (i * killed_run.STEPS // (kills + 1) for i in (n, n + 1))
                wait_for_step(max(1, chance.randint(first, last - 1)), folder, process)
                time.sleep(chance.uniform(0, 0.02))  # a step with its checkpoint takes about 0.01 s
                process.kill()
            process.join()
        finally:
            process.kill()
        codes.append(process.exitcode)
    return codes


def wait_for_step(step, folder, process):
    patience = time.monotonic() + 300
    while max(steps(folder), default=0) < step:
        assert process.exitcode is None, "the run ended by itself"
        assert time.monotonic() < patience, f"step {step} is not reached"
        time.sleep(0.001)


def check_killed(folder, expected):
    """Of the whole state: parameters, optimizer, average, key, step."""
    newest = latest(folder)
    assert newest is not None
    assert newest.name == f"step_{killed_run.STEPS:08d}.safetensors"
    assert same_bits(load(newest, like=killed_run.start()), expected)
    assert len(list(folder.iterdir())) == 3, "temporary files are left"


def test_run_that_is_killed_twenty_times_ends_as_one_that_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")  # a process that imports torch once, and forks
    context.set_forkserver_preload(["killed_run"])

    def start(folder):
        process = context.Process(target=killed_run.run, args=(str(folder), False))
        process.start()
        return process

    assert killed_at_random_moments(start, tmp_path, 20) == [-9] * 20 + [0]
    check_killed(tmp_path, killed_run.run(None, compiled=False))


class Script(subprocess.Popen):
    """A process with the names of multiprocessing's."""

    join = subprocess.Popen.wait
    exitcode = property(subprocess.Popen.poll)


@pytest.mark.slow
def test_script_that_is_killed_twenty_times_ends_as_one_that_is_not(tmp_path):
    """Each time a new interpreter and a newly traced step."""

    def start(folder):
        paths = os.pathsep.join([str(Path(fg.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        return Script([sys.executable, killed_run.__file__, folder], env={**os.environ, "PYTHONPATH": paths})

    assert killed_at_random_moments(start, tmp_path, 20) == [-9] * 20 + [0]
    check_killed(tmp_path, killed_run.run(None, compiled=True))
