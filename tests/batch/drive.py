"""Populations, models of every kind, and which way they were evaluated."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hybridopt.objective import Objective
from hybridopt.optimizer import Kind, Request
from hybridopt.vector import FloatArray, ParameterVector

ROWS = 7
INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
WORDS = torch.randint(5, (6, 3), generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(3))
SENTENCES = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(4))


def population(vector: ParameterVector, rows: int = ROWS, seed: int = 0) -> FloatArray:
    """Points around the start, in weights."""
    return vector.read() + 0.1 * np.random.default_rng(seed).normal(size=(rows, vector.n))


def ask(x: Any, **rest: Any) -> Request:
    return Request(Kind.POPULATION, np.asarray(x, dtype=np.float64), **rest)


def way(objective: Objective) -> tuple[str, str]:
    state = objective.state_dict()["generations"]["batch"]
    return state["way"], state["reason"]


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Case(NamedTuple):
    """A loss with its model, and what is to become of it: "" = batched, else a piece of the reason."""

    loss: Callable[..., Any]
    target: Any
    reason: str = ""
    options: dict[str, Any] = {}  # noqa: RUF012 - never written


def on(inputs: Tensor) -> Callable[[nn.Module], Tensor]:
    """The mean square of a model's outputs."""

    def loss(model: nn.Module) -> Tensor:
        out = model(inputs)
        out = out[0] if isinstance(out, tuple) else out
        return (out.float() ** 2).mean() if out.dtype != torch.float64 else (out**2).mean()

    return loss


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


class Scaled(nn.Module):
    """Two buffers, of which one is read and one counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("factor", torch.tensor([1.0, 3.0]))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls: Tensor
        self.calls += 1
        return self.linear(x) * self.factor


class Remembering(nn.Module):
    """Keeps its last output in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("last", torch.zeros(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        return self.last


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(words))
        return out


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3).double()
        self.second = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x.double()).float())
        return out


def linear() -> nn.Linear:
    return nn.Linear(4, 2)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    return model


def captured(kind: str) -> Case:
    """Losses that read the model past their argument."""
    model = linear()
    weight, inner = model.weight, model.weight.detach()
    losses: dict[str, Callable[[nn.Module], Tensor]] = {
        "weight alone": lambda m: (weight**2).sum(),
        "small penalty": lambda m: m(INPUTS).pow(2).mean() + 1e-9 * (weight**2).sum(),
        "detached": lambda m: m(INPUTS).pow(2).mean() * (1 + 1e-12 * inner.sum()),
        "rounded": lambda m: (m(INPUTS) * 0).sum() + (weight.sum() > -1e9).float(),
        "another name": lambda m: model(INPUTS).pow(2).mean(),
    }
    reasons = {
        "weight alone": "does not depend on the weights that it is given",
        "rounded": "told 0.0 where one alone is 1.0",
        "another name": "",
    }
    return Case(losses[kind], model, reasons.get(kind, "told nan"))


def draws(kind: str) -> Case:
    model = linear()

    def rows(index: Any) -> Callable[[nn.Module], Tensor]:
        return lambda m: m(INPUTS[index()]).pow(2).mean()

    own = torch.Generator().manual_seed(0)
    order: Iterator[int] = iter(range(10**6))
    python = rows(lambda: random.sample(range(6), 3))
    losses: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
        "torch minibatch": (rows(lambda: torch.randint(6, (3,))), ""),
        "numpy minibatch": (rows(lambda: np.random.randint(6, size=3)), ""),
        "python minibatch": (python, ""),
        "permutation": (rows(lambda: torch.randperm(6)[:3]), ""),
        "multinomial of data": (rows(lambda: torch.multinomial(INPUTS[:, 0].exp(), 2)), ""),
        "multinomial of outputs": (
            lambda m: torch.multinomial(m(INPUTS).softmax(1), 1).float().mean() + m.weight.sum(),
            "same randomness with a batched tensor input",
        ),
        "sample of outputs": (
            lambda m: torch.distributions.Normal(m(INPUTS), 1.0).rsample().mean(),
            "",
        ),
        "own generator": (rows(lambda: torch.randint(6, (3,), generator=own)), "one alone is"),
        "own order": (lambda m: m(INPUTS[next(order) % 6]).pow(2).mean(), "one alone is"),
    }
    loss, reason = losses[kind]
    return Case(loss, model, reason)


