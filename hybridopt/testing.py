"""What every method must do, as tests: subclass `OptimizerContract` in a test file of yours and name your method."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import hybridopt
from hybridopt import registry
from hybridopt.constraints import Constraint
from hybridopt.errors import ClosedError, MethodError, MissingGradient, NonFiniteLoss, Stop
from hybridopt.harness import Run
from hybridopt.ledger import Budget, Ledger, Reason
from hybridopt.objective import Objective
from hybridopt.optimizer import Method, Need, Step, leaves, step
from hybridopt.result import Result
from hybridopt.vector import ParameterVector

_SEED = 7


class Model(nn.Module):
    """Weights to optimize, in two tensors, beside a frozen one that nobody may touch.

    Args:
        start: the weights, at least one.
        dtype, device: of all of them.
    """

    def __init__(
        self, start: Sequence[float], dtype: torch.dtype = torch.float64, device: str = "cpu"
    ) -> None:
        super().__init__()
        values = torch.tensor(start, dtype=dtype, device=device)
        cut = len(start) - len(start) // 2
        self.a = nn.Parameter(values[:cut].clone())
        if cut < len(start):
            self.b = nn.Parameter(values[cut:].clone())
        self.frozen = nn.Parameter(torch.ones(2, dtype=dtype, device=device), requires_grad=False)

    def x(self) -> Tensor:
        """All weights, flat."""
        return torch.cat([p for name, p in self.named_parameters() if name != "frozen"])

    def bits(self) -> list[bytes]:
        """The exact weights."""
        return [_bits(p) for p in self.parameters()]


class Loss:
    """A loss of a `Model` that counts, by itself, how often it is called and differentiated.

    Args:
        function: the loss of the flat weights.
        spoil: what is done to each value before it is returned; called with the value and the number of the call,
            from 1.
        residuals: whether it returns residuals instead, of `bowl`, `valley` or `flat`.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        spoil: Callable[[Tensor, int], Any] | None = None,
        residuals: bool = False,
    ) -> None:
        self.function = _RESIDUALS[function] if residuals else function
        self.spoil = spoil
        self.residuals = residuals
        self.calls = 0
        self.backwards = 0
        self.values: list[float] = []

    def __call__(self, model: Model) -> Any:
        """The loss, after it was counted."""
        self.calls += 1
        value = self.function(model.x())
        if value.requires_grad:
            value.register_hook(self._count)  # type: ignore[no-untyped-call]
        told = value if self.spoil is None else self.spoil(value, self.calls)
        number = 0.5 * (told * told).sum() if self.residuals else told
        self.values.append(number.item() if isinstance(number, Tensor) else float(number))
        return told

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1

    @property
    def finite(self) -> list[float]:
        """The finite values returned so far."""
        return [v for v in self.values if math.isfinite(v)]


class Row(NamedTuple):
    """One evaluation as a listener sees it; equal rows mean equal bits."""

    loss: str
    probe: bool
    x: bytes


class Rows:
    """Listens to an objective: one `Row` an evaluation."""

    def __init__(self, vector: ParameterVector) -> None:
        self._vector = vector
        self.rows: list[Row] = []

    def evaluated(self, ledger: Ledger, scopes: Sequence[Ledger], loss: float, probe: bool) -> None:
        """See `hybridopt.objective.Listener`."""
        self.rows.append(Row(float(loss).hex(), probe, self._vector.read().tobytes()))


class Heard:
    """Listens to an objective: the loss of each evaluation."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def evaluated(self, ledger: Ledger, scopes: Sequence[Ledger], loss: float, probe: bool) -> None:
        """See `hybridopt.objective.Listener`."""
        self.heard.append(float(loss).hex())


def bowl(x: Tensor) -> Tensor:
    """A convex quadratic with its minimum 0 at 0.5."""
    weights = 1 + torch.arange(len(x), dtype=x.dtype, device=x.device)
    return (weights * (x - 0.5) ** 2).sum()


def valley(x: Tensor) -> Tensor:
    """Rosenbrock's bent valley in two weights, minimum 0 at (1, 1)."""
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def flat(x: Tensor) -> Tensor:
    """3 everywhere."""
    return (x * 0).sum() + 3


