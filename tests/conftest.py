"""Makes the runs repeatable: one thread, one compiler cache of our own, and hypothesis without chance."""

import importlib.util
import os
from pathlib import Path

# Before torch is imported: a cache inside the repository, filled once and shared by the workers, and no pool of
# compilers beside each worker.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "inductor"))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

collect_ignore_glob = ["goldens/*"]  # scripts that made the goldens; they need jax
if importlib.util.find_spec("jax") is None or importlib.util.find_spec("optax") is None:
    collect_ignore_glob.append("bench/jax_programs.py")  # of the bench extra, which the tests do without

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,  # the first example of a traced function compiles it
    max_examples=30,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")
