"""What may be chosen, which reasons are given, and compiled batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hybridopt.errors import ObjectiveError
from hybridopt.objective import Objective
from hybridopt.products import SHORT, SMALL, ShortProducts
from hybridopt.vector import ParameterVector
from tests.batch.drive import CASES, INPUTS, ROWS, ask, bits, network, on, population, through_a_file

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
    real, replay = torch.compile, torch._dynamo.run

    def compiled(function: Any, **options: Any) -> Any:
        told = options.pop("options")
        assert isinstance(told.pop("post_grad_custom_pre_pass"), ShortProducts)
        assert told == {"fallback_random": True, "triton.cudagraphs": False}
        inner = real(function, backend="aot_eager", **options)

        def forward(flat: Tensor) -> Any:
            rows.append(len(flat))
            return inner(flat)

        return forward

    def run(function: Any) -> Any:
        inner = replay(function)

        def forward(flat: Tensor) -> Any:
            told = inner(flat)
            rows.append(len(flat))
            return told

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch._dynamo, "run", run)
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


def test_the_compiler_is_called_only_for_what_it_has_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    calls: list[int] = []
    compiling = torch.compile

    def counted(*given: Any, **options: Any) -> Any:
        inner = compiling(*given, **options)

        def forward(flat: Tensor) -> Any:
            calls.append(len(flat))
            return inner(flat)

        return forward

    monkeypatch.setattr(torch, "compile", counted)
    data = {"now": torch.tensor([1.0, 2.0])}
    with Objective(lambda x: (x.sum() * data["now"]).sum(), torch.ones(2), batch="compiled") as objective:

        def told() -> float:
            losses = objective.answer(ask(np.ones((5, 2)))).losses
            assert losses is not None
            return float(losses[-1])

        assert [told(), told(), told()] == [6, 6, 6]
        assert len(calls) == 1, "of the check; the others are replayed"
        data["now"] = torch.tensor([1.0, 2.0, 3.0])  # another shape: the guards find it
        assert [told(), told()] == [12, 12]
        assert len(calls) == 2
        data["now"] = torch.tensor([4.0, 5.0])
        assert told() == 18, "a value is none of the guards' business"
        assert len(calls) == 2
        with torch.compiler.set_stance(
            "force_eager"
        ):  # nobody compiles, and what is new is computed all the same
            data["now"] = torch.ones(4)
            assert told() == 8
        assert len(calls) == 3


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
