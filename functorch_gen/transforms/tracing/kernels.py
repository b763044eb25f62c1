"""C++ of a whole program in one or two files: what Inductor generates for regions, and element-wise loops.

Inductor would start a compiler for every kernel, and each spends a second on the same headers.
"""

import contextlib
import importlib.util
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from functorch_gen.transforms.tracing.lowerings import register_lowerings

__all__ = ["Kernel", "Library", "Region", "compile_region", "load", "load_region"]

_C: Any = torch._C  # torch's stubs leave out some of its modules

_capturing = threading.local()


@dataclass
class Kernel:
    """A C++ function of pointers: its file without bindings, and the C types of its arguments."""

    source: str
    argtypes: tuple[str, ...]


@dataclass
class Region:
    """A region as Inductor generated it: Python that calls kernels by number."""

    python: str
    kernels: list[int] = field(default_factory=list)


_OPTIONS: dict[str, Any] = {
    "emulate_precision_casts": True,  # rounded as the trace says: else a bf16 maximum equals none of its elements
    "fx_graph_cache": False,  # programs are saved whole
    "pattern_matcher": False,  # it looks for operations that regions do not hold
    "size_asserts": False,  # shapes are those of the trace
    "alignment_asserts": False,
    "triton.mix_order_reduction": False,  # wrong gradients in chains of modulated norms (pytorch#193061)
}


class Library:
    """The kernels of a program, as C++ and then as Python functions of tensors."""

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self.batches: list[str] = []
        self._index: dict[str, int] = {}

    def add(self, kernel: Kernel) -> int:
        """The kernel's number; equal kernels have one."""
        if kernel.source not in self._index:
            self._index[kernel.source] = len(self.kernels)
            self.kernels.append(kernel)
        return self._index[kernel.source]

    def add_batch(self, source: Callable[[str], str]) -> str:
        """Adds an element-wise loop; returns its name."""
        name = f"batch{len(self.batches)}"
        self.batches.append(source(name))
        return name

    def build(self) -> list[bytes]:
        """Compiles everything, on two processors; returns shared objects."""
        half = sum(len(k.source) for k in self.kernels) / 2
        files: list[str] = []
        if self.batches:
            files.append(_batch_file(self.batches))
        parts: list[list[int]] = [[], []]
        filled = 0
        for i, kernel in enumerate(self.kernels):
            parts[int(filled >= half and len(self.kernels) > 3)].append(i)
            filled += len(kernel.source)
        files += [_kernel_file(self.kernels, part) for part in parts if part]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            return list(pool.map(_compile, files))


def load(objects: Sequence[bytes]) -> dict[str, Callable[..., Any]]:
    """The functions in shared objects, by name."""
    address = _C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(address)
    functions: dict[str, Callable[..., Any]] = {}
    for data in objects:
        with tempfile.TemporaryDirectory(prefix="functorch_gen_") as folder:
            path = Path(folder) / f"{_MODULE}.so"
            path.write_bytes(data)
            spec = importlib.util.spec_from_file_location(_MODULE, path)
            if spec is None or spec.loader is None:
                raise ImportError(f"jit: cannot load {path}")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        functions |= {name: f for name, f in vars(module).items() if callable(f) and not name.startswith("__")}
    return functions


_MODULE = "functorch_gen_kernels"


def compile_region(graph: fx.GraphModule, inputs: Sequence[Tensor], library: Library) -> Region:
    """Generates code for a graph of fusible operations; its kernels go into the library."""
    register_lowerings()
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.virtualized import V

    kernels: list[int] = []
    options = {key: value for key, value in _OPTIONS.items() if _has(config, key)}
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX"):
        options["cpp.vec_isa_ok"] = True  # torch has found the ISA already: its 9 s of compiler probes are skipped
    mode = getattr(inputs[0], "fake_mode", None) if inputs else None
    with (
        config.patch(options),
        tracing(TracingContext(mode)),
        V.set_fake_mode(mode),
        _capture(lambda argtypes, source: kernels.append(library.add(Kernel(source, tuple(argtypes))))),
    ):
        compiled: Any = compile_fx_inner(graph, list(inputs))
    return Region(compiled.source_code, kernels)


