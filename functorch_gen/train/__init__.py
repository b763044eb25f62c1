"""Running a training step many times, and the checks that come before."""

from functorch_gen.train.checks import check_data, check_writable
from functorch_gen.train.fit import Every, History, fit

__all__ = ["Every", "History", "check_data", "check_writable", "fit"]
