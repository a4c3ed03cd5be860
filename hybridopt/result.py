"""What a run returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridopt.ledger import Reason
from hybridopt.optimizer import StageReport
from hybridopt.vector import FloatArray


@dataclass(frozen=True, eq=False)
class Result:
    """The outcome of a run; a value that nothing changes afterwards.

    Printed it is one line, with what the best point breaks of the constraints and the kept point's score where there
    are such: `slsqp: best loss 2 (own 2.5) in 90 evaluations, ...`. *Own* is `loss`, at the point the method returns.

    Attributes:
        method: as text; `hybridopt.method` reads it back.
        seed: the one given, or the one that was drawn.
        params: the kept weights by name, copies in their own dtype and device; the model holds the same.
        loss: at the point that the method itself returns (never a difference probe). In-place torch methods: the last
            loss, evaluated just before the last update.
        best_loss: the lowest loss evaluated, probes included; inf if none was finite.
        best_evaluation: number of the evaluation that had it, from 1; 0 if none.
        reason: what ended the run.
        message: the method's own words, or the sentence of the reason.
        evaluations: of the loss; difference probes, checks and scores count.
        forward, backward: how many of each were computed.
        forward_equivalents: what they cost; a forward counts 1, a backward 2 (`backward_cost` of `Objective`).
        seconds: by the clock, since the first evaluation was asked for; those of resumed runs are added.
        nonfinite: evaluations whose loss was nan or inf.
        stochastic: whether the loss was seen to draw random numbers: `params` is then where the method stood at the
            end.
        steps: that the run took, of one point or one generation each.
        score: of the kept weights, by the function that chose them (`Objective`); None = none did.
        violation: by how much the best point breaks the constraints; 0 = it keeps them all, within their tolerance.
        stages: of a composition: what each of its stages or members did; empty for a single method.
        notes: what the user should know: a refused gradient, a restart.
    """

    method: str
    seed: int
    params: Mapping[str, Tensor] = field(repr=False)
    loss: float
    best_loss: float
    best_evaluation: int
    reason: Reason
    message: str
    evaluations: int
    forward: int
    backward: int
    forward_equivalents: float
    seconds: float
    nonfinite: int
    stochastic: bool
    steps: int
    score: float | None = None
    violation: float = 0.0
    stages: tuple[StageReport, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def x(self) -> FloatArray:
        """The kept weights, flat: shape (n,), float64."""
        return np.concatenate(
            [p.detach().reshape(-1).to("cpu", torch.float64).numpy() for p in self.params.values()]
            or [np.empty(0)]
        )

    @property
    def success(self) -> bool:
        """Whether a finite loss was seen where the constraints are kept, and nothing failed."""
        finite = math.isfinite(self.best_loss) and self.violation == 0
        return finite and self.reason not in (Reason.FAILED, Reason.NON_FINITE)

    def to_dict(self) -> dict[str, Any]:
        """The record without the weights, as plain numbers and text."""
        return {
            "method": self.method,
            "seed": self.seed,
            "loss": self.loss,
            "best_loss": self.best_loss,
            "violation": self.violation,
            "score": self.score,
            "evaluations": self.evaluations,
            "forward": self.forward,
            "backward": self.backward,
            "forward_equivalents": self.forward_equivalents,
            "seconds": self.seconds,
            "reason": self.reason.value,
            "message": self.message,
        }

    def __str__(self) -> str:
        broken = f", which breaks the constraints by {self.violation:.3g}," if self.violation > 0 else ""
        scored = "" if self.score is None else f", score {self.score:.8g} of the kept point,"
        found = f"best loss {self.best_loss:.8g} (own {self.loss:.8g}){broken}{scored}"
        spent = f"{self.evaluations} evaluations, {self.forward_equivalents:g} forward-equivalents"
        return f"{self.method}: {found} in {spent}, {self.seconds:.3g} s; {self.message}"