def independent(kind: str) -> Case:
    loss, model, _, _ = draws(kind)
    return Case(loss, model, "numbers of NumPy and Python are drawn once", {"noise": "independent"})


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: Case(on(INPUTS), linear()),
    "linear, float64": lambda: Case(on(INPUTS.double()), linear().double()),
    "mlp": lambda: Case(on(INPUTS), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))),
    "relu in place": lambda: Case(on(INPUTS), nn.Sequential(linear(), nn.ReLU(inplace=True))),
    "convolution": lambda: Case(
        on(IMAGES), nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 2))
    ),
    "channels last": lambda: Case(on(IMAGES), nn.Conv2d(1, 3, 3).to(memory_format=torch.channels_last)),
    "embedding": lambda: Case(on(WORDS), nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))),
    "group norm": lambda: Case(on(IMAGES), nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4))),
    "attention": lambda: Case(on(SENTENCES), Attention()),
    "attention, eval": lambda: Case(on(SENTENCES), Attention().eval()),
    "transformer, eval": lambda: Case(
        on(SENTENCES), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), "batching rule for aten::_scaled"
    ),
    "transformer, dropout": lambda: Case(
        on(SENTENCES), nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True), "one alone is"
    ),
    "transformer": lambda: Case(
        on(SENTENCES), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), "batching rule for aten::_scaled"
    ),
    "dropout": lambda: Case(on(INPUTS), nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.4), nn.Linear(9, 2))),
    "batch norm, eval": lambda: Case(on(INPUTS), nn.Sequential(linear(), nn.BatchNorm1d(2)).eval()),
    "batch norm, train": lambda: Case(
        on(INPUTS), nn.Sequential(linear(), nn.BatchNorm1d(2), nn.Tanh()), "Batch norm got a batched"
    ),
    "batch norm without statistics": lambda: Case(
        on(INPUTS),
        nn.Sequential(linear(), nn.BatchNorm1d(2, track_running_stats=False), nn.Tanh()),
    ),
    "lstm": lambda: Case(on(SENTENCES), nn.LSTM(8, 3, batch_first=True), "Error"),
    "gru": lambda: Case(on(SENTENCES), nn.GRU(8, 3, batch_first=True), "Error"),
    "rnn cell": lambda: Case(on(INPUTS), nn.GRUCell(4, 2), "batching rule for aten::gru_cell"),
    "weight norm": lambda: Case(
        on(INPUTS), nn.utils.parametrizations.weight_norm(linear()), "rule for aten::_weight_norm"
    ),
    "tied": lambda: Case(on(WORDS), Tied()),
    "frozen part": lambda: Case(on(INPUTS), frozen()),
    "selected part": lambda: Case(on(INPUTS), nn.Sequential(linear(), nn.Linear(2, 2)),
                                  options={"select": "1.*"}),
    "buffers": lambda: Case(on(INPUTS), Scaled()),
    "buffer written": lambda: Case(on(INPUTS), Remembering()),
    "two dtypes": lambda: Case(on(INPUTS), Mixed()),
    "bfloat16": lambda: Case(on(INPUTS.bfloat16()), linear().bfloat16(), "with torch.bfloat16 weights"),
    "float16": lambda: Case(on(INPUTS.half()), linear().half(), "with torch.float16 weights"),
    "bounds and scale": lambda: Case(
        on(INPUTS), linear(), options={"bounds": (-2, 2), "scale": 0.25}
    ),
    "aux": lambda: Case(lambda m: (on(INPUTS)(m), {"seen": m.weight}), linear()),
    "one by one tensor": lambda: Case(lambda m: on(INPUTS)(m).reshape(1, 1), linear()),
    "count": lambda: Case(lambda m: (m(INPUTS) > 0).sum(), linear()),
    "gradient inside": lambda: Case(
        lambda m: torch.autograd.grad((m(INPUTS) ** 2).sum(), m.weight)[0].abs().sum(), linear(), "Error"
    ),
    "writes into its weights": lambda: Case(halves, linear()),
    "clamps": lambda: Case(lambda m: on(INPUTS)(m).clamp_(0.1, 0.5), linear(), "rule for aten::clamp_"),
    "item": lambda: Case(lambda m: on(INPUTS)(m).item(), linear(), ".item()"),
    "float": lambda: Case(lambda m: float(on(INPUTS)(m)), linear(), ".item()"),
    "number": lambda: Case(lambda m: 3.0, linear(), "returned a float"),
    "numpy inside": lambda: Case(lambda m: on(INPUTS)(m).detach().numpy() + 0, linear(), "storage"),
    "tolist": lambda: Case(lambda m: sum(m.weight.flatten().tolist()), linear(), "storage"),
    "branch": lambda: Case(
        lambda m: m.weight.sum() if m.bias[0] > 0 else m.weight.pow(2).sum(), linear(), "control flow"
    ),
    "fresh buffer": lambda: Case(fills, linear(), "Error"),
    "data": lambda: Case(lambda m: m.weight.data.sum(), linear(), "data"),
    "constant": lambda: Case(lambda m: torch.tensor(3.0), linear(), "does not depend on the weights"),
    **{f"captured: {k}": (lambda k=k: captured(k))
       for k in ("weight alone", "small penalty", "detached", "rounded", "another name")},
    **{f"draws: {k}": (lambda k=k: draws(k))
       for k in ("torch minibatch", "numpy minibatch", "python minibatch", "permutation", "multinomial of data",
                 "multinomial of outputs", "sample of outputs")},
    **{f"independent: {k}": (lambda k=k: independent(k)) for k in ("numpy minibatch",)},
    "independent, nothing drawn": lambda: Case(on(INPUTS), linear(), options={"noise": "independent"}),
    "fixed": lambda: draws("torch minibatch")._replace(options={"noise": "fixed"}),
    "tensor": lambda: Case(lambda x: ((x - 1) ** 2).sum(), torch.zeros(3, 2)),
    "mapping": lambda: Case(
        lambda p: (p["a"] ** 2).sum() + p["b"], {"a": torch.ones(2), "b": torch.ones((), dtype=torch.float64)}
    ),
    "array": lambda: Case(lambda x: float((x**2).sum()), np.ones(3), "a loss of a NumPy array takes one point"),
}  # fmt: skip