def _has(config: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


@contextlib.contextmanager
def _capture(binding: Callable[[Sequence[str], str], Any]) -> Iterator[None]:
    """Hands the kernels of this thread to ``binding`` instead of a compiler."""
    from torch._inductor.async_compile import AsyncCompile

    original = AsyncCompile.cpp_pybinding

    def cpp_pybinding(self: Any, argtypes: list[str], source_code: str) -> Any:
        if not getattr(_capturing, "on", False):
            return original(self, argtypes, source_code)
        return binding(argtypes, source_code)

    owner: Any = AsyncCompile
    owner.cpp_pybinding = cpp_pybinding
    _capturing.on = True
    try:
        yield
    finally:
        _capturing.on = False
        owner.cpp_pybinding = original


def load_region(region: Region, functions: dict[str, Callable[..., Any]]) -> Callable[[list[Tensor]], Any]:
    """The region as a function of a list of tensors, which it empties."""
    numbers = iter(region.kernels)
    namespace: dict[str, Any] = {"__name__": "functorch_gen_region", "_kernels": functions}
    python = _BINDING.sub(lambda _: f'_kernels["kernel{next(numbers)}"]', region.python)
    exec(compile(python, "<region>", "exec"), namespace)
    return namespace["call"]


_BINDING = re.compile(r"async_compile\.cpp_pybinding\(\[.*?\], r?'''.*?'''\)", re.DOTALL)


def _kernel_file(kernels: Sequence[Kernel], numbers: Sequence[int]) -> str:
    parts = ["#include <torch/csrc/inductor/cpp_prefix.h>"]
    for i in numbers:
        body = kernels[i].source.replace("#include <torch/csrc/inductor/cpp_prefix.h>", "")
        parts.append(re.sub(r'extern "C"\s+(.*?)\bkernel\(', rf"static \1kernel{i}(", body, count=1, flags=re.DOTALL))
    parts.append(_ARGUMENTS)
    for i in numbers:
        arguments = ", ".join(_argument(kind, k) for k, kind in enumerate(kernels[i].argtypes))
        parts.append(_bound(f"kernel{i}", f"kernel{i}({arguments});"))
    return "\n".join([*parts, _module([f"kernel{i}" for i in numbers])])


def _argument(kind: str, k: int) -> str:
    item = f"PyTuple_GET_ITEM(args, {k})"
    return f"({kind})data_ptr({item})" if kind.endswith("*") else f"({kind})PyLong_AsLongLong({item})"


def _batch_file(sources: Sequence[str]) -> str:
    parts = [
        "#include <algorithm>",
        "#include <cmath>",
        "#include <cstdint>",
        "#include <vector>",
        *sources,
        _ARGUMENTS,
    ]
    names = [f"batch{i}" for i in range(len(sources))]
    parts += [
        _bound(
            name,
            "std::vector<char*> p(PyTuple_GET_SIZE(args)); "
            "for (size_t i = 0; i < p.size(); ++i) p[i] = (char*)data_ptr(PyTuple_GET_ITEM(args, i)); "
            f"{name}(p.data());",
        )
        for name in names
    ]
    return "\n".join([*parts, _module(names)])


_ARGUMENTS = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdlib>
#include <exception>
static void* (*data_ptr)(PyObject*);
"""


def _bound(name: str, statements: str) -> str:
    return f"""
static PyObject* py_{name}(PyObject*, PyObject* args) {{
    try {{ {statements} }}
    catch (const std::exception& e) {{ PyErr_SetString(PyExc_RuntimeError, e.what()); return nullptr; }}
    Py_RETURN_NONE;
}}"""


def _module(names: Sequence[str]) -> str:
    table = "\n".join(f'    {{"{name}", py_{name}, METH_VARARGS, ""}},' for name in names)
    return f"""
static PyMethodDef methods[] = {{
{table}
    {{nullptr, nullptr, 0, nullptr}}
}};
static PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "{_MODULE}", nullptr, -1, methods}};
PyMODINIT_FUNC PyInit_{_MODULE}() {{
    data_ptr = (void* (*)(PyObject*))std::strtoull(std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"), nullptr, 10);
    return PyModule_Create(&definition);
}}
"""


def _compile(source: str) -> bytes:
    """A C++ file as a shared object."""
    with tempfile.TemporaryDirectory(prefix="functorch_gen_") as folder:
        file, target = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        file.write_text(source)
        done = subprocess.run(_command(file, target), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"jit: the C++ compiler failed:\n{done.stderr[-4000:]}")
        return target.read_bytes()


def _command(file: Path, target: Path) -> list[str]:
    import shlex
    import sysconfig

    if "cpp_prefix.h" not in file.read_text():
        compiler = os.environ.get("CXX", "g++")
        flags = (
            "-O3 -march=native -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp -shared -fPIC -std=c++17"
        )
        include = sysconfig.get_path("include")
        return [*shlex.split(compiler), *flags.split(), "-fwrapv", f"-I{include}", str(file), "-o", str(target)]
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options = CppTorchOptions(vec_isa=pick_vec_isa(), include_pytorch=False, shared=True)
    builder = CppBuilder("kernels", sources=str(file), output_dir=str(file.parent), BuildOption=options)
    command = shlex.split(builder.get_command_line())
    command = [flag for flag in command if flag not in ("-g1", "-fno-omit-frame-pointer")]
    command[command.index("-o") + 1] = str(target)
    return command
