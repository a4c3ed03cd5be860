"""SciPy's solvers as hybridopt methods."""

from hybridopt_scipy._dual_annealing import DualAnnealing
from hybridopt_scipy._slsqp import SLSQP

__all__ = ["SLSQP", "DualAnnealing"]
