"""One harness for gradient and gradient-free optimizers over a PyTorch model's weights."""

from hybridopt import optim
from hybridopt.compose import Chain, Stage
from hybridopt.errors import HybridoptError
from hybridopt.harness import Run, minimize
from hybridopt.ledger import Budget, Reason
from hybridopt.objective import Objective
from hybridopt.optimizer import Method, Optimizer, step
from hybridopt.result import Result
from hybridopt.text import method
from hybridopt.tracker import Tracker
from hybridopt.vector import ParameterVector

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Chain",
    "HybridoptError",
    "Method",
    "Objective",
    "Optimizer",
    "ParameterVector",
    "Reason",
    "Result",
    "Run",
    "Stage",
    "Tracker",
    "__version__",
    "method",
    "minimize",
    "optim",
    "step",
]
