"""jit: trace once per signature, compile, cache."""

import functools
import inspect
import os
import types
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

from functorch_gen import config, tree
from functorch_gen.check import check_choice
from functorch_gen.transforms.context import ambient, is_traced, requires_gradient
from functorch_gen.transforms.tracing import artifacts
from functorch_gen.transforms.tracing.backends import BACKENDS
from functorch_gen.transforms.tracing.cost import Cost
from functorch_gen.transforms.tracing.donation import is_released
from functorch_gen.transforms.tracing.program import TRACING, Program
from functorch_gen.transforms.tracing.signature import Recognised, explain_retrace

__all__ = ["Jitted", "Lowered", "jit"]


def jit(
    fun: Callable[..., Any],
    *,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate_argnums: int | Iterable[int] = (),
    backend: str = "inductor",
) -> "Jitted":
    """``fun`` compiled: traced to one ATen graph at the first call of each signature, then run without its Python.

    The signature is the structure of the arguments, the shapes, dtypes and devices of their tensors, and the static
    values. Python numbers are traced: a new value is no new signature. Frozen dataclasses (layers, schedules) are
    static. Changes in place of tensors that ``fun`` closes over are seen. The default dtype and device and autocast are
    those of the call. Inside ``grad``, ``vmap``, another ``jit`` or ``torch.compile``, and where inputs or tensors that
    ``fun`` closes over require grad (outside ``torch.no_grad``), ``fun`` itself is called.

    Args:
        static_argnums: arguments, by position, that are compared by value, and may be anything hashable.
        static_argnames: the same by name.
        donate_argnums: arguments, by position, whose memory the outputs may take; they may be given by keyword. Their
            leaves are left empty, so that later use of the old values fails.
        backend: ``"inductor"`` generates code (seconds), ``"aten"`` runs the traced operations as they are,
            ``"tiered"`` does this at once and changes over when code has been generated in the background,
            ``"cudagraph"`` replays the generated code as one CUDA graph.
    Raises:
        TypeError: if a leaf is neither tensor, number nor static, or a static value is not hashable; names its path.
        ValueError: if an argument number is out of range, both static and donated, or a static name is no argument's;
            if a donated buffer was given away before, or overlaps another input; with ``"cudagraph"`` if the tensors
            of the program are not on one CUDA device.
        TracingError: if ``fun`` asks for the value of a tensor, draws global random numbers, or writes to
            its arguments.

    >>> import torch
    >>> double = jit(lambda x, n: n * x, backend="aten")
    >>> double(torch.ones(2), 2.0), double(torch.ones(2), 3.0), double.traces
    (tensor([2., 2.]), tensor([3., 3.]), 1)
    """
    check_choice("jit", "backend", backend, BACKENDS)
    if not callable(fun):
        raise TypeError(f"jit: expected a function, got {type(fun).__name__}")
    nums = _as_tuple("static_argnums", static_argnums, int)
    names = _as_tuple("static_argnames", static_argnames, str)
    donated = _as_tuple("donate_argnums", donate_argnums, int)
    _check_names(fun, names)
    return Jitted(fun, nums, names, donated, backend)


