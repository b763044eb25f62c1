"""Noise schedules: how x_t = alpha(t) x + sigma(t) noise goes from data (t = 0) to noise (t = 1)."""

from functorch_gen.noise.schedule import NoiseSchedule, expand, log_snr, mix, rates
from functorch_gen.noise.schedules import EDM, FlowMatching, SubVP, VPCosine, VPLinear, VPSigmoid
from functorch_gen.noise.times import angle_times, rho_times, uniform_times
from functorch_gen.noise.wrappers import Shifted, ZeroTerminalSNR

__all__ = [
    "EDM",
    "FlowMatching",
    "NoiseSchedule",
    "Shifted",
    "SubVP",
    "VPCosine",
    "VPLinear",
    "VPSigmoid",
    "ZeroTerminalSNR",
    "angle_times",
    "expand",
    "log_snr",
    "mix",
    "rates",
    "rho_times",
    "uniform_times",
]
