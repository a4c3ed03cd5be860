"""What every method does where not every point may be evaluated."""

from __future__ import annotations

import io

import numpy as np
import torch

from hybridopt.errors import MethodError
from hybridopt.optimizer import Need, Step
from hybridopt.testing._driver import SEED, Driver, quiet, save, some
from hybridopt.testing._losses import Disc, Model, valley


class Restrictions(Driver):
    """Constraints and whole numbers."""

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
        saved = [(0, save(run.state_dict()))]
        with run:
            for _ in run:
                saved.append((len(rows.rows), save(run.state_dict())))
        spent = run.result().forward
        for done, state in some(saved)[::4]:
            again, rest = self._run(
                self.evaluations, SEED + 1, model=Model([0.75, -0.25]), constraints=Disc().constraint()
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
            saved = [(0, save(run.state_dict()))]
            with quiet(), run:
                while (step_ := run.step()) is not None:
                    last = step_
                    saved.append((len(rows.rows), save(run.state_dict())))
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
        for done, state in some(saved)[::4]:
            begun, rest = self._run(self.evaluations, SEED + 1, model=Model([0.75, -0.25]), integer="a")
            begun.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
            self._finish(begun)
            assert rest.rows == rows.rows[done:], f"resumed after evaluation {done}, the path is another one"
