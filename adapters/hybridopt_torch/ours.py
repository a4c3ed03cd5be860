"""The optimizers of `hybridopt.optim` as methods, under their bare names (`adam`; torch's own is `torch.adam`)."""

from __future__ import annotations

from hybridopt import optim
from hybridopt_torch._method import torch_method

Adadelta = torch_method(optim.Adadelta, "adadelta", __name__)
Adafactor = torch_method(optim.Adafactor, "adafactor", __name__)
Adagrad = torch_method(optim.Adagrad, "adagrad", __name__)
Adam = torch_method(optim.Adam, "adam", __name__)
Adamax = torch_method(optim.Adamax, "adamax", __name__)
AdamW = torch_method(optim.AdamW, "adamw", __name__)
Adan = torch_method(optim.Adan, "adan", __name__)
AdEMAMix = torch_method(optim.AdEMAMix, "ademamix", __name__)
ADOPT = torch_method(optim.ADOPT, "adopt", __name__)
AMSGrad = torch_method(optim.AMSGrad, "amsgrad", __name__)
ASGD = torch_method(optim.ASGD, "asgd", __name__)
LAMB = torch_method(optim.LAMB, "lamb", __name__)
LBFGS = torch_method(optim.LBFGS, "lbfgs", __name__)
Lion = torch_method(optim.Lion, "lion", __name__)
Muon = torch_method(optim.Muon, "muon", __name__)
NAdam = torch_method(optim.NAdam, "nadam", __name__)
RAdam = torch_method(optim.RAdam, "radam", __name__)
RMSprop = torch_method(optim.RMSprop, "rmsprop", __name__)
Rprop = torch_method(optim.Rprop, "rprop", __name__)
SGD = torch_method(optim.SGD, "sgd", __name__)
SparseAdam = torch_method(optim.SparseAdam, "sparse_adam", __name__)

__all__ = [
    "ADOPT",
    "AMSGrad",
    "ASGD",
    "AdEMAMix",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "LAMB",
    "LBFGS",
    "Lion",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
    "SparseAdam",
]
