"""A plain training loop: call the step, keep the losses, show progress, call hooks and save from time to time."""

import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_positive
from functorch_gen.optim import Flat
from functorch_gen.step import Step, TrainState
from functorch_gen.train import checkpoint

__all__ = ["Every", "History", "fit"]

History: TypeAlias = dict[str, list[float]]
"""Columns of equal length, a row for each step: ``step``, ``seconds`` since the start, every 0-d metric by name."""

Batches: TypeAlias = Iterable[Any] | Callable[[int], Any]


@dataclass(frozen=True)
class Every:
    """Calls ``fun(train_state)`` after each step whose ``train_state.step`` is then a multiple of ``steps``.

    ``fun`` must not keep tensors of the state: the next step may write over them if it was jitted with donation.

    >>> Every(100, lambda train_state: None).steps
    100
    """

    steps: int
    fun: Callable[[TrainState], Any]

    def __post_init__(self) -> None:
        _check_count("Every", steps=self.steps)


def fit(
    step: Step,
    train_state: TrainState,
    batches: Batches,
    *,
    steps: int,
    progress: bool = True,
    log_every: int = 50,
    hooks: Sequence[Every] = (),
    checkpoints: str | os.PathLike[str] | None = None,
    save_every: int = 1000,
    keep: int | None = 3,
) -> tuple[TrainState, History]:
    """Takes ``steps`` steps from ``train_state``; returns the last state and the history.

    The progress bar (on stderr) counts the seconds of the first step, in which a jitted step compiles. Metrics stay on
    the device and are read every ``log_every`` steps. All step numbers are ``train_state.step`` as the step began, so
    that a run that resumes counts on.

    Whatever ends the run early (an error, Ctrl-C), nothing is lost: the exception carries ``train_state`` and
    ``history`` as they were after the last whole step.

    With ``checkpoints`` a run that was killed is called again as it was, and goes on from its newest checkpoint to the
    step at which it would have ended, bit for bit as without the break. A state is saved only after the losses up to it
    were found finite.

    Args:
        step: ``step(train_state, batch) -> (train_state, metrics)``, jitted by the caller.
        batches: an iterable, or a function of the step number. An iterable begins with the batch of the ``train_state``
            that is given; those of steps taken before the newest checkpoint are drawn and left out.
        progress: needs tqdm.
        checkpoints: a folder of :mod:`functorch_gen.train.checkpoint`. The state is saved in it whenever its step is a
            multiple of ``save_every``, and at the end; the ``keep`` newest stay (None: all). If it holds a state of
            more steps than ``train_state`` has, the run begins with that one.
    Raises:
        TypeError, ValueError: before the first step, if ``steps``, ``log_every`` or ``save_every`` is no integer > 0, a
            list of batches is too short, or the newest checkpoint is of another tree, corrupt, or beyond the last
            step; when they run out, if ``batches`` is an iterator. If a batch is built otherwise than the first;
            names the path.
        FloatingPointError: if a metric whose name ends in "loss" is NaN or infinite at some step; names the step and
            the parameters that are not finite now.

    >>> import functorch_gen as fg
    >>> tx = fg.optim.sgd(0.25)
    >>> step = fg.step.make_step(lambda params, key, batch: (params["w"] - batch).square(), tx)
    >>> train_state = fg.step.init_state({"w": torch.tensor(1.0)}, tx, fg.random.key(0))
    >>> train_state, history = fit(step, train_state, lambda n: torch.tensor(0.0), steps=3, progress=False)
    >>> history["step"], history["loss"]
    ([0, 1, 2], [1.0, 0.25, 0.0625])
    """
    _check_count("fit", steps=steps, log_every=log_every, save_every=save_every)
    source = _source(batches, steps)
    if not train_state.step.numel():
        raise ValueError("fit: expected a train_state in use, got one whose memory was donated to an earlier step")
    given = int(train_state.step)
    stop = given + steps
    if checkpoints is not None:
        train_state = _resume(checkpoints, train_state, stop)
    start = int(train_state.step)
    begin = time.perf_counter()
    history: History = {"step": [], "seconds": []}
    pending: list[dict[str, Any]] = []
    first: Any = None
    try:
        _skip(source, start - given, steps)
        with _bar(steps, start - given, progress) as bar:
            for n in range(start, stop):
                batch = _next_batch(source, n, n - given, steps)
                first = tree.map(lambda _: 0, batch) if n == start else first
                _check_structure(batch, first, n)
                with _ticking(bar, "first step, compilation included") if n == start else nullcontext():
                    train_state, metrics = step(train_state, batch)
                history["step"].append(n)
                history["seconds"].append(time.perf_counter() - begin)
                pending.append(metrics)
                bar.update()
                saves = (n + 1) % save_every == 0 or n + 1 == stop
                if len(pending) == log_every or saves:
                    bar.set_postfix(_record(history, pending, train_state), refresh=False)
                    pending = []
                for hook in hooks:
                    if (n + 1) % hook.steps == 0:
                        hook.fun(train_state)
                if saves and checkpoints is not None:
                    checkpoint.save_step(checkpoints, n + 1, train_state, keep=keep)
    except (
        BaseException
    ) as error:  # an interrupt too: the state given to fit may have been donated, so hand on the last
        error.__dict__.update(train_state=train_state, history=history)
        error.add_note("fit: the last state and the history are this exception's train_state and history")
        raise
    return train_state, history


