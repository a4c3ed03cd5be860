"""Methods of outside libraries by class name: `from hybridopt.adapters import SLSQP`. Loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybridopt.registry import BUILTIN, factory

if TYPE_CHECKING:
    from hybridopt_cma import CMAES
    from hybridopt_optuna import TPE, OptunaCMAES
    from hybridopt_pyswarm import PSO
    from hybridopt_scipy import (
        BFGS,
        CG,
        COBYLA,
        COBYQA,
        DIRECT,
        LBFGSB,
        SHGO,
        SLSQP,
        TNC,
        BasinHopping,
        DifferentialEvolution,
        Dogleg,
        DualAnnealing,
        LeastSquares,
        NelderMead,
        NewtonCG,
        Powell,
        TrustConstr,
        TrustExact,
        TrustKrylov,
        TrustNCG,
    )
    from hybridopt_torch import (
        ASGD,
        LBFGS,
        SGD,
        Adadelta,
        Adafactor,
        Adagrad,
        Adam,
        Adamax,
        AdamW,
        Muon,
        NAdam,
        RAdam,
        RMSprop,
        Rprop,
        SparseAdam,
    )

__all__ = [
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "BFGS", "BasinHopping", "CG",
    "CMAES", "COBYLA", "COBYQA", "DIRECT", "DifferentialEvolution", "Dogleg", "DualAnnealing", "LBFGS",
    "LBFGSB", "LeastSquares", "Muon", "NAdam", "NelderMead", "NewtonCG", "OptunaCMAES", "PSO", "Powell",
    "RAdam", "RMSprop", "Rprop", "SGD", "SHGO", "SLSQP", "SparseAdam", "TNC", "TPE", "TrustConstr",
    "TrustExact", "TrustKrylov", "TrustNCG",
]  # fmt: skip

# a name with a dot belongs to an outside library
_CLASSES = {value.partition(":")[2]: name for name, value in BUILTIN.items() if "." in name}


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return factory(_CLASSES[name])
    raise AttributeError(
        f"module 'hybridopt.adapters' has no attribute {name!r}; known: {', '.join(sorted(_CLASSES))}"
    )
