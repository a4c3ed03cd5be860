"""What every method does on its way: it lowers losses, walks the same path again, keeps its budget."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import torch

from hybridopt.harness import Run
from hybridopt.ledger import Budget
from hybridopt.objective import Objective
from hybridopt.optimizer import Need
from hybridopt.testing._driver import (
    SEED,
    Driver,
    save,
    scramble_generators,
    some,
    step_until_stop,
    through_a_file,
)
from hybridopt.testing._losses import Heard, Model, Rows, batched_valley, bowl, valley


class Paths(Driver):
    """Losses, seeds, states and budgets."""

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
        scramble_generators(1)
        first = self._path(SEED)
        scramble_generators(2)
        assert self._path(SEED) == first, "the same seed took another path"

    def test_other_seed_other_path(self) -> None:
        """Another seed takes another path if the method is random, and the same one if it says it is not."""
        if self.random is None:
            return
        different = self._path(SEED) != self._path(SEED + 1)
        assert different == self.random, (
            "two seeds took the same path; is it random at all?"
            if self.random
            else "two seeds took two paths, but random = False"
        )

    def test_state_saved_between_any_two_steps(self) -> None:
        """A state saved after any step, as a file, and loaded into a new run gives the rest of the path bit for bit."""
        whole, saved = self._record(self.evaluations)
        for done, state in some(saved):
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
                batched_valley,
                Model([-1.2, 1.0]),
                self.method,
                budget=self.evaluations,
                bounds=self._bounds(),
                seed=SEED,
            )
            heard = Heard()
            run.objective.listeners.append(heard)
            return run, heard

        whole, losses = begin()
        saved = [(0, save(whole.state_dict()))]
        with whole:
            for _ in whole:
                saved.append((len(losses.heard), save(whole.state_dict())))
        result = whole.result()
        assert result.evaluations == len(losses.heard) <= self.evaluations, "the budget was passed"
        for done, state in some(saved)[::3]:
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
            rest = self._resume(through_a_file(first.state_dict()), self.evaluations)
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
            seed=SEED,
            batch="loop",
            residuals=self._residuals,
        )
        seen = Rows(objective.vector)
        objective.listeners.append(seen)
        optimizer = self.method.start(objective.vector, SEED)
        with objective:
            for budget in (*range(1, self.evaluations, 5), self.evaluations):
                objective.ledger.limit(Budget(evaluations=budget))
                if step_until_stop(optimizer, objective) is not None:
                    break
            optimizer.close()
        assert seen.rows == rows.rows, "with a budget raised in place the path is another one"
