"""Any `torch.optim.Optimizer`, torch's own or a third party's, as a hybridopt method."""

from __future__ import annotations

import torch

from hybridopt_torch._method import TorchMethod, method_of, torch_method

Adadelta = torch_method(torch.optim.Adadelta, "torch.adadelta")
Adafactor = torch_method(torch.optim.Adafactor, "torch.adafactor")
Adagrad = torch_method(torch.optim.Adagrad, "torch.adagrad")
Adam = torch_method(torch.optim.Adam, "torch.adam")
Adamax = torch_method(torch.optim.Adamax, "torch.adamax")
AdamW = torch_method(torch.optim.AdamW, "torch.adamw")
ASGD = torch_method(torch.optim.ASGD, "torch.asgd")
LBFGS = torch_method(torch.optim.LBFGS, "torch.lbfgs")
Muon = torch_method(torch.optim.Muon, "torch.muon")
NAdam = torch_method(torch.optim.NAdam, "torch.nadam")
RAdam = torch_method(torch.optim.RAdam, "torch.radam")
RMSprop = torch_method(torch.optim.RMSprop, "torch.rmsprop")
Rprop = torch_method(torch.optim.Rprop, "torch.rprop")
SGD = torch_method(torch.optim.SGD, "torch.sgd")
SparseAdam = torch_method(torch.optim.SparseAdam, "torch.sparse_adam")

__all__ = [
    "ASGD", "LBFGS", "SGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SparseAdam", "TorchMethod", "method_of", "torch_method",
]  # fmt: skip
