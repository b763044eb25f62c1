"""Ordinary differential equations: solvers in fixed and adaptive steps, and the densities that flows carry along."""

from functorch_gen.ode.adaptive import Stats, solve_adaptive
from functorch_gen.ode.density import divergence, hutchinson_divergence, log_prob
from functorch_gen.ode.runge_kutta import solve

__all__ = ["Stats", "divergence", "hutchinson_divergence", "log_prob", "solve", "solve_adaptive"]
