"""Running a training step many times, the checks that come before, and checkpoints of what came out."""

from functorch_gen.train import checkpoint
from functorch_gen.train.checks import check_data, check_writable
from functorch_gen.train.fit import Every, History, fit

__all__ = ["Every", "History", "check_data", "check_writable", "checkpoint", "fit"]
