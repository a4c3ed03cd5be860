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
    """

    method: str
    """The method as text; `hybridopt.method` reads it back."""
    seed: int
    params: Mapping[str, Tensor] = field(repr=False)
    """The kept weights by name, copies in their own dtype and device; the model holds the same."""
    loss: float
    """At the point that the method itself returns (never a difference probe). In-place torch methods: the last
    loss, evaluated just before the last update."""
    best_loss: float
    """The lowest loss evaluated, probes included; inf if none was finite."""
    best_evaluation: int
    """Number of the evaluation that had it, from 1; 0 if none."""
    reason: Reason
    message: str
    """The method's own words, or the sentence of the reason."""
    evaluations: int
    forward: int
    backward: int
    forward_equivalents: float
    seconds: float
    nonfinite: int
    """Evaluations whose loss was nan or inf."""
    stochastic: bool
    """Whether the loss was seen to draw random numbers: `params` is then where the method stood at the end."""
    steps: int
    score: float | None = None
    """Of the kept weights, by the function that chose them (`Objective`); None = none did."""
    violation: float = 0.0
    """By how much the best point breaks the constraints; 0 = it keeps them all, within their tolerance."""
    stages: tuple[StageReport, ...] = ()
    """A chain's stages; empty for a single method."""
    notes: tuple[str, ...] = ()
    """What the user should know: a refused gradient, a restart."""

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
