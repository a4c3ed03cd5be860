"""SciPy's solvers as hybridopt methods."""

from hybridopt_scipy._basinhopping import BasinHopping
from hybridopt_scipy._derivative_free import COBYLA, COBYQA, NelderMead, Powell
from hybridopt_scipy._differential_evolution import DifferentialEvolution
from hybridopt_scipy._direct import DIRECT
from hybridopt_scipy._dual_annealing import DualAnnealing
from hybridopt_scipy._gradient import BFGS, CG, LBFGSB, SLSQP, TNC, TrustConstr
from hybridopt_scipy._least_squares import LeastSquares
from hybridopt_scipy._newton import Dogleg, NewtonCG, TrustExact, TrustKrylov, TrustNCG
from hybridopt_scipy._shgo import SHGO

__all__ = [
    "BFGS", "CG", "COBYLA", "COBYQA", "DIRECT", "LBFGSB", "SHGO", "SLSQP", "TNC", "BasinHopping",
    "DifferentialEvolution", "Dogleg", "DualAnnealing", "LeastSquares", "NelderMead", "NewtonCG", "Powell",
    "TrustConstr", "TrustExact", "TrustKrylov", "TrustNCG",
]  # fmt: skip
