"""torch's gradient optimizers with compiled steps: drop-in classes for any torch loop."""

from hybridopt.optim.adadelta import Adadelta
from hybridopt.optim.adagrad import Adagrad
from hybridopt.optim.adam import Adam, AdamW
from hybridopt.optim.adamax import Adamax
from hybridopt.optim.asgd import ASGD
from hybridopt.optim.nadam import NAdam
from hybridopt.optim.radam import RAdam
from hybridopt.optim.rmsprop import RMSprop
from hybridopt.optim.rprop import Rprop
from hybridopt.optim.sgd import SGD

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
]
