"""Gradient optimizers with compiled steps: drop-in classes for any torch loop, and `from_rule` for one's own."""

from hybridopt.optim._extras import StepOptions
from hybridopt.optim.adadelta import Adadelta
from hybridopt.optim.adafactor import Adafactor
from hybridopt.optim.adagrad import Adagrad
from hybridopt.optim.adam import Adam, AdamW, AMSGrad
from hybridopt.optim.adamax import Adamax
from hybridopt.optim.adan import Adan
from hybridopt.optim.ademamix import AdEMAMix
from hybridopt.optim.adopt import ADOPT
from hybridopt.optim.asgd import ASGD
from hybridopt.optim.lamb import LAMB
from hybridopt.optim.lbfgs import LBFGS
from hybridopt.optim.lion import Lion
from hybridopt.optim.muon import Muon
from hybridopt.optim.nadam import NAdam
from hybridopt.optim.own import RuleOptimizer, from_rule
from hybridopt.optim.radam import RAdam
from hybridopt.optim.rmsprop import RMSprop
from hybridopt.optim.rprop import Rprop
from hybridopt.optim.sgd import SGD
from hybridopt.optim.sparse_adam import SparseAdam

__all__ = [
    "ADOPT", "AMSGrad", "ASGD", "AdEMAMix", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Adan",
    "LAMB", "LBFGS", "Lion", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "RuleOptimizer", "SGD", "SparseAdam",
    "StepOptions", "from_rule",
]  # fmt: skip
