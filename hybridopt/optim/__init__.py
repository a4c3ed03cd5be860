"""Gradient optimizers with compiled steps: drop-in classes for any torch loop, and `from_rule` for one's own."""

from hybridopt.optim.adadelta import Adadelta
from hybridopt.optim.adagrad import Adagrad
from hybridopt.optim.adam import Adam, AdamW
from hybridopt.optim.adamax import Adamax
from hybridopt.optim.adan import Adan
from hybridopt.optim.adopt import ADOPT
from hybridopt.optim.asgd import ASGD
from hybridopt.optim.lion import Lion
from hybridopt.optim.nadam import NAdam
from hybridopt.optim.own import RuleOptimizer, from_rule
from hybridopt.optim.radam import RAdam
from hybridopt.optim.rmsprop import RMSprop
from hybridopt.optim.rprop import Rprop
from hybridopt.optim.sgd import SGD

__all__ = [
    "ADOPT",
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "RuleOptimizer",
    "from_rule",
]