def _as_tuple(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    values = (value,) if isinstance(value, kind) else tuple(value)
    for x in values:
        if not isinstance(x, kind) or isinstance(x, bool):
            raise TypeError(f"jit: expected {name} to hold {kind.__name__}s, got {x!r}")
    return values


class _Form:
    """Which arguments of a call are static and which donated: the same for all calls alike in number and names."""

    def __init__(self, owner: "Jitted", count: int, names: tuple[str, ...]):
        self.static, self.donated = owner.positions(count)
        self.static_names = sorted(owner.static_names & set(names))
        self.positions = [i for i in range(count) if i not in self.static]
        self.names = [name for name in names if name not in owner.static_names]
        self.plain = not self.static and not names  # positional arguments only


class _Call:
    """A call taken apart: what is static, and the leaves of the rest."""

    def __init__(self, form: _Form, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.form, self.order = form, tuple(kwargs)
        self.static = tuple([(i, args[i]) for i in form.static])
        self.static_names = tuple([(k, kwargs[k]) for k in form.static_names])
        if form.plain:
            self.arguments: tuple[list[Any], dict[str, Any]] = (list(args), {})
        else:
            self.arguments = ([args[i] for i in form.positions], {k: kwargs[k] for k in form.names})
        self.leaves, self.treedef = tree.flatten(self.arguments)

    def key(self) -> Any:
        """What one program is compiled for."""
        leaves = [
            (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x) if isinstance(x, _NUMBERS) else (x,)
            for x in self.leaves
        ]
        types_of_static = tuple(type(x) for _, x in (*self.static, *self.static_names))
        return self.treedef, self.static, self.static_names, types_of_static, ambient(), tuple(leaves)

    def dynamic(self) -> list[Any]:
        """The leaves that enter the program."""
        return [x for x in self.leaves if isinstance(x, _TRACED)]

    def donated_leaves(self, names: frozenset[str]) -> list[int]:
        """Indices among the dynamic leaves of those that belong to donated arguments; ``names``: by keyword."""
        positional, by_name = self.arguments
        gone = [(i in self.form.donated, x) for i, x in zip(self.form.positions, positional, strict=True)]
        gone += [(name in names, by_name[name]) for name in sorted(by_name)]
        at, indices = 0, []
        for donated, argument in gone:
            for leaf in tree.leaves(argument):
                if isinstance(leaf, Tensor) and donated:
                    indices.append(at)
                at += isinstance(leaf, _TRACED)
        return indices


_NUMBERS = (bool, int, float, complex)
_TRACED = (Tensor, *_NUMBERS)


class Jitted:
    """What :func:`jit` returns."""

    def __init__(
        self,
        fun: Callable[..., Any],
        nums: tuple[int, ...],
        names: tuple[str, ...],
        donated: tuple[int, ...],
        backend: str,
    ):
        functools.update_wrapper(self, fun)
        self._fun, self._donated, self._backend = fun, donated, backend
        self._parameters = _positional_names(fun)
        self.static_names = frozenset((*names, *self._names_of(nums)))
        self._donated_names = frozenset(self._names_of(donated))
        self._nums = (*nums, *[self._parameters.index(name) for name in names if name in self._parameters])
        self._name = getattr(fun, "__qualname__", type(fun).__name__)
        self._programs: dict[Any, Program] = {}
        self._forms: dict[tuple[int, tuple[str, ...]], _Form] = {}
        self._latest: Recognised | None = None

    def _names_of(self, numbers: tuple[int, ...]) -> list[str]:
        """The names of arguments by position, so that they are known when given by keyword."""
        count = len(self._parameters)
        return [self._parameters[i] for i in numbers if -count <= i < count]

    @property
    def traces(self) -> int:
        """How many signatures have been traced."""
        return len(self._programs)

    def positions(self, count: int) -> tuple[list[int], list[int]]:
        """The static and the donated positions among ``count`` positional arguments."""
        span = max(count, len(self._parameters))
        for name, numbers in (("static_argnums", self._nums), ("donate_argnums", self._donated)):
            for i in numbers:
                if not -span <= i < span:
                    raise ValueError(f"jit: expected {name} in range for {span} arguments, got {i}")
        static = sorted({i % span for i in self._nums if i % span < count})
        donated = sorted({i % span for i in self._donated if i % span < count})
        for i in set(static) & set(donated):
            raise ValueError(f"jit: expected argument {i} to be static or donated, got both")
        return static, donated

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program of this signature; the first call makes it."""
        if is_traced():
            return self._fun(*args, **kwargs)
        latest = self._latest
        leaves = latest.leaves(args, kwargs) if latest is not None else None
        if latest is not None and leaves is not None:
            return latest.program(leaves, laid_out=True)
        call = self._taken_apart(args, kwargs)
        if requires_gradient(call.leaves):
            return self._fun(*args, **kwargs)
        program = self._program(call)
        if program.requires_gradient():
            return self._fun(*args, **kwargs)
        self._latest = Recognised.of(call.leaves, call.treedef, len(args), program) if call.form.plain else None
        return program(call.dynamic())

    def _taken_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        shape = len(args), tuple(kwargs)
        if shape not in self._forms:
            self._forms[shape] = _Form(self, *shape)
        return _Call(self._forms[shape], args, kwargs)

    def _program(self, call: _Call) -> Program:
        key = call.key()
        try:
            program = self._programs.get(key)
        except TypeError:
            self._check_hashable(call)
            raise
        if program is None:
            with TRACING:  # another thread may be at it
                program = self._programs.get(key) or self._build(call)
                self._programs[key] = program
        return program

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the compiled programs to a file, for :meth:`load` in another process.

        Programs that are not compiled yet are compiled. The file holds machine code for processors like this one.

        Raises:
            ValueError: if nothing was traced yet, or a program closes over tensors or calls back.
        """
        if not self._programs:
            raise ValueError(f"jit: expected {self._name} to be traced before it is saved; call it, or lower() it")
        programs = {key: program.saved() for key, program in self._programs.items()}
        files = {file for program in self._programs.values() for file in program.files()}
        artifacts.write(path, self._fun, programs, files)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes over the programs that :meth:`save` wrote: their signatures are neither traced nor compiled again.

        The file holds code that runs here: load only what you trust.

        Raises:
            ValueError: if the file is damaged, or made from other code (of the function, or of a source file that an
                operation came from), by another torch or for other processors; says what differs.
        """
        for key, (plan, executable) in artifacts.read(path, self._fun).items():
            self._programs[key] = Program.restore(plan, executable, self._backend, self._name)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """As a method, ``self`` is the first argument."""
        return self if instance is None else types.MethodType(self, instance)

    def lower(self, *args: Any, **kwargs: Any) -> "Lowered":
        """Traces without compiling or running: ``jit(f).lower(*args).text()``, ``.compile()``."""
        return Lowered(self, self._taken_apart(args, kwargs))

    def _check_hashable(self, call: _Call) -> None:
        for name, value in (*call.static, *call.static_names):
            try:
                hash(value)
            except TypeError as error:
                raise TypeError(
                    f"jit: expected the static argument {name!r} to be hashable, got {type(value).__name__}"
                ) from error
        self._leaf_names(call)

    def _all_names(self, call: _Call) -> list[str]:
        """All leaves by argument and path."""
        names = []
        for path in tree.paths(call.arguments):
            kind, first, *rest = path.split(".")
            position = call.form.positions[int(first)] if kind == "0" else -1
            argument = self._parameters[position] if 0 <= position < len(self._parameters) else first
            names.append(f"argument {argument!r}" + (f" at {'.'.join(rest)!r}" if rest else ""))
        return names

    def _leaf_names(self, call: _Call) -> list[str]:
        """The dynamic leaves by argument and path; refuses those that cannot be traced."""
        names = []
        for name, leaf in zip(self._all_names(call), call.leaves, strict=True):
            if isinstance(leaf, Tensor) and is_released(leaf):
                raise ValueError(f"jit: expected a tensor in {name}, got one whose memory was donated to another call")
            if not isinstance(leaf, _TRACED) and not _is_description(leaf):
                raise TypeError(
                    f"jit: expected tensors, numbers or frozen dataclasses in {name}, got {type(leaf).__name__}; "
                    "mark the argument static with static_argnums, or convert it (torch.from_numpy)"
                )
            if isinstance(leaf, _TRACED):
                names.append(name)
        return names

    def _build(self, call: _Call) -> Program:
        names = self._leaf_names(call)
        if self._programs and config.current().explain_retraces:
            explain_retrace(self._name, call.key(), list(self._programs), self._all_names(call))
        leaves, treedef = call.leaves, call.treedef
        statics, static_names, positions = dict(call.static), dict(call.static_names), call.form.positions
        order = call.order

        def flat(*dynamic: Any) -> Any:
            rest = iter(dynamic)
            full = [next(rest) if isinstance(x, _TRACED) else x for x in leaves]
            args, kwargs = tree.unflatten(treedef, full)
            by_position = {**statics, **dict(zip(positions, args, strict=True))}
            by_name = {**kwargs, **static_names}
            return self._fun(*[by_position[i] for i in range(len(by_position))], **{k: by_name[k] for k in order})

        donated = call.donated_leaves(self._donated_names)
        return Program.trace(flat, call.dynamic(), names=names, donated=donated, backend=self._backend, name=self._name)


def _is_description(x: Any) -> bool:
    if not is_dataclass(x) or isinstance(x, type):
        return False
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _positional_names(fun: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _check_names(fun: Callable[..., Any], names: tuple[str, ...]) -> None:
    try:
        parameters = inspect.signature(fun).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            raise ValueError(f"jit: expected static_argnames to name arguments of {list(parameters)}, got {name!r}")


class Lowered:
    """A traced call that has not been compiled yet."""

    def __init__(self, owner: Jitted, call: _Call):
        self._owner, self._program = owner, owner._program(call)

    def text(self) -> str:
        """The traced graph, one operation a line, with the function and the line of source that it comes from."""
        return self._program.text

    def cost(self) -> Cost:
        """What a call takes: operations, bytes moved, peak memory, by user function; ``str()`` gives a table."""
        return self._program.cost()

    def compile(self) -> "Jitted":
        """Compiles for this signature; returns the jitted function."""
        self._program.compile(wait=True)
        return self._owner
