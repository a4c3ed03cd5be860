"""A training step under torch.compile: what `step` does is left out of the graphs, whichever the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import hybridopt

STEPS = 10  # more than torch's limit of recompilations


def train(name: str, compiled: bool) -> list[Tensor]:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(5, 3, sparse=name == "SparseAdam")
    layer = torch.nn.Linear(3, 3, bias=False)
    weights = [*embedding.parameters(), *(() if name == "SparseAdam" else layer.parameters())]
    optimizer = getattr(hybridopt.optim, name)(weights, lr=0.1)
    rows = torch.tensor([0, 2, 2, 4])

    def closure() -> Any:
        optimizer.zero_grad()
        loss = layer(embedding(rows)).square().sum()
        loss.backward()
        return loss

    def one() -> None:
        if name == "LBFGS":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    run = torch.compile(one, backend="eager") if compiled else one
    for _ in range(STEPS):
        run()
    return [p.detach() for p in weights]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, while it traces the closure
@pytest.mark.parametrize("name", ["AdamW", "Lion", "LAMB", "LBFGS", "Adafactor", "Muon", "SparseAdam"])
def test_the_step_is_not_traced(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = train(name, False), train(name, True)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    # zero_grad, backward and step each end a graph, in the function and in the one it calls
    assert sum(counters["graph_break"].values()) <= 6
    assert counters["frames"]["total"] <= 14
    assert "recompile_limit" not in caplog.text
