"""`hybridopt.batch` and `hybridopt.generation`: one forward for many members is right, or not taken and said so."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hybridopt import batch as batching
from hybridopt.errors import BoundsError, MissingGradient, NonFiniteLoss, ObjectiveError, StateError, Stop
from hybridopt.ledger import Budget, Ledger, Reason
from hybridopt.objective import Objective
from hybridopt.optimizer import Kind, Request
from hybridopt.products import SHORT, SMALL, ShortProducts
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


# -- models and losses ------------------------------------------------------------------------------------------------


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
    return Case(loss, model, "every member draws numbers of its own", {"noise": "independent"})


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
    "writes into its weights": lambda: Case(_halves, linear()),
    "clamps": lambda: Case(lambda m: on(INPUTS)(m).clamp_(0.1, 0.5), linear(), "rule for aten::clamp_"),
    "item": lambda: Case(lambda m: on(INPUTS)(m).item(), linear(), ".item()"),
    "float": lambda: Case(lambda m: float(on(INPUTS)(m)), linear(), ".item()"),
    "number": lambda: Case(lambda m: 3.0, linear(), "returned a float"),
    "numpy inside": lambda: Case(lambda m: on(INPUTS)(m).detach().numpy() + 0, linear(), "storage"),
    "tolist": lambda: Case(lambda m: sum(m.weight.flatten().tolist()), linear(), "storage"),
    "branch": lambda: Case(
        lambda m: m.weight.sum() if m.bias[0] > 0 else m.weight.pow(2).sum(), linear(), "control flow"
    ),
    "fresh buffer": lambda: Case(_fills, linear(), "Error"),
    "data": lambda: Case(lambda m: m.weight.data.sum(), linear(), "data"),
    "constant": lambda: Case(lambda m: torch.tensor(3.0), linear(), "does not depend on the weights"),
    **{f"captured: {k}": (lambda k=k: captured(k))
       for k in ("weight alone", "small penalty", "detached", "rounded", "another name")},
    **{f"draws: {k}": (lambda k=k: draws(k))
       for k in ("torch minibatch", "numpy minibatch", "python minibatch", "permutation", "multinomial of data",
                 "multinomial of outputs", "sample of outputs")},
    **{f"independent: {k}": (lambda k=k: independent(k)) for k in ("torch minibatch", "numpy minibatch")},
    "independent, nothing drawn": lambda: Case(on(INPUTS), linear(), options={"noise": "independent"}),
    "fixed": lambda: draws("torch minibatch")._replace(options={"noise": "fixed"}),
    "tensor": lambda: Case(lambda x: ((x - 1) ** 2).sum(), torch.zeros(3, 2)),
    "mapping": lambda: Case(
        lambda p: (p["a"] ** 2).sum() + p["b"], {"a": torch.ones(2), "b": torch.ones((), dtype=torch.float64)}
    ),
    "array": lambda: Case(lambda x: float((x**2).sum()), np.ones(3), "a loss of a NumPy array takes one point"),
}  # fmt: skip


def _halves(model: nn.Module) -> Tensor:
    assert isinstance(model.weight, Tensor)
    with torch.no_grad():
        model.weight.mul_(0.5)
    return on(INPUTS)(model)


def _fills(model: nn.Module) -> Tensor:
    out = torch.zeros(6)
    out[:] = model(INPUTS)[:, 0]
    return out.sum()


@pytest.mark.parametrize("name", CASES)
def test_a_population_is_answered_as_one_by_one(name: str) -> None:
    def answered(choice: Any) -> tuple[Any, ...]:
        torch.manual_seed(5)
        loss, target, reason, options = CASES[name]()
        with Objective(loss, target, seed=3, batch=choice, **options) as objective:
            vector = objective.vector
            before = [b.clone() for b in target.buffers()] if isinstance(target, nn.Module) else []
            x, y = (vector.encode(population(vector, seed=seed)) for seed in (0, 1))
            first, second = objective.answer(ask(x)), objective.answer(ask(y))
            after = objective.answer(Request(Kind.VALUE, x[0]))
            buffers = list(target.buffers()) if isinstance(target, nn.Module) else []
            assert all(torch.equal(a, b) for a, b in zip(before, buffers, strict=True)), "buffers stay"
            state = objective.randomness.state_dict()
            best = objective.ledger.best_point
            seen = (*first.losses, *second.losses, after.loss)
            return seen, objective, reason, state, None if best is None else best.x

    looped, plain, _, drawn, best = answered("loop")
    batched, objective, reason, drawn_in_batches, best_of_batches = answered("auto")
    eps = max(torch.finfo(t.dtype).eps for t in objective.vector.tensors)
    np.testing.assert_allclose(batched, looped, rtol=200 * eps)
    assert way(objective)[0] == ("loop" if reason else "vmap"), way(objective)
    assert reason in way(objective)[1]
    ledger = objective.ledger
    assert ledger.evaluations == plain.ledger.evaluations == 2 * ROWS + 1
    assert ledger.backward == ledger.recomputed == 0
    never = ("with torch.", "a loss of a NumPy array", "numbers of its own")
    assert ledger.forward == 2 * ROWS + 1 + 2 * (not any(text in reason for text in never))
    for key in ("now", "mark", "last"):
        torch.testing.assert_close(drawn_in_batches[key], drawn[key], rtol=0, atol=0)
    np.testing.assert_equal(best_of_batches, best)
    assert torch.backends.mha.get_fastpath_enabled(), "as found"


@pytest.mark.parametrize("kind", ["own generator", "own order"])
def test_losses_that_change_from_call_to_call_are_not_batched(kind: str) -> None:
    loss, model, reason, _ = draws(kind)
    with Objective(loss, model, batch="auto") as objective:
        objective.answer(ask(population(objective.vector)))
        assert way(objective)[0] == "loop"
        assert reason in way(objective)[1]


def keeping(kind: str) -> tuple[Callable[[nn.Module], Tensor], list[Tensor]]:
    """A loss that keeps tensors from call to call, and where it keeps them: the last place first."""
    kept: list[Tensor] = []

    def loss(model: nn.Module) -> Tensor:
        out = model(INPUTS)
        value: Tensor = (out**2).mean()
        if kind == "output":
            kept[:] = [out.detach()]
        elif kind == "transposed":
            kept[:] = [out.detach().T]
        elif kind == "history":
            kept.insert(0, value.detach())
        elif kind.startswith("running mean"):
            kept[:] = [0.9 * kept[0] + 0.1 * value.detach() if kept else value.detach()]
            if kind == "running mean, then an error":
                assert value.item() > 0
        elif kind == "of the data":
            kept[:] = [INPUTS.sum(0)]
        return value

    return loss, kept


@pytest.mark.parametrize(
    "kind", ["output", "transposed", "history", "running mean", "running mean, then an error", "of the data"]
)
def test_what_a_loss_keeps_is_never_a_tensor_of_a_batch(kind: str) -> None:
    """Dead, it would make the next call raise; or, taken into another batch, be one number for each member."""
    found = {}
    for choice in ("loop", "auto"):
        torch.manual_seed(5)
        loss, kept = keeping(kind)
        with Objective(loss, linear(), batch=choice) as objective:
            x = population(objective.vector)
            for rows in (x, x, x[:5]):
                objective.answer(ask(rows))
            found[choice] = [t + 0 for t in kept]
            if choice == "auto":
                reasons = {"running mean, then an error": ".item()", "of the data": ""}
                assert reasons.get(kind, "keeps tensors of its forward") in way(objective)[1]
                assert way(objective)[0] == ("vmap" if kind == "of the data" else "loop")
    assert found["auto"][0].shape == found["loop"][0].shape
    if kind == "history":
        assert len(found["auto"]) == len(found["loop"]) + 1, "the check's forward is one"
        del found["auto"][-3]
        torch.testing.assert_close(found["auto"], found["loop"])
    elif not kind.startswith("running mean"):  # one more call, the check, is in that
        torch.testing.assert_close(found["auto"], found["loop"])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["transformer", "transformer, eval", "clamps", "rnn cell", "weight norm"])
def test_operations_that_torch_loops_over_are_batched_on_request(name: str) -> None:
    found = []
    for choice in ("loop", "vmap", ROWS):
        torch.manual_seed(5)
        loss, model, _, _ = CASES[name]()
        with Objective(loss, model, batch=choice) as objective:
            losses = objective.answer(ask(population(objective.vector))).losses
            assert losses is not None
            found.append(losses.tolist())
            assert way(objective)[0] == ("loop" if choice == "loop" else "vmap")
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=2e-5)


# -- choices, reasons, notes ------------------------------------------------------------------------------------------


def test_the_reason_is_said_where_a_batch_was_expected() -> None:
    def told(choice: Any, name: str, rows: int) -> tuple[str, list[str]]:
        loss, target, _, _ = CASES[name]()
        with Objective(loss, target, batch=choice) as objective:
            objective.answer(ask(population(objective.vector, rows)))
            return repr(objective), objective.notes

    text, notes = told("auto", "item", ROWS)
    assert "populations one by one (RuntimeError: vmap: It looks like you're calling .item()" in text
    assert [n.partition("RuntimeError")[0] for n in notes] == ["populations are evaluated one by one: "]
    assert told("auto", "bfloat16", ROWS)[1] == [
        "populations are evaluated one by one: with torch.bfloat16 weights a batched loss differs from a looped one "
        "by about a percent"
    ]
    assert told("auto", "bfloat16", 1)[1] == [], "nobody asked for a population"
    text, notes = told("loop", "linear", ROWS)
    assert 'populations one by one (batch="loop")' in text
    assert notes == [], "as asked"
    text, notes = told("auto", "array", ROWS)
    assert "populations one by one (a loss of a NumPy array takes one point)" in text
    assert notes == [], "as must be"
    text, notes = told("auto", "linear", 3)
    assert "populations not asked yet" in text, "three are not worth a batch"
    assert told("auto", "bfloat16", 3)[1] == []
    assert told("auto", "bfloat16", 4)[1] != []
    text, notes = told(5, "linear", ROWS)
    assert "populations 5 rows a forward" in text
    assert notes == []


@pytest.mark.parametrize("name", ["item", "lstm", "batch norm, train", "captured: detached", "constant"])
def test_where_a_batch_is_demanded_it_is_an_error_if_there_can_be_none(name: str) -> None:
    loss, target, reason, _ = CASES[name]()
    for choice in ("vmap", "compiled"):
        with Objective(loss, target, batch=choice) as objective:  # type: ignore[arg-type]
            with pytest.raises(ObjectiveError, match="batch: expected a loss that can be batched") as error:
                objective.answer(ask(population(objective.vector)))
            assert reason in str(error.value)
            assert objective.ledger.evaluations == 2, "those of the comparison"


@pytest.mark.parametrize("choice", ["fast", 0, -3, True, 2.5, None])
def test_wrong_choices_are_said_clearly(choice: Any) -> None:
    with pytest.raises(
        ObjectiveError, match=r"batch: expected 'auto', 'vmap', 'compiled', 'loop' or a number of rows"
    ):
        Objective(lambda x: x.sum(), torch.ones(2), batch=choice)


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (lambda: 1.0, torch.ones(2)),
        (lambda x: float(x.sum()), np.ones(2)),
        (lambda x: x.sum(), torch.ones(2).half()),
    ],
)
def test_a_loss_that_never_can_be_batched_is_refused_at_once(loss: Any, target: Any) -> None:
    for choice in ("vmap", "compiled"):
        with pytest.raises(
            ObjectiveError, match=rf'batched for "{choice}"; (a closure|a loss of a NumPy|with)'
        ):
            Objective(loss, target, batch=choice)  # type: ignore[arg-type]


# -- compiled -----------------------------------------------------------------------------------------------------


def eager(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compile without generating code, which takes seconds; the rows of every compiled forward."""
    rows: list[int] = []
    real = torch.compile

    def compiled(function: Any, **options: Any) -> Any:
        told = options.pop("options")
        assert isinstance(told.pop("post_grad_custom_pre_pass"), ShortProducts)
        assert told == {"fallback_random": True, "triton.cudagraphs": False}
        inner = real(function, backend="aot_eager", **options)

        def forward(flat: Tensor) -> Any:
            rows.append(len(flat))
            return inner(flat)

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    return rows


