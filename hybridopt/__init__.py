"""One harness for gradient and gradient-free optimizers over a PyTorch model's weights."""

from hybridopt import optim, until
from hybridopt.compose import Chain, Cycle, MultiStart, Portfolio, Race, Restart, Split, Stage
from hybridopt.constraints import Constraint
from hybridopt.errors import HybridoptError
from hybridopt.harness import Run, minimize
from hybridopt.ledger import Budget, Reason, Share
from hybridopt.objective import Objective
from hybridopt.optimizer import Method, Optimizer, step
from hybridopt.result import Result
from hybridopt.space import Categorical, Float, Int, Space
from hybridopt.text import method
from hybridopt.tracker import Tracker
from hybridopt.tuning import tune
from hybridopt.vector import ParameterVector

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Chain",
    "Constraint",
    "Cycle",
    "HybridoptError",
    "Method",
    "MultiStart",
    "Objective",
    "Optimizer",
    "ParameterVector",
    "Portfolio",
    "Race",
    "Reason",
    "Restart",
    "Result",
    "Space",
    "Int",
    "Float",
    "Categorical",
    "Run",
    "Share",
    "Split",
    "Stage",
    "Tracker",
    "__version__",
    "method",
    "minimize",
    "optim",
    "step",
    "tune",
    "until",
]