def _check_count(name: str, **counts: Any) -> None:
    for argument, value in counts.items():
        if isinstance(value, float):
            raise TypeError(f"{name}: expected {argument} to be an integer > 0, got {value}")
        check_positive(name, **{argument: value})


def _resume(folder: str | os.PathLike[str], train_state: TrainState, stop: int) -> TrainState:
    """The newest state of the folder if it is of more steps than ``train_state``."""
    newest = next(reversed(checkpoint.steps(folder).items()), None)
    if newest is None or newest[0] <= int(train_state.step):
        return train_state
    if newest[0] > stop:
        raise ValueError(
            f"fit: expected no checkpoint beyond step {stop}, the last of this run, got {str(newest[1])!r}"
        )
    return checkpoint.load(newest[1], like=train_state)


# Batches.


def _source(batches: Batches, steps: int) -> Callable[[int], Any] | Iterator[Any]:
    if callable(batches):
        return batches
    if isinstance(batches, Sized) and len(batches) < steps:
        raise ValueError(f"fit: expected batches for steps={steps}, got only {len(batches)}")
    return iter(batches)


def _skip(source: Callable[[int], Any] | Iterator[Any], count: int, steps: int) -> None:
    for taken in range(count if isinstance(source, Iterator) else 0):
        _next_batch(source, taken, taken, steps)


def _next_batch(source: Callable[[int], Any] | Iterator[Any], n: int, taken: int, steps: int) -> Any:
    if not isinstance(source, Iterator):
        return source(n)
    try:
        return next(source)
    except StopIteration:
        raise ValueError(f"fit: expected batches for steps={steps}, got only {taken}") from None


def _check_structure(batch: Any, first: Any, n: int) -> None:
    """Another structure than that of ``first`` would be compiled anew, or fail far from its cause."""
    if tree.structure(batch) != tree.structure(first):
        try:
            tree.map(lambda *_: None, first, batch)
        except ValueError as error:
            told = str(error).removeprefix("tree.map: ")
            raise ValueError(f"fit: expected batches of one structure, got another at step {n}: {told}") from None


# Metrics.


def _record(history: History, pending: list[dict[str, Any]], train_state: TrainState) -> dict[str, str]:
    """Moves the metrics of the last steps into the history; returns the latest for display."""
    names = [name for name, x in pending[0].items() if isinstance(x, Tensor) and x.ndim == 0]
    steps = history["step"][-len(pending) :]
    for name in names:
        values = torch.stack([metrics[name].detach() for metrics in pending]).tolist()  # the one wait for the device
        history.setdefault(name, []).extend(values)
        if name.endswith("loss"):
            _check_finite(name, values, steps, train_state)
    return {name: f"{history[name][-1]:.4g}" for name in names}


def _check_finite(name: str, values: list[float], steps: Sequence[float], train_state: TrainState) -> None:
    bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is None:
        return
    params = train_state.params
    params = params.tree() if isinstance(params, Flat) else params
    broken = [path for path, x in tree.names(params).items() if not torch.isfinite(x).all()]
    listed = ", ".join(itertools.islice(broken, 5)) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
    raise FloatingPointError(
        f"fit: expected a finite {name}, got {values[bad]} at step {steps[bad]}; "
        f"parameters that are not finite after step {steps[-1]}: {listed or 'none'}"
    )


# Display.


class _Silence:
    """The part of a tqdm bar that is used here, showing nothing."""

    def update(self) -> None: ...
    def set_postfix(self, values: dict[str, str], refresh: bool = True) -> None: ...
    def set_postfix_str(self, text: str) -> None: ...
    def set_description_str(self, text: str) -> None: ...


@contextmanager
def _bar(steps: int, done: int, progress: bool) -> Iterator[Any]:
    if not progress:
        yield _Silence()
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("fit: progress needs tqdm: pip install functorch_gen[train], or progress=False") from error
    pause = 0.5 if sys.stderr.isatty() else 10.0  # seconds between lines: a log file keeps every one
    with tqdm(total=steps, initial=done, dynamic_ncols=True, smoothing=0.05, mininterval=pause) as bar:
        yield bar


@contextmanager
def _ticking(bar: Any, label: str) -> Iterator[None]:
    """Shows the passing seconds while one call blocks, and at last how many there were."""
    done = threading.Event()
    begin = time.perf_counter()

    def tick() -> None:
        while not done.wait(1.0):
            bar.set_postfix_str(f"{label}: {time.perf_counter() - begin:.0f} s")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    bar.set_description_str(f"first step {time.perf_counter() - begin:.1f} s")