def _bowl_residuals(x: Tensor) -> Tensor:
    weights = 1 + torch.arange(len(x), dtype=x.dtype, device=x.device)
    return (2 * weights).sqrt() * (x - 0.5)


def _valley_residuals(x: Tensor) -> Tensor:
    return math.sqrt(2) * torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def _flat_residuals(x: Tensor) -> Tensor:
    return (x * 0).sum() + torch.tensor([1.0, 1.0, 2.0], dtype=x.dtype, device=x.device)


# Half their squared norm is the function.
_RESIDUALS: dict[Any, Callable[[Tensor], Tensor]] = {
    bowl: _bowl_residuals,
    valley: _valley_residuals,
    flat: _flat_residuals,
}


def _batched_valley(model: Model) -> Tensor:
    return valley(model.x())


class Disc:
    """A constraint that counts its calls: the weights lie within a disc of radius 1 around 0."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Model) -> Tensor:
        """1 - |x|², which must not be negative."""
        self.calls += 1
        return 1 - (model.x() ** 2).sum()

    def constraint(self) -> Constraint:
        """For an objective."""
        return Constraint(self)

    def recomputed(self, run: Run) -> int:
        """Calls that were made again because a graph was lost, which costs nothing."""
        return run.objective.ledger.recomputed

    def inside(self, x: Tensor) -> bool:
        """Whether a point keeps it, within the tolerance of float64 weights."""
        return bool((x**2).sum() <= 1 + 1e-6)


class OptimizerContract:
    """Tests that every method passes, ours and a third party's.

    Pytest (or any runner of `Test*` classes) collects them from a subclass; nothing of pytest is needed to define
    one. A method that needs bounds is given the box (-2, 2).

    Attributes:
        method: the method under test. If it is registered by entry point, its text form is tested too.
        bounds: given to every run; None = the box (-2, 2) where `method.needs` says so, else none.
        budget: forward-equivalents within which bowl and valley must be lowered to a tenth of their start.
        random: whether another seed takes another path; None = either will do.
        evaluations: length of the runs that are compared, saved and copied.

    Example:
        The whole test file of a package that registers the method "mine":

        >>> import hybridopt
        >>> from hybridopt.testing import OptimizerContract
        >>> class TestMine(OptimizerContract):
        ...     method = hybridopt.method("slsqp")
    """

    method: ClassVar[Method]
    bounds: ClassVar[Any] = None
    budget: ClassVar[float] = 4000.0
    random: ClassVar[bool | None] = None
    evaluations: ClassVar[int] = 60

    # -- it works -----------------------------------------------------------------------------------------------

    def test_lowers_a_bowl(self) -> None:
        """The loss of a convex quadratic falls to a tenth within the budget."""
        self._lowers(bowl, [-1.0, 1.5, -0.5])

    def test_lowers_a_bent_valley(self) -> None:
        """The loss of Rosenbrock's valley falls to a tenth within the budget."""
        self._lowers(valley, [-1.2, 1.0])

    def test_one_weight(self) -> None:
        """A single weight is enough."""
        self._lowers(bowl, [-1.0])

    def test_keeps_dtype_and_device(self) -> None:
        """Weights stay the same tensors, of the same dtype and device, and frozen ones stay as they are."""
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        for device in devices:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                model = Model([-1.0, 1.5, -0.5], dtype, device)
                before = [(id(p), p.dtype, p.device, p.shape, p.requires_grad) for p in model.parameters()]
                result = self._minimize(self._loss(bowl), model, self.evaluations)
                after = [(id(p), p.dtype, p.device, p.shape, p.requires_grad) for p in model.parameters()]
                assert before == after, f"{dtype} on {device}: the weights became {after}"
                assert bool((model.frozen == 1).all()), f"{dtype} on {device}: a frozen weight was changed"
                for name, value in result.params.items():
                    mine = dict(model.named_parameters())[name]
                    assert value.dtype == mine.dtype, f"{dtype} on {device}: result.params has {value.dtype}"
                    assert torch.equal(value, mine), f"{dtype} on {device}: result.params is not the model"
                assert math.isfinite(result.best_loss), f"{dtype} on {device}: no finite loss"

    # -- paths --------------------------------------------------------------------------------------------------

    def test_same_seed_same_path(self) -> None:
        """Two runs with one seed evaluate the same points, bit for bit, whatever the caller's generators say."""
        _scramble_generators(1)
        first = self._path(_SEED)
        _scramble_generators(2)
        assert self._path(_SEED) == first, "the same seed took another path"

    def test_other_seed_other_path(self) -> None:
        """Another seed takes another path if the method is random, and the same one if it says it is not."""
        if self.random is None:
            return
        different = self._path(_SEED) != self._path(_SEED + 1)
        assert different == self.random, (
            "two seeds took the same path; is it random at all?"
            if self.random
            else "two seeds took two paths, but random = False"
        )

    def test_state_saved_between_any_two_steps(self) -> None:
        """A state saved after any step, as a file, and loaded into a new run gives the rest of the path bit for bit."""
        whole, saved = self._record(self.evaluations)
        for done, state in _some(saved):
            rest = self._resume(torch.load(io.BytesIO(state), weights_only=True), self.evaluations)
            assert rest == whole[done:], f"resumed after evaluation {done}, the path is another one"

    def test_copied_state(self) -> None:
        """A state stays what it was while the run goes on, and a deep copy or a pickle of it is as good."""
        run, rows = self._run(self.evaluations)
        for _ in range(4):
            run.step()
        done = len(rows.rows)
        state = run.state_dict()
        states = [state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))]
        with run:
            for _ in run:
                pass
        for state in states:
            assert self._resume(state, self.evaluations) == rows.rows[done:], (
                "a copied state takes another path"
            )

    def test_asking_twice(self) -> None:
        """Asking again without telling gives an equal request."""
        run, _ = self._run(self.evaluations)
        with run:
            for _ in range(25):
                first, second = run.optimizer.ask(), run.optimizer.ask()
                assert first.kind is second.kind, "the second request is of another kind"
                assert first[2:] == second[2:], "the second request differs"
                same = first.x is second.x or np.array_equal(np.array(first.x), np.array(second.x))
                assert same, "the second request is at another point"
                if run.step() is None or run.reason is not None:
                    break

    def test_batched_populations(self) -> None:
        """Populations in one forward: the budget is as exact, and a state between any two steps as good."""
        if Need.POPULATION not in self.method.uses:
            return

        def begin() -> tuple[Run, Heard]:
            run = Run(
                _batched_valley,
                Model([-1.2, 1.0]),
                self.method,
                budget=self.evaluations,
                bounds=self._bounds(),
                seed=_SEED,
            )
            heard = Heard()
            run.objective.listeners.append(heard)
            return run, heard

        whole, losses = begin()
        saved = [(0, _save(whole.state_dict()))]
        with whole:
            for _ in whole:
                saved.append((len(losses.heard), _save(whole.state_dict())))
        result = whole.result()
        assert result.evaluations == len(losses.heard) <= self.evaluations, "the budget was passed"
        for done, state in _some(saved)[::3]:
            run, rest = begin()
            with run:
                run.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
                for _ in run:
                    pass
            assert rest.heard == losses.heard[done:], f"resumed after evaluation {done}, the losses differ"

    # -- budgets ------------------------------------------------------------------------------------------------

    def test_budget_of_evaluations(self) -> None:
        """It is spent exactly, by the loss's own count; less only if the method ended by itself."""
        for budget in (1, 7, 137):
            loss = self._loss(valley)
            result, ended = self._until_the_end(loss, {"evaluations": budget})
            made = self._made(loss, result)
            assert result.evaluations == made, f"booked {result.evaluations}, made {made}"
            assert made <= budget, f"{made} evaluations with a budget of {budget}"
            assert ended or made == budget, f"stopped after {made} of {budget} evaluations"

    def test_budget_of_forward_equivalents(self) -> None:
        """It is never exceeded, by the loss's own count, and what is left is less than one evaluation with gradient."""
        for budget in (1.0, 7.5, 137.0):
            loss = self._loss(valley)
            result, ended = self._until_the_end(loss, {"forward_equivalents": budget})
            spent, booked = loss.calls + 2.0 * loss.backwards, result.forward_equivalents
            # second derivatives have a fixed price, which is more than the calls that can be counted
            second = Need.HESSIAN in self.method.uses
            assert booked >= spent if second else booked == spent, f"booked {booked}, spent {spent}"
            assert booked <= budget, f"spent {booked} of {budget} forward-equivalents"
            largest = max(3, 5 * 2 * second, 2 * 2 * (Need.RESIDUALS in self.method.needs))
            assert ended or budget - booked < largest, f"stopped at {booked} of {budget} forward-equivalents"

    def test_budget_raised_in_a_new_run(self) -> None:
        """A run stopped by its budget, saved, and resumed with a larger one walks the path of an uninterrupted run."""
        for unit, small in (("evaluations", 7), ("evaluations", 37), ("forward_equivalents", 10.0)):
            if unit == "evaluations" and small >= self.evaluations:
                continue
            whole, rows = self._run(self.evaluations)
            self._finish(whole)
            first, begun = self._run({unit: small})
            self._finish(first)
            rest = self._resume(_through_a_file(first.state_dict()), self.evaluations)
            assert begun.rows + rest == rows.rows, f"stopped at {small} {unit}, the path is another one"

    def test_budget_raised_in_place(self) -> None:
        """After `Stop` the question stays open: with a larger budget the next step goes on exactly there."""
        whole, rows = self._run(self.evaluations)
        self._finish(whole)
        model = Model([-1.2, 1.0])
        objective = Objective(
            self._loss(valley),
            model,
            1,
            bounds=self._bounds(),
            seed=_SEED,
            batch="loop",
            residuals=self._residuals,
        )
        seen = Rows(objective.vector)
        objective.listeners.append(seen)
        optimizer = self.method.start(objective.vector, _SEED)
        with objective:
            for budget in (*range(1, self.evaluations, 5), self.evaluations):
                objective.ledger.limit(Budget(evaluations=budget))
                if _step_until_stop(optimizer, objective) is not None:
                    break
            optimizer.close()
        assert seen.rows == rows.rows, "with a budget raised in place the path is another one"

    # -- constraints --------------------------------------------------------------------------------------------

    def test_keeps_constraints(self) -> None:
        """The best point keeps them, all forwards are counted, and the lowest loss outside does not count."""
        if not self._constrainable:
            return
        for budget in (1, 7, 137):
            loss, disc = self._loss(valley), Disc()
            model = Model([-0.4, 0.3])
            run, _ = self._run(budget, loss=loss, model=model, constraints=disc.constraint())
            self._finish(run)
            result = run.result()
            assert self._made(loss, result) == result.evaluations <= budget, (
                f"{loss.calls} evaluations of {budget}"
            )
            spent = loss.calls + disc.calls - disc.recomputed(run)
            if Need.HESSIAN not in self.method.uses:
                assert result.forward == spent, f"booked {result.forward} forwards, {spent} made"
            assert result.violation == 0, (
                f"the start kept the constraint, the best breaks it by {result.violation}"
            )
            assert disc.inside(model.x().detach()), "the model holds a point that breaks the constraint"

    def test_constrained_state_saved_between_steps(self) -> None:
        """With a constraint, too, a state saved after any step gives the rest of the path bit for bit."""
        if not self._constrainable:
            return
        run, rows = self._run(self.evaluations, constraints=Disc().constraint())
        saved = [(0, _save(run.state_dict()))]
        with run:
            for _ in run:
                saved.append((len(rows.rows), _save(run.state_dict())))
        spent = run.result().forward
        for done, state in _some(saved)[::4]:
            again, rest = self._run(
                self.evaluations, _SEED + 1, model=Model([0.75, -0.25]), constraints=Disc().constraint()
            )
            with again:
                again.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
                for _ in again:
                    pass
            assert rest.rows == rows.rows[done:], f"resumed after evaluation {done}, the path is another one"
            assert again.result().forward == spent, f"resumed after evaluation {done}, it cost another sum"

    # -- whole numbers ------------------------------------------------------------------------------------------

    def test_whole_numbers(self) -> None:
        """A weight that stands for whole numbers only ever is one: budget, path and resume are as exact; or refused."""
        last: Step | None = None
        refused: MethodError | None = None
        try:
            run, rows = self._run(self.evaluations, integer="a")
            saved = [(0, _save(run.state_dict()))]
            with _quiet(), run:
                while (step_ := run.step()) is not None:
                    last = step_
                    saved.append((len(rows.rows), _save(run.state_dict())))
        except MethodError as error:
            refused = error
        if refused is not None:
            assert "integer" in str(refused), f"refused without a word of integer weights: {refused}"
            return
        result, weights = run.result(), [np.frombuffer(row.x) for row in rows.rows]
        assert result.evaluations == len(weights) <= self.evaluations, f"{len(weights)} evaluations"
        ended = last is not None and last.reason is not None
        assert ended or len(weights) == self.evaluations, (
            f"stopped after {len(weights)} of {self.evaluations}"
        )
        for x in (*weights, result.x):
            assert x[0] == round(x[0]), f"the weight stood at {x[0]}"
            assert self._bounds() is None or abs(x[0]) <= 2, f"the weight stood at {x[0]}, outside its bounds"
        assert result.best_loss == min(float.fromhex(row.loss) for row in rows.rows), (
            "the best is another one"
        )

        again, same = self._run(self.evaluations, integer="a")
        self._finish(again)
        assert same.rows == rows.rows, "the same seed took another path"
        for done, state in _some(saved)[::4]:
            begun, rest = self._run(self.evaluations, _SEED + 1, model=Model([0.75, -0.25]), integer="a")
            begun.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
            self._finish(begun)
            assert rest.rows == rows.rows[done:], f"resumed after evaluation {done}, the path is another one"

    # -- losses that misbehave ----------------------------------------------------------------------------------

    def test_nan_half_of_the_time(self) -> None:
        """Losses that are nan are counted, survived, and never the best."""
        draws = random.Random(_SEED)

        def spoil(value: Tensor, call: int) -> Tensor:
            return value * math.nan if call > 1 and draws.random() < 0.5 else value

        self._survives(self._loss(valley, spoil))

    def test_inf_now_and_then(self) -> None:
        """Losses that are inf or -inf are counted, survived, and never the best."""
        draws = random.Random(_SEED)

        def spoil(value: Tensor, call: int) -> Tensor:
            return value + draws.choice([math.inf, -math.inf, 0, 0]) if call > 1 else value

        self._survives(self._loss(valley, spoil))

    def test_nan_after_the_start(self) -> None:
        """When only the first loss is finite, its point is the best one, and the model holds it."""
        self._survives(self._loss(valley, lambda value, call: value * math.nan if call > 1 else value))

    def test_nothing_finite(self) -> None:
        """Without any finite loss the reason is `non_finite` (or an error, of a method that follows gradients)."""
        model = Model([-1.2, 1.0])
        before = model.bits()
        loss = self._loss(valley, lambda value, call: value * math.nan)
        try:
            with _quiet():
                result = self._minimize(loss, model, 400)
        except NonFiniteLoss:
            assert Need.GRADIENT in self.method.needs | self.method.uses, (
                "it follows no gradients: no error expected"
            )
        else:
            assert Need.GRADIENT not in self.method.needs, (
                "a method that needs gradients cannot begin at a nan"
            )
            assert result.reason is Reason.NON_FINITE, f"the reason is {result.reason}"
            assert result.best_loss == math.inf, f"the best loss is {result.best_loss}"
            assert result.loss == math.inf, f"the method's own loss is {result.loss}"
            assert not result.success, "it claims success"
        assert model.bits() == before, "the model does not hold its start again"

    def test_flat_loss(self) -> None:
        """A loss that is the same everywhere is no reason to fail or to go over the budget."""
        loss = self._loss(flat)
        model = Model([-1.2, 1.0])
        with _quiet():
            result = self._minimize(loss, model, 137)
        assert self._made(loss, result) <= 137, f"{loss.calls} evaluations with a budget of 137"
        assert result.best_loss == 3, f"the best loss is {result.best_loss}"

    def test_nothing_better_than_the_start(self) -> None:
        """The model ends with the best point evaluated: the start, if that was evaluated and is the optimum."""
        model = Model([0.5, 0.5])
        before = model.bits()
        run, rows = self._run(self.evaluations, loss=self._loss(bowl), model=model)
        self._finish(run)
        if rows.rows[0].x == torch.full((2,), 0.5, dtype=torch.float64).numpy().tobytes():
            assert model.bits() == before, "the start was the best point; the model holds another one"

    def test_loss_without_gradient(self) -> None:
        """A loss without a graph is minimised, or refused by `MissingGradient`."""
        model = Model([-1.0, 1.5, -0.5])
        loss = self._loss(bowl, lambda value, call: value.detach().numpy())
        start = self._value(bowl, model.x())
        try:
            with _quiet():
                result = self._minimize(loss, model, {"forward_equivalents": self.budget})
        except MissingGradient:
            assert Need.GRADIENT in self.method.needs | self.method.uses, (
                "it follows no gradients: no error expected"
            )
        else:
            assert Need.GRADIENT not in self.method.needs, "it needs gradients, and there were none"
            assert result.best_loss <= 0.1 * start, f"from {start} only down to {result.best_loss}"

    def test_weight_without_gradient(self) -> None:
        """A weight that the loss does not depend on does no harm."""
        model = Model([-1.0, 1.5, -0.5, 0.25])

        def spoil(value: Tensor, call: int) -> Tensor:
            return self._form(bowl)(model.a)

        with _quiet():
            result = self._minimize(self._loss(bowl, spoil), model, {"forward_equivalents": self.budget})
        assert result.best_loss <= 0.425, f"from 4.25 only down to {result.best_loss}"

    def test_exception_in_the_loss(self) -> None:
        """An exception of the loss comes out as the same object, and a retry continues the same path."""
        self._raises(ValueError("the loss cannot be computed here"))

    def test_interrupt_in_the_loss(self) -> None:
        """A KeyboardInterrupt comes out as the same object, and a retry continues the same path."""
        self._raises(KeyboardInterrupt())

    # -- manners ------------------------------------------------------------------------------------------------

    def test_closed(self) -> None:
        """A closed optimizer refuses to be asked, can be closed again, and can still be saved."""
        run, rows = self._run(self.evaluations)
        for _ in range(3):
            run.step()
        done = len(rows.rows)
        run.optimizer.close()
        run.optimizer.close()
        try:
            run.optimizer.ask()
        except ClosedError:
            pass
        else:
            raise AssertionError("a closed optimizer answered ask()")
        state = _through_a_file(run.state_dict())
        run.objective.close()
        whole, all_rows = self._run(self.evaluations)
        self._finish(whole)
        assert self._resume(state, self.evaluations) == all_rows.rows[done:], (
            "saved after close(), the path is another"
        )

    def test_ended(self) -> None:
        """A run that ended can be saved and loaded; it is still at its end."""
        first, begun = self._run(self.evaluations)
        self._finish(first)
        assert self._resume(_through_a_file(first.state_dict()), self.evaluations) == [], (
            "it went on after its end"
        )

    def test_leaves_the_caller_alone(self) -> None:
        """Gradients, modes and the global generators are as they were found."""
        model = Model([-1.0, 1.5, -0.5])
        model.eval()
        model.a.grad = torch.full_like(model.a, 3.0)
        grad = model.a.grad
        before = _generators()
        self._minimize(self._loss(bowl), model, self.evaluations)
        assert _generators() == before, "a global random generator has moved"
        assert model.a.grad is grad, "a weight's .grad is another tensor"
        assert bool((grad == 3).all()), "a weight's .grad was written"
        assert model.b.grad is None, "a weight's .grad was left behind"
        assert not model.training, "the model was left in training mode"
        vector = ParameterVector(Model([-1.0, 1.5, -0.5]), bounds=self._bounds())
        optimizer = self.method.start(vector, _SEED)
        optimizer.ask()  # nobody lends it generators here
        optimizer.close()
        assert _generators() == before, "the method itself moves a global random generator"

    def test_text_and_copies(self) -> None:
        """The method prints as text that reads back equal, and survives copying and pickling."""
        text = str(self.method)
        copies = [copy.deepcopy(self.method), pickle.loads(pickle.dumps(self.method))]
        if self.method.name in (*registry.names(), "chain", "stage", "torch"):
            copies.append(hybridopt.method(text))  # text stands for what is registered (by entry point)
        for again in copies:
            assert again == self.method, f"{text!r} became {again!r}"
            assert hash(again) == hash(self.method), f"{text!r}: equal, but not of equal hash"
            assert str(again) == text, f"{text!r} became {str(again)!r}"

    # -- how the tests run it -----------------------------------------------------------------------------------

    @property
    def _residuals(self) -> bool:
        return Need.RESIDUALS in self.method.needs

    def _made(self, loss: Loss, result: Result) -> int:
        """How many evaluations were made; a question about second derivatives calls the loss too, and is none."""
        if Need.HESSIAN not in self.method.uses:
            return loss.calls
        assert result.evaluations <= loss.calls <= result.forward, (
            f"{result.forward} forwards booked, {loss.calls} made"
        )
        return result.evaluations

    @property
    def _constrainable(self) -> bool:
        """Whether it can keep constraints: all its stages can."""
        return all(Need.CONSTRAINTS in part.uses for part in leaves(self.method) if not part.parts)

    def _form(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function as the method wants it."""
        return _RESIDUALS[function] if self._residuals else function

    def _loss(
        self, function: Callable[[Tensor], Tensor], spoil: Callable[[Tensor, int], Any] | None = None
    ) -> Loss:
        return Loss(function, spoil, self._residuals)

    def _value(self, function: Callable[[Tensor], Tensor], x: Tensor) -> float:
        """The loss at some weights, computed as the objective does."""
        told = self._form(function)(x)
        return (0.5 * (told * told).sum() if self._residuals else told).item()

    def _bounds(self) -> Any:
        if self.bounds is not None:
            return self.bounds
        return (-2.0, 2.0) if Need.BOUNDS in self.method.needs else None

    def _minimize(self, loss: Loss, model: Model, budget: Any) -> Result:
        # one by one: these losses count their calls
        return hybridopt.minimize(
            loss,
            model,
            self.method,
            budget=budget,
            bounds=self._bounds(),
            seed=_SEED,
            batch="loop",
            residuals=self._residuals,
        )

    def _lowers(self, function: Callable[[Tensor], Tensor], start: list[float]) -> None:
        model = Model(start)
        before = self._value(function, model.x())
        result = self._minimize(self._loss(function), model, {"forward_equivalents": self.budget})
        assert result.best_loss <= 0.1 * before, f"from {before} only down to {result.best_loss}: {result}"
        assert self._value(function, model.x()) == result.best_loss, "the model does not hold the best point"

    def _run(
        self,
        budget: Any,
        seed: int = _SEED,
        loss: Loss | None = None,
        model: Model | None = None,
        constraints: Any = None,
        integer: Any = None,
    ) -> tuple[Run, Rows]:
        run = Run(
            self._loss(valley) if loss is None else loss,
            Model([-1.2, 1.0]) if model is None else model,
            self.method,
            budget=budget,
            bounds=self._bounds(),
            seed=seed,
            batch="loop",
            residuals=self._residuals,
            constraints=constraints,
            integer=integer,
        )
        rows = Rows(run.objective.vector)
        run.objective.listeners.append(rows)
        return run, rows

    def _finish(self, run: Run) -> Step | None:
        """Run to the end; the last step."""
        last: Step | None = None
        with _quiet(), run:
            while (done := run.step()) is not None:
                last = done
        return last

    def _path(self, seed: int) -> list[Row]:
        run, rows = self._run(self.evaluations, seed)
        self._finish(run)
        assert rows.rows, "it made no evaluation"
        return rows.rows

    def _until_the_end(self, loss: Loss, budget: Mapping[str, Any]) -> tuple[Result, bool]:
        """The result, and whether the method ended by itself."""
        run, _ = self._run(budget, loss=loss)
        last = self._finish(run)
        return run.result(), last is not None and last.reason is not None

    def _record(self, budget: int) -> tuple[list[Row], list[tuple[int, bytes]]]:
        """The whole path, and the state between any two steps with the number of evaluations made by then."""
        run, rows = self._run(budget)
        saved = [(0, _save(run.state_dict()))]
        with run:
            for _ in run:
                saved.append((len(rows.rows), _save(run.state_dict())))
        return rows.rows, saved

    def _resume(self, state: Mapping[str, Any], budget: int) -> list[Row]:
        """The path of a run that starts elsewhere, with another seed, and loads the state."""
        run, rows = self._run(budget, _SEED + 1, model=Model([0.75, -0.25]))
        with run:
            run.load_state_dict(state)
            for _ in run:
                pass
        return rows.rows

    def _survives(self, loss: Loss) -> None:
        model = Model([-1.2, 1.0])
        run, rows = self._run(137, loss=loss, model=model)
        self._finish(run)
        result = run.result()
        assert self._made(loss, result) <= 137, f"{loss.calls} evaluations with a budget of 137"
        told = [float.fromhex(row.loss) for row in rows.rows]
        finite = [value for value in told if math.isfinite(value)]
        assert set(finite) <= set(loss.finite), "it was told what the loss did not say"
        assert result.best_loss == min(finite), f"best {result.best_loss}, the loss returned {min(finite)}"
        assert result.nonfinite == len(told) - len(finite), f"counted {result.nonfinite} of them"
        best = next(row for row in rows.rows if row.loss == result.best_loss.hex())
        assert model.x().detach().numpy().tobytes() == best.x, "the model does not hold the best point"

    def _raises(self, error: BaseException) -> None:
        whole, all_rows = self._run(self.evaluations)
        self._finish(whole)
        pending = {2, 3, 4, 9, 10, 23}

        def spoil(value: Tensor, call: int) -> Tensor:
            if pending and call >= min(pending):
                pending.remove(min(pending))
                raise error
            return value

        run, rows = self._run(self.evaluations, loss=self._loss(valley, spoil))
        raised: list[BaseException] = []
        while run.reason is None:
            try:
                run.step()
            except type(error) as caught:
                raised.append(caught)
        run.finish()
        assert raised, "the exception did not come out"
        assert all(caught is error for caught in raised), "another exception came out"
        assert rows.rows == all_rows.rows, "after a retry the path is another one"


# -- helpers ----------------------------------------------------------------------------------------------------


def _step_until_stop(optimizer: Any, objective: Objective) -> Reason | None:
    """Step until the budget stops it (None) or it ends (why)."""
    while True:
        try:
            done = step(optimizer, objective)
        except Stop:
            return None
        if done.reason is not None:
            return done.reason


def _some(saved: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """All of the first 25, then every seventh, and the last two."""
    chosen = {
        *range(min(25, len(saved))),
        *range(25, len(saved), 7),
        *range(max(len(saved) - 2, 0), len(saved)),
    }
    return [saved[i] for i in sorted(chosen)]


def _save(state: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _through_a_file(state: Mapping[str, Any]) -> Any:
    return torch.load(io.BytesIO(_save(state)), weights_only=True)


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def _generators() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return (
        random.getstate(),
        name,
        np.asarray(keys).tobytes(),
        tuple(rest),
        torch.get_rng_state().numpy().tobytes(),
    )


def _scramble_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that losses such as these rightly cause."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