@pytest.mark.parametrize("name", ["linear", "dropout", "convolution", "embedding"])
def test_a_compiled_forward_tells_what_one_by_one_tells(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = eager(monkeypatch)
    loss, target, _, options = CASES[name]()
    told = []
    x = population(ParameterVector(target), 9)
    for choice in ("compiled", "loop"):
        with Objective(loss, target, batch=choice, **options) as objective:  # type: ignore[arg-type]
            losses = [objective.answer(ask(part)).losses for part in (x[:8], x[4:], np.vstack([x, x]))]
            told.append(np.concatenate([values for values in losses if values is not None]))
            forward = 8 + 5 + 18
            assert objective.ledger.evaluations == forward
            if choice == "compiled":
                assert "populations 8 rows a forward, compiled" in repr(objective)
                assert objective.ledger.forward == forward + 4, "two checks of two"
    np.testing.assert_allclose(told[0], told[1], rtol=1e-5)
    assert set(rows) == {8}, "one program for all sizes"
    assert len(rows) == 1 + 1 + 1 + 3


def test_a_compiled_forward_sees_the_batch_that_the_loss_draws_now(monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    data = {"now": torch.tensor([1.0, 2.0])}
    with Objective(lambda x: (x * data["now"]).sum(), torch.ones(2), batch="compiled") as objective:
        x = np.ones((5, 2))
        first = objective.answer(ask(x)).losses
        data["now"] = torch.tensor([3.0, 4.0])
        second = objective.answer(ask(x)).losses
    assert first is not None
    assert second is not None
    assert (first.tolist(), second.tolist()) == ([3] * 5, [7] * 5)


def test_many_compiled_losses_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    for n in range(1, 13):  # torch keeps at most eight programs of one code object
        with Objective(lambda x: (x**2).sum(), torch.ones(n), batch="compiled") as objective:
            assert objective.answer(ask(np.ones((4, n)))).losses is not None


def test_a_compiled_state_goes_on_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = eager(monkeypatch)
    with Objective(lambda x: (x**2).sum(), torch.ones(3), batch="compiled") as objective:
        x = population(objective.vector, 6)
        objective.answer(ask(x))
        state = through_a_file(objective.state_dict())
        after = objective.answer(ask(x[:4])).losses
    rows.clear()
    with Objective(lambda x: (x**2).sum(), torch.ones(3)) as other:
        other.load_state_dict(state)
        again = other.answer(ask(x[:4])).losses
    assert after is not None
    assert again is not None
    assert bits(again) == bits(after)
    assert rows == [6]


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)

    def loss(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return (x**2).sum()

    with (
        Objective(loss, torch.ones(2), batch="compiled") as objective,
        pytest.raises(ObjectiveError, match=r'batched for "compiled"; '),
    ):
        objective.answer(ask(np.ones((5, 2))))


def test_short_products_become_sums_and_long_ones_stay() -> None:
    shapes = [(3, SHORT, 2, True), (3, SHORT + 1, 2, False), (SMALL // SHORT, SHORT, 1, True),
              (SMALL // SHORT + 1, SHORT, 1, False)]  # fmt: skip
    for m, terms, n, small in shapes:
        left, right = (5, m, terms), (5, terms, n)
        torch.manual_seed(0)
        a, b = torch.randn(left), torch.randn(right)
        traced = make_fx(lambda a, b: torch.bmm(a.tanh(), b) + 1, tracing_mode="fake")(a, b)
        ShortProducts()(traced.graph)
        traced.graph.lint()
        traced.recompile()
        called = [node.target for node in traced.graph.nodes]
        assert (torch.ops.aten.bmm.default in called) is not small
        torch.testing.assert_close(traced(a, b), torch.bmm(a.tanh(), b) + 1)
        shapes_said = [node.meta["val"].shape for node in traced.graph.nodes if "val" in node.meta]
        assert len(shapes_said) == len(called) - 1, "the compiler asks every node but the output"
        assert shapes_said[-1] == (5, m, n)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, about itself
def test_generated_code_tells_what_one_by_one_tells() -> None:
    told = []
    model = network()
    x = population(ParameterVector(model), 9)
    for choice in ("compiled", "loop"):
        with Objective(on(INPUTS), model, batch=choice, seed=1) as objective:  # type: ignore[arg-type]
            losses, gradients = objective.values_and_gradients(x)
            told.append((objective.answer(ask(x)).losses, losses, gradients))
    for one, other in zip(*told, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


# -- counting, cutting, going on --------------------------------------------------------------------------------------


def network() -> nn.Module:
    """The same one at every call; float32, so that sums in another order differ."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))


def new(limits: Any = None, choice: Any = "auto", noise: Any = "shared") -> Objective:
    objective = Objective(on(INPUTS), network(), limits, seed=3, batch=choice, noise=noise, keep="best")
    evaluate = objective._generations.batch.evaluate

    def placed(x: FloatArray, fresh: bool) -> tuple[FloatArray, None]:
        """As on a machine whose kernels round by the size of a batch and the place in it."""
        losses, _ = evaluate(x, fresh)
        return losses + 1e-9 * (100 * len(x) + np.arange(len(x))), None

    objective._generations.batch.evaluate = placed  # type: ignore[method-assign]
    return objective


def bits(losses: Any) -> list[str]:
    return [float(loss).hex() for loss in losses]


GENERATIONS = [population(ParameterVector(network()), 11, seed) for seed in (0, 1, 2)]


def run(objective: Objective, budgets: list[Any], through: bool) -> tuple[list[list[str]], Any, Objective]:
    """Three generations under growing budgets; losses bit for bit, and the random state at the end."""
    found = []
    todo = list(budgets)
    for x in GENERATIONS:
        while True:
            try:
                answer = objective.answer(ask(x))
                break
            except Stop:
                spent = objective.ledger
                assert spent.evaluations <= (spent.budget.evaluations or math.inf)
                assert spent.forward_equivalents <= (spent.budget.forward_equivalents or math.inf)
                if through:
                    state = through_a_file(objective.state_dict())
                    objective.close()
                    objective = new()
                    objective.load_state_dict(state)
                objective.ledger.limit(todo.pop(0) if todo else Budget())
        assert answer.losses is not None
        found.append(bits(answer.losses))
    with objective:
        return found, objective.randomness.state_dict(), objective


@pytest.mark.parametrize("choice", ["auto", 4])
@pytest.mark.parametrize("unit", ["evaluations", "forward_equivalents"])
@settings(max_examples=25)
@given(data=st.data(), through=st.booleans())
def test_however_a_run_is_cut_it_walks_the_same_path_bit_for_bit(
    choice: Any, unit: str, data: st.DataObject, through: bool
) -> None:
    limits = sorted(data.draw(st.sets(st.integers(1, 36), max_size=4)))
    budgets = [Budget(**{unit: limit}) for limit in limits]
    whole, drawn, one = run(new(None, choice), [], False)
    cut, drawn_too, other = run(new(budgets[0] if budgets else None, choice), budgets[1:], through)
    assert cut == whole
    for key in ("now", "mark", "last"):
        torch.testing.assert_close(drawn_too[key], drawn[key], rtol=0, atol=0)
    a, b = one.ledger, other.ledger
    assert (a.evaluations, a.forward, a.backward, a.recomputed) == (33, 35, 0, 0)
    assert (b.evaluations, b.forward, b.backward) == (33, 35, 0)
    assert (a.best_loss, a.best_evaluation, a.worst_loss) == (b.best_loss, b.best_evaluation, b.worst_loss)
    np.testing.assert_array_equal(a.best_point.x, b.best_point.x)
    assert way(other)[0] == "vmap"


def test_batched_and_looped_losses_are_not_the_same_bits() -> None:
    """Else the test above would compare nothing."""
    paths = [run(new(None, choice), [], False)[0] for choice in ("loop", "auto", 4)]
    assert paths[0] != paths[1] != paths[2] != paths[0]


@pytest.mark.parametrize("limits", [{"evaluations": 5}, {"forward_equivalents": 7.5}])
def test_of_a_batch_only_the_rows_that_fit_are_evaluated(limits: dict[str, Any]) -> None:
    objective = new(limits)
    seen = []

    class Listening:
        def evaluated(self, ledger: Ledger, scopes: Any, loss: float, probe: bool) -> None:
            seen.append((ledger.evaluations, ledger.forward, loss, probe))

    objective.listeners.append(Listening())
    with objective:
        for _ in range(2):
            with pytest.raises(Stop):
                objective.answer(ask(GENERATIONS[0], probe=True))
        ledger = objective.ledger
        assert (ledger.evaluations, ledger.forward, ledger.recomputed) == (5, 7, 6)
        assert [row[:2] for row in seen] == [(1, 1), (2, 2), (3, 5), (4, 6), (5, 7)]
        assert all(row[3] for row in seen)
        assert math.isnan(ledger.last_loss), "probes"
        ledger.limit(Budget(evaluations=100))
        answer = objective.answer(ask(GENERATIONS[0], probe=True))
    assert answer.losses is not None
    assert [row[2] for row in seen] == answer.losses.tolist()
    assert (ledger.evaluations, ledger.forward, ledger.recomputed) == (11, 13, 9)


def test_rows_that_do_not_fit_are_not_looked_at() -> None:
    """In their place stand copies of a row that does."""
    seen: list[list[float]] = []

    def loss(x: Tensor) -> Tensor:
        seen.extend(torch.func.debug_unwrap(x).detach().reshape(-1, 2).tolist())
        return (x**2).sum()

    x = np.arange(12.0).reshape(6, 2)
    with Objective(loss, torch.zeros(2), budget=4, batch=4) as objective, pytest.raises(Stop):
        objective.answer(ask(x))
    rows = x.tolist()
    assert seen == [*rows[:2], *rows[:2], rows[2], rows[3], rows[2], rows[2]]


def test_the_check_is_not_begun_where_it_does_not_fit() -> None:
    for limits, evaluations in (
        ({"forward_equivalents": 4.9}, 2),
        ({"evaluations": 2}, 2),
        ({"evaluations": 1}, 1),
    ):
        with new(limits) as objective:
            with pytest.raises(Stop):
                objective.answer(ask(GENERATIONS[0]))
            assert (objective.ledger.evaluations, objective.ledger.forward) == (evaluations, evaluations)
            assert way(objective)[0] == "open"


def test_a_stage_is_cut_in_a_batch_and_the_next_one_goes_on() -> None:
    stage, following = Ledger(Budget(evaluations=5)), Ledger(Budget(forward_equivalents=6))
    with new(18) as objective:
        answer = objective.answer(ask(GENERATIONS[0]).within(stage))
        assert answer.stop is not None
        assert (answer.stop.ledger, stage.evaluations, stage.forward) == (stage, 5, 7)
        answer = objective.answer(ask(GENERATIONS[0]).within(following))
        assert answer.stop is not None
        assert (following.evaluations, following.forward) == (6, 6), "it was checked before"
        with pytest.raises(Stop):
            objective.answer(ask(GENERATIONS[1]))
        assert (objective.ledger.evaluations, objective.ledger.forward) == (18, 20)


def test_seconds_are_looked_at_before_each_batch() -> None:
    now = [0.0]

    def slow(x: Tensor) -> Tensor:
        now[0] += 1
        return x.sum()

    objective = Objective(slow, torch.ones(2), {"seconds": 4.5}, batch=3)
    objective.ledger._clock = lambda: now[0]
    with objective, pytest.raises(Stop) as stop:
        objective.answer(ask(np.arange(40.0).reshape(20, 2)))
    assert stop.value.reason is Reason.SECONDS
    assert (now[0], objective.ledger.evaluations) == (5, 2 + 2 * 3), "two alone, the check, two batches"


def test_a_target_ends_the_run_before_the_next_batch() -> None:
    objective = Objective(lambda x: (x**2).sum(), torch.ones(1), {"evaluations": 99, "target": 0.0}, batch=4)
    with objective, pytest.raises(Stop) as stop:
        objective.answer(ask(np.arange(3.0, -20, -1)[:, None]))
    assert stop.value.reason is Reason.TARGET
    assert objective.ledger.evaluations == 2 + 4
    assert objective.ledger.best_evaluation == 4


def test_the_way_and_the_size_of_a_batch_are_state() -> None:
    with new(None, 4) as objective:
        objective.answer(ask(GENERATIONS[0]))
        state = through_a_file(objective.state_dict())
        expected = [bits(objective.answer(ask(x)).losses) for x in GENERATIONS[1:]]  # type: ignore[arg-type]
    for choice in ("auto", "loop", "vmap", 9):
        with new(None, choice) as other:
            other.load_state_dict(state)
            found = [bits(other.answer(ask(x)).losses) for x in GENERATIONS[1:]]  # type: ignore[arg-type]
            assert found == expected
            assert (other.ledger.evaluations, other.ledger.forward) == (33, 35), "checked once"


def test_a_batched_state_is_refused_where_there_can_be_no_batch() -> None:
    start = torch.zeros(3)
    with Objective(lambda x: x.sum(), start, batch="auto") as objective:
        objective.answer(ask(np.arange(30.0).reshape(10, 3)))
        state = objective.state_dict()
    with Objective(lambda: start.sum(), start, batch="auto") as other:
        with pytest.raises(StateError, match="its populations were evaluated in batches; here a closure"):
            other.load_state_dict(state)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_batch_is_as_large_as_the_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    produced = 2 * 8 * 1000 + 8  # of one member: its weights, their squares, the sum
    monkeypatch.setitem(batching.ALLOWANCE, "cpu", 4 * produced + 200)
    sizes: list[int] = []
    with Objective(lambda x: (x**2).sum(), torch.zeros(1000, dtype=torch.float64), batch="auto") as objective:
        watch(objective, sizes)
        objective.answer(ask(np.random.default_rng(0).normal(size=(13, 1000))))
        assert sizes == [2, 4, 4, 3], "the check, and the rest of 13"
        monkeypatch.setitem(batching.ALLOWANCE, "cpu", 2 * produced - 1)
    for choice in ("auto", "vmap"):
        with Objective(
            lambda x: (x**2).sum(), torch.zeros(1000, dtype=torch.float64), batch=choice
        ) as objective:
            objective.answer(ask(np.random.default_rng(0).normal(size=(13, 1000))))
            assert way(objective)[0] == ("loop" if choice == "auto" else "vmap")
            assert (f"one member alone produces {produced + 1} bytes" in repr(objective)) == (
                choice == "auto"
            )


def watch(objective: Objective, sizes: list[int], most: int | None = None) -> None:
    """Write down how many rows each forward takes; more than `most` are too many for the memory."""
    for batch in (objective._generations.batch, objective._generations.gradient_batch):

        def evaluate(x: FloatArray, fresh: bool, evaluate: Any = batch.evaluate) -> Any:
            sizes.append(len(x))
            torch.rand(len(x))
            if most is not None and len(x) > most:
                raise torch.OutOfMemoryError("out of memory")
            return evaluate(x, fresh)

        batch.evaluate = evaluate  # type: ignore[method-assign]


def test_out_of_memory_halves_the_batch_for_good() -> None:
    paths = []
    for limits in (None, 9):
        sizes: list[int] = []
        objective = new(limits)
        watch(objective, sizes, most=5)
        if limits is not None:
            with pytest.raises(Stop):
                objective.answer(ask(GENERATIONS[0]))
            state = through_a_file(objective.state_dict())
            objective.close()
            objective = new(None)
            objective.load_state_dict(state)
            watch(objective, sizes, most=5)
        with objective:
            paths.append([bits(objective.answer(ask(x)).losses) for x in GENERATIONS])  # type: ignore[arg-type]
            assert objective.notes == ["a batch of 9 rows ran out of memory after evaluation 2: halved"]
            assert "populations 4 rows a forward" in repr(objective)
            assert (objective.ledger.evaluations, objective.ledger.forward) == (33, 35)
        assert sizes[:3] == [2, 9, 4]
        assert max(sizes[2:]) == 4, "obeyed from then on, by a resumed run too"
    assert paths[0] == paths[1]


def test_memory_may_run_out_in_the_middle_of_a_generation() -> None:
    sizes: list[int] = []
    with new(None, 5) as objective:
        evaluate = objective._generations.batch.evaluate

        def short(x: FloatArray, fresh: bool) -> Any:
            sizes.append(len(x))
            if len(sizes) == 3:
                raise MemoryError
            return evaluate(x, fresh)

        objective._generations.batch.evaluate = short  # type: ignore[method-assign]
        objective.answer(ask(GENERATIONS[0]))
        ledger = objective.ledger
        assert sizes == [2, 5, 4, 2, 2], "of 11 rows two come alone"
        assert (ledger.evaluations, ledger.forward, ledger.recomputed) == (11, 13, 0)


def test_without_memory_for_two_there_is_no_batch() -> None:
    sizes: list[int] = []
    with new() as objective:
        watch(objective, sizes, most=1)
        losses = objective.answer(ask(GENERATIONS[0])).losses
        assert way(objective) == ("loop", "OutOfMemoryError: out of memory")
    with new(None, "loop") as other:
        assert losses is not None
        assert losses.tolist() == other.answer(ask(GENERATIONS[0])).losses.tolist()  # type: ignore[union-attr]


# -- losses that are not finite, exceptions ---------------------------------------------------------------------------


def rooted(x: Tensor) -> Tensor:
    return torch.sqrt(x[0]) + x[1] ** 2


BAD = [[-1.0, 0], [4, 1], [-2, 0], [9, 0], [1, 2], [-3, 0], [16, 1], [0, 0]]


def test_members_that_are_not_finite_are_rejected_as_one_by_one() -> None:
    found = []
    for choice in ("loop", "auto", 3):
        with Objective(rooted, torch.ones(2, dtype=torch.float64), batch=choice) as objective:
            with pytest.warns(RuntimeWarning, match="loss nan at evaluation 1: rejected") as caught:
                answer = objective.answer(ask(BAD))
            assert len(caught) == 1
            ledger = objective.ledger
            assert answer.losses is not None
            found.append((
                answer.losses.tolist(), answer.finite, answer.loss, ledger.nonfinite, ledger.nonfinite_in_a_row,
                ledger.best_loss, ledger.best_evaluation, ledger.best_point.x.tolist(), ledger.worst_loss,
            ))  # fmt: skip
            assert way(objective)[0] == ("loop" if choice == "loop" else "vmap")
            for _ in range(30):
                assert ledger.nonfinite_in_a_row < 30
                objective.answer(ask([[-1.0, 0]] * 5))
            with pytest.raises(Stop) as stop:
                objective.answer(ask(BAD))
            assert stop.value.reason is Reason.NON_FINITE
            assert ledger.evaluations == len(BAD) + 150
    assert found[0] == found[1] == found[2]
    assert found[0][0] == [math.inf, 3, math.inf, 3, 5, math.inf, 5, 0]


def test_a_warning_in_a_batch_names_its_evaluation() -> None:
    with Objective(rooted, torch.ones(2, dtype=torch.float64), batch="auto") as objective:
        with pytest.warns(RuntimeWarning, match="loss nan at evaluation 5: rejected"):
            objective.answer(ask([[1, 1]] * 4 + BAD))


def test_raise_on_request_books_the_whole_batch() -> None:
    with Objective(rooted, torch.ones(2, dtype=torch.float64), nonfinite="raise", batch="auto") as objective:
        for evaluations in (9, 14):  # asked again, the rows before the first bad one are known
            with pytest.raises(NonFiniteLoss, match="loss: got nan at evaluation"):
                objective.answer(ask([[1, 1]] * 4 + [[-1, 0]] + [[2, 1]] * 4))
            assert objective.ledger.evaluations == evaluations
        assert objective.ledger.nonfinite == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("from the loss")])
@pytest.mark.parametrize("call", range(1, 6))
def test_after_an_exception_the_population_can_be_asked_again(error: BaseException, call: int) -> None:
    calls = [0]
    points = [population(ParameterVector(torch.zeros(3)), 6, seed) for seed in (0, 1)]

    def path(fails: int | None) -> Any:
        calls[0] = 0

        def loss(x: Tensor) -> Tensor:
            calls[0] += 1
            noise = torch.rand(3) + float(np.random.rand()) + random.random()
            if calls[0] == fails:
                raise error
            return ((x - noise) ** 2).sum()

        found = []
        with Objective(loss, torch.zeros(3), seed=1, batch="auto") as objective:
            for x in points:
                with contextlib.suppress(type(error)):
                    found.append(objective.answer(ask(x)).losses)
                    continue
                found.append(objective.answer(ask(x)).losses)
            return (
                found,
                objective.ledger.evaluations,
                way(objective),
                objective.randomness.state_dict()["now"],
            )

    # calls: two rows, the check, the batch, the next population
    expected, got = path(None), path(call)
    assert expected[1] == got[1] == 12
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    torch.testing.assert_close(got[3], expected[3], rtol=0, atol=0)
    swallowed = isinstance(error, RuntimeError) and call >= 3
    assert got[2] == (("loop", "RuntimeError: from the loss") if swallowed else ("vmap", "")), (
        "never silently"
    )


def test_an_error_that_one_alone_raises_too_is_the_losss_own() -> None:
    def loss(x: Tensor) -> Tensor:
        if broken:
            raise ValueError("broken")
        return (x**2).sum()

    broken: list[int] = []
    with Objective(loss, torch.zeros(3), batch="auto") as objective:
        objective.answer(ask(np.eye(5, 3)))
        broken.append(1)
        with pytest.raises(ValueError, match="broken"):
            objective.answer(ask(np.eye(6, 3)))
        assert (objective.ledger.evaluations, way(objective)) == (5, ("vmap", ""))
        broken.clear()
        objective.answer(ask(np.eye(6, 3)))
        assert (objective.ledger.evaluations, way(objective)) == (11, ("vmap", ""))


def test_a_model_that_stops_being_batchable_is_looped_from_then_on() -> None:
    model = nn.Sequential(linear(), nn.BatchNorm1d(2), nn.Tanh()).eval()
    with Objective(on(INPUTS), model, batch="auto") as objective:
        x = population(objective.vector)
        objective.answer(ask(x))
        assert way(objective)[0] == "vmap"
        model.train()
        batched = objective.answer(ask(x)).losses
        assert way(objective)[0] == "loop"
        assert "Batch norm got a batched tensor" in objective.notes[0]
        assert objective.ledger.evaluations == 2 * ROWS
        looped = objective.answer(ask(x)).losses
        assert batched is not None
        assert looped is not None
        assert batched.tolist() == looped.tolist()
        assert model[1].num_batches_tracked == 0


def test_points_outside_the_bounds_are_refused_before_anything_is_evaluated() -> None:
    with Objective(lambda x: x.sum(), torch.zeros(2), bounds=(-1, 1), batch="auto") as objective:
        objective.answer(ask(np.zeros((5, 2))))
        with pytest.raises(BoundsError, match=r"outside the bounds: weight 1 at 1\.5"):
            objective.answer(ask([[0, 0]] * 4 + [[0, 1.5]]))
        assert objective.ledger.evaluations == 5


# -- what stays as it was ---------------------------------------------------------------------------------------------


def test_the_request_and_the_model_are_not_written() -> None:
    def greedy(x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(2)
        return x.sum()

    start = torch.zeros(2, dtype=torch.float64)
    with Objective(greedy, start, batch="auto") as objective:
        x = np.ones((6, 2))
        for _ in range(2):
            answer = objective.answer(ask(x))
        assert answer.losses is not None
        assert answer.losses.tolist() == [4.0] * 6
        assert (x == 1).all()
        assert objective.ledger.best_point.x.tolist() == [1, 1]


def test_a_gradient_after_a_batch_is_that_of_its_own_point() -> None:
    with Objective(lambda x: (x**2).sum(), torch.zeros(2, dtype=torch.float64), batch="auto") as objective:
        objective.answer(Request(Kind.VALUE, np.array([1.0, 2.0]), keep_graph=True))
        objective.answer(ask(np.eye(5, 2), probe=True))
        answer = objective.answer(Request(Kind.GRADIENT, np.array([1.0, 2.0])))
        assert answer.gradient is not None
        assert answer.gradient.tolist() == [2, 4]
        for _ in range(2):  # the second time no row comes alone, and the weights stand where none of them is
            objective.answer(Request(Kind.VALUE, np.array([1.0, 2.0]), keep_graph=True))
            objective.answer(ask([[0, 1]] * 5 + [[3, 4]]))
            assert objective.evaluation.kept is None, "the memory of its graph is given back"
        answer = objective.answer(Request(Kind.GRADIENT, np.array([3.0, 4.0])))
        assert answer.gradient is not None
        assert answer.gradient.tolist() == [6, 8]


def test_best_points_found_in_a_batch_are_copies() -> None:
    with Objective(lambda x: (x**2).sum(), torch.zeros(2, dtype=torch.float64), batch="auto") as objective:
        x = np.arange(20.0, 0, -1).reshape(10, 2)
        objective.answer(ask(x))
        first = objective.ledger.best_point
        assert objective.vector.read().tolist() == [18, 17], "where the second row, the last alone, left them"
        assert first.x.tolist() == [2, 1]
        assert first.x.base is None, "not a row that keeps its whole population alive"
        x[:] = 0
        objective.answer(ask(x - 7))
        assert first.x.tolist() == [2, 1]
        objective.restore_best()
        assert objective.vector.read().tolist() == [2, 1]


# -- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mlp", "convolution", "dropout", "tied", "frozen part", "two dtypes", "bounds and scale", "mapping",
             "tensor", "batch norm, train", "lstm", "branch", "bfloat16", "captured: small penalty", "attention"],
)  # fmt: skip
def test_values_and_gradients_of_many_points(name: str) -> None:
    def answered(choice: Any) -> Any:
        torch.manual_seed(5)
        loss, target, reason, options = CASES[name]()
        with Objective(loss, target, seed=3, batch=choice, **options) as objective:
            x = objective.vector.encode(population(objective.vector))
            found = [objective.values_and_gradients(x) for _ in range(2)]
            assert all(t.grad is None for t in objective.vector.tensors)
            return found, objective, reason, objective.randomness.state_dict()

    looped, plain, _, drawn = answered("loop")
    batched, objective, reason, drawn_too = answered("auto")
    ledger = objective.ledger
    eps = max(torch.finfo(t.dtype).eps for t in objective.vector.tensors)
    for (losses, gradients), (expected, slopes) in zip(batched, looped, strict=True):
        assert gradients.shape == (ROWS, objective.vector.n)
        np.testing.assert_allclose(losses, expected, rtol=200 * eps)
        np.testing.assert_allclose(gradients, slopes, atol=200 * eps * np.abs(slopes).max())
    for key in ("now", "mark"):
        torch.testing.assert_close(drawn_too[key], drawn[key], rtol=0, atol=0)
    check = 2 * ("weights" not in reason)
    assert (plain.ledger.evaluations, plain.ledger.forward, plain.ledger.backward) == (14, 14, 14)
    assert (ledger.evaluations, ledger.forward, ledger.backward) == (14, 14 + check, 14 + check)
    assert ledger.best_loss == pytest.approx(plain.ledger.best_loss, rel=200 * eps)
    state = objective.state_dict()["generations"]["gradient_batch"]
    assert state["way"] == ("loop" if reason else "vmap")


def test_values_and_gradients_are_all_or_nothing_and_rejected_as_at_one_point() -> None:
    for choice in ("loop", "auto", 3):
        with Objective(rooted, torch.ones(2, dtype=torch.float64), 40, batch=choice, scale=2.0) as objective:
            with pytest.warns(RuntimeWarning, match="loss nan at evaluation 1"):
                losses, gradients = objective.values_and_gradients(np.array(BAD) / 2)
            # at (0, 0) the loss is finite, its gradient is not
            assert losses.tolist() == [math.inf, 3, math.inf, 3, 5, math.inf, 5, math.inf]
            slopes = np.array(
                [[0, 0], [1 / 4, 2], [0, 0], [1 / 6, 0], [1 / 2, 4], [0, 0], [1 / 8, 2], [0, 0]]
            )
            np.testing.assert_allclose(gradients, slopes * 2, rtol=1e-15)
            assert (objective.ledger.nonfinite, objective.ledger.nonfinite_in_a_row) == (3, 0)
            before = objective.ledger.spent()
            with pytest.raises(Stop):
                objective.values_and_gradients(np.ones((33, 2)))
            assert {**objective.ledger.spent(), "seconds": 0} == {**before, "seconds": 0}
            scope = Ledger()
            objective.values_and_gradients(np.ones((32, 2)), (scope,))
            assert (scope.evaluations, scope.forward, scope.backward) == (32, 32, 32)


def test_the_check_of_gradients_must_fit_too() -> None:
    x = np.arange(8.0).reshape(4, 2)
    for limit, evaluations in ((17, 0), (18, 4)):  # 4 rows and 2 of the check, each a forward and a backward
        with Objective(lambda x: (x**2).sum(), torch.zeros(2), {"forward_equivalents": limit}) as objective:
            with contextlib.suppress(Stop):
                objective.values_and_gradients(x)
            assert objective.ledger.evaluations == evaluations
            assert objective.ledger.forward_equivalents in (0, 18)


def test_gradients_of_a_surrogate_come_one_by_one() -> None:
    objective = Objective(torch.sum, torch.zeros(2), surrogate=lambda x: (x**2).sum(), batch="auto")
    with objective:
        losses, gradients = objective.values_and_gradients(np.array([[1.0, 2.0]] * 5))
        assert losses.tolist() == [3] * 5
        assert gradients.tolist() == [[2, 4]] * 5
        assert (objective.ledger.forward, objective.ledger.backward) == (10, 5)


def test_a_closure_and_a_surrogate_each_pay_their_backward() -> None:
    x = torch.zeros(2)

    def closure() -> Tensor:
        loss = (x**2).sum()
        loss.backward()
        return loss

    with Objective(closure, x, surrogate=lambda: x.sum(), batch="auto") as objective:
        _, gradients = objective.values_and_gradients(np.eye(5, 2))
        assert gradients.tolist() == [[1, 1]] * 5
        assert (objective.ledger.forward, objective.ledger.backward) == (10, 10)
        objective.ledger.limit(Budget(forward_equivalents=30 + 29.5))
        with pytest.raises(Stop):
            objective.values_and_gradients(np.eye(5, 2))
        assert objective.ledger.evaluations == 5


def test_gradients_need_a_graph_and_memory() -> None:
    with Objective(lambda x: x.detach().sum(), torch.zeros(2), batch="auto") as objective:
        with pytest.raises(MissingGradient):
            objective.values_and_gradients(np.ones((5, 2)))
    sizes: list[int] = []
    with new() as objective:
        watch(objective, sizes, most=5)
        objective.values_and_gradients(GENERATIONS[0])
        assert sizes == [2, 9, 4, 4, 1]


def test_an_objective_that_is_merely_dropped_gives_everything_back_at_once() -> None:
    model = linear()
    model.weight.grad = mark = torch.ones(2, 4)
    objective = Objective(on(INPUTS), model, batch="auto")
    objective.answer(ask(population(objective.vector)))
    objective.values_and_gradients(population(objective.vector))
    assert model.weight.grad is None
    gc.disable()
    try:
        del objective
        assert model.weight.grad is mark, "no cycle of references waits for the collector"
    finally:
        gc.enable()


def test_other_gradients_in_a_batch_are_found_out() -> None:
    with Objective(rooted, torch.ones(2, dtype=torch.float64), batch="auto") as objective:
        batch = objective._generations.gradient_batch
        evaluate = batch.evaluate

        def wrong(x: FloatArray, fresh: bool) -> Any:
            losses, gradients = evaluate(x, fresh)
            assert gradients is not None
            return losses, gradients * [1, 1 + 1e-9]

        batch.evaluate = wrong  # type: ignore[method-assign]
        _, gradients = objective.values_and_gradients(np.ones((5, 2)))
        assert gradients.tolist() == [[0.5, 2]] * 5
        assert (objective.ledger.forward, objective.ledger.backward) == (7, 7)
        assert objective.notes == [
            "gradients of populations are evaluated one by one: one forward and backward for two members told other "
            "gradients than one alone"
        ]


def test_members_are_never_given_common_numbers_where_they_should_have_their_own() -> None:
    """Noise that the first evaluation did not show: a model that is trained later."""
    model = nn.Sequential(linear(), nn.Dropout(0.5)).eval()
    with Objective(on(INPUTS), model, noise="independent", batch="auto") as objective:
        x = np.tile(objective.vector.read(), (6, 1))
        objective.answer(ask(x))
        assert way(objective)[0] == "vmap"
        model.train()
        losses = objective.answer(ask(x)).losses
        assert losses is not None
        assert len(set(losses.tolist())) == 6
        assert "random" in objective.notes[0]


def test_a_reason_is_not_a_call_for_reports() -> None:
    """torch's text asks for an issue at its own place; users of ours would follow it."""
    told = batching._first_line(RuntimeError("no batching rule for x. Please file us an issue\nsecond line"))
    assert told == "RuntimeError: no batching rule for x."