def halves(model: nn.Module) -> Tensor:
    assert isinstance(model.weight, Tensor)
    with torch.no_grad():
        model.weight.mul_(0.5)
    return on(INPUTS)(model)


def fills(model: nn.Module) -> Tensor:
    out = torch.zeros(6)
    out[:] = model(INPUTS)[:, 0]
    return out.sum()


def network() -> nn.Module:
    """The same one at every call; float32, so that sums in another order differ."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))


def new(limits: Any = None, choice: Any = "auto", noise: Any = "shared") -> Objective:
    objective = Objective(on(INPUTS), network(), limits, seed=3, batch=choice, noise=noise, keep="best")
    evaluate = objective._generations.batch.evaluate

    def placed(x: FloatArray, fresh: bool, **how: bool) -> tuple[FloatArray, None]:
        """As on a machine whose kernels round by the size of a batch and the place in it."""
        losses, _ = evaluate(x, fresh, **how)
        return losses + 1e-9 * (100 * len(x) + np.arange(len(x))), None

    objective._generations.batch.evaluate = placed  # type: ignore[method-assign]
    return objective


def bits(losses: Any) -> list[str]:
    return [float(loss).hex() for loss in losses]


GENERATIONS = [population(ParameterVector(network()), 11, seed) for seed in (0, 1, 2)]


def watch(objective: Objective, sizes: list[int], most: int | None = None) -> None:
    """Write down how many rows each forward takes; more than `most` are too many for the memory."""
    for batch in (objective._generations.batch, objective._generations.gradient_batch):

        def evaluate(x: FloatArray, fresh: bool, evaluate: Any = batch.evaluate, **how: bool) -> Any:
            sizes.append(len(x))
            torch.rand(len(x))
            if most is not None and len(x) > most:
                raise torch.OutOfMemoryError("out of memory")
            return evaluate(x, fresh, **how)

        batch.evaluate = evaluate  # type: ignore[method-assign]


def rooted(x: Tensor) -> Tensor:
    return torch.sqrt(x[0]) + x[1] ** 2


BAD = [[-1.0, 0], [4, 1], [-2, 0], [9, 0], [1, 2], [-3, 0], [16, 1], [0, 0]]
