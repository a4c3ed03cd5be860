"""How the contract's tests run a method."""

from __future__ import annotations

import io
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import hybridopt
from hybridopt.errors import Stop
from hybridopt.harness import Run
from hybridopt.ledger import Reason
from hybridopt.objective import Objective
from hybridopt.optimizer import Method, Need, Step, leaves, step
from hybridopt.result import Result
from hybridopt.testing._losses import RESIDUALS, Loss, Model, Row, Rows, valley

SEED = 7


class Driver:
    """A method under test and its runs; `OptimizerContract` says what the attributes are."""

    method: ClassVar[Method]
    bounds: ClassVar[Any] = None
    budget: ClassVar[float] = 4000.0
    random: ClassVar[bool | None] = None
    evaluations: ClassVar[int] = 60

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
        return RESIDUALS[function] if self._residuals else function

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
            seed=SEED,
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
        seed: int = SEED,
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
        with quiet(), run:
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
        saved = [(0, save(run.state_dict()))]
        with run:
            for _ in run:
                saved.append((len(rows.rows), save(run.state_dict())))
        return rows.rows, saved

    def _resume(self, state: Mapping[str, Any], budget: int) -> list[Row]:
        """The path of a run that starts elsewhere, with another seed, and loads the state."""
        run, rows = self._run(budget, SEED + 1, model=Model([0.75, -0.25]))
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


def step_until_stop(optimizer: Any, objective: Objective) -> Reason | None:
    """Step until the budget stops it (None) or it ends (why)."""
    while True:
        try:
            done = step(optimizer, objective)
        except Stop:
            return None
        if done.reason is not None:
            return done.reason


def some(saved: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """All of the first 25, then every seventh, and the last two."""
    chosen = {
        *range(min(25, len(saved))),
        *range(25, len(saved), 7),
        *range(max(len(saved) - 2, 0), len(saved)),
    }
    return [saved[i] for i in sorted(chosen)]


def save(state: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def through_a_file(state: Mapping[str, Any]) -> Any:
    return torch.load(io.BytesIO(save(state)), weights_only=True)


def generators() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return (
        random.getstate(),
        name,
        np.asarray(keys).tobytes(),
        tuple(rest),
        torch.get_rng_state().numpy().tobytes(),
    )


def scramble_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that losses such as these rightly cause."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
