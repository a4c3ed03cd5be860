"""Any `torch.optim.Optimizer`, torch's own or a third party's, as a hybridopt method."""

from __future__ import annotations

import torch

from hybridopt_torch._method import TorchMethod, method_of, torch_method

Adadelta = torch_method(torch.optim.Adadelta, "adadelta")
Adafactor = torch_method(torch.optim.Adafactor, "adafactor")
Adagrad = torch_method(torch.optim.Adagrad, "adagrad")
Adam = torch_method(torch.optim.Adam, "adam")
Adamax = torch_method(torch.optim.Adamax, "adamax")
AdamW = torch_method(torch.optim.AdamW, "adamw")
ASGD = torch_method(torch.optim.ASGD, "asgd")
LBFGS = torch_method(torch.optim.LBFGS, "lbfgs")
Muon = torch_method(torch.optim.Muon, "muon")
NAdam = torch_method(torch.optim.NAdam, "nadam")
RAdam = torch_method(torch.optim.RAdam, "radam")
RMSprop = torch_method(torch.optim.RMSprop, "rmsprop")
Rprop = torch_method(torch.optim.Rprop, "rprop")
SGD = torch_method(torch.optim.SGD, "sgd")
SparseAdam = torch_method(torch.optim.SparseAdam, "sparse_adam")

__all__ = [
    "ASGD", "LBFGS", "SGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SparseAdam", "TorchMethod", "method_of", "torch_method",
]  # fmt: skip
