"""`auto`: the method for those who do not want to choose one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridopt.errors import MethodError
from hybridopt.objective import Objective
from hybridopt.optimizer import HandOver, Method, Need, Optimizer
from hybridopt.text import method
from hybridopt.vector import ParameterVector

DENSE = 300  # weights up to which methods of n² memory are used
MODELLED = 40  # weights up to which CMA-ES is worth a model
MANY = 20_000  # weights from which a quasi-Newton method's own vectors are too dear


@dataclass(frozen=True)
class Auto(Method):
    """Chooses methods by what is known of the problem, and gives the evaluations to those that work.

    What it looks at: the number of weights, bounds, constraints, whether the loss is a sum of known residuals, whether
    autograd could see the weights, and whether only time limits the run. What it cannot know before is found out on
    the way: SLSQP and L-BFGS-B test the gradient at their start and use differences where it is wrong; the first
    evaluation shows noise. What it chose and why is in `Result.notes`, and `Result.stages` shows what each part did.

    - constraints: SLSQP begun again;
    - residuals: least squares (Levenberg-Marquardt, or TRF within bounds), begun again from perturbed best points
      until the loss is 0;
    - hyperparameters (`tune`): Bayesian optimisation;
    - whole-numbered weights: CMA-ES with margin, and restarts;
    - gradients without a box, or above 300 weights: SLSQP (L-BFGS-B above 300 weights) begun again; above 20 000
      weights Adam. A loss that autograd might have seen through but that counts or rounds is found out by its first
      differences, half of which are 0 (above 300 weights by its first gradient): then CMA-ES. Above 20 000 weights it
      is an error that names what to do;
    - a box, with gradients or without: n + 2 evaluations tell whether the loss is a sum of functions of one weight;
      if so, line searches along the coordinates find its minimum. Else a portfolio: SLSQP from the start, then from
      random points, beside CMA-ES with a quadratic model (`lq_cmaes`) and restarts, the turns going to whoever lowers
      the loss. Above 40 weights CMA-ES without a model, above 300 with a diagonal or a limited memory;
    - noise: where the first evaluation drew random numbers, CMA-ES from its start instead, which names the point that
      wins a comparison under common random numbers; above 300 weights, where the loss has gradients, name `adam`. A
      generator of the loss's own goes unseen: then pass `keep="last"`. Nothing is changed for residuals or constraints;
    - a budget of time alone, where populations may be evaluated in one forward: CMA-ES without a model, whose whole
      generations then cost about what one point does. Any other budget counts evaluations, batched or not.

    `auto` is a whole run's method: what it chooses from is known only where the loss is, so it cannot be a part of
    another method. Measured on the 24 BBOB functions and others, `benchmarks/answer_quality.py`.

    Example:
        >>> import numpy as np, hybridopt
        >>> def loss(x):
        ...     return float((x**2 - 10 * np.cos(2 * np.pi * x) + 10).sum())
        >>> r = hybridopt.minimize(loss, np.full(2, 3.2), "auto", budget=2000, bounds=(-5, 5), seed=0)
        >>> r.best_loss < 1e-6, r.notes[-1][:36]
        (True, 'auto chose line searches along the c')
    """

    name: ClassVar[str] = "auto"
    uses: ClassVar[frozenset[Need]] = frozenset(
        {Need.BOUNDS, Need.GRADIENT, Need.POPULATION, Need.CONSTRAINTS, Need.RESIDUALS}
    )

    def fitted(self, objective: Objective) -> tuple[Method, list[str]]:
        """See `Method.fitted`: the methods chosen, and the line that says so."""
        text, why = choose(objective)
        return method(text), [f"auto chose {why}: {text}"]

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """It cannot: see `fitted`."""
        raise MethodError(
            "auto: expected to be the whole method of a run, which tells it of the loss; as a part of another method "
            "name what should run, e.g. what its note says it chose"
        )


def choose(objective: Objective) -> tuple[str, str]:
    """The methods for an objective as text, and why."""
    vector = objective.vector
    n, boxed = vector.n, _boxed(vector)
    again = "begin_at=uniform" if boxed else "begin_at=perturb"
    places = "random points" if boxed else "perturbed best points"
    if objective.constraints is not None:
        return f"restart(slsqp, {again})", f"scipy.slsqp from {places}, since it keeps constraints"
    if objective.residuals is not None:
        return "restart(least_squares, target=0)", "least squares, since the residuals are known"
    if objective.dear and boxed:
        return "bayes(popsize=4)", "bayes, since each evaluation is a training run"
    if vector.integer is not None:
        search = "cmaes(restarts=bipop)" if n <= DENSE else _of_linear_memory(n)
        return (
            f"{search} until noise > cmaes",
            "cmaes, since some weights are whole numbers, where differences see nothing",
        )
    gradients = objective.differentiable
    if gradients and n > MANY:
        return "adam", f"adam, since {n} weights have gradients"
    if gradients and n > DENSE:
        return (
            f"restart(lbfgsb) until noise | no_gradient > {_of_linear_memory(n)}",
            "scipy.lbfgsb from perturbed best points, since there may be gradients; without them, and with noise, "
            "cmaes of O(n) memory",
        )
    if gradients and not boxed:
        return (
            "(restart(slsqp, begin_at=uniform, evaluations=50%) > restart(slsqp)) until noise | flat > cmaes",
            "scipy.slsqp from points about the start, then from perturbed best ones, since there may be gradients; "
            "with noise, and where the loss has steps, cmaes",
        )
    if n > DENSE:
        return _of_linear_memory(n), f"cmaes of O(n) memory, since {n} weights have no gradients"
    batched = not objective.ledger.budget.limits.keys() - {"seconds"} and objective.batchable
    search = "cmaes" if n > MODELLED or batched else "lq_cmaes"
    local = f"restart(slsqp(ftol=1e-11), {again})" if boxed else "restart(slsqp(ftol=1e-11))"
    shared = f"portfolio({local}, {search}(restarts=bipop, handover=point)) until noise"
    because = f"there {'may be' if gradients else 'are no'} gradients"
    if batched:
        because += ", and only time limits the run, in which one forward may take a population"
    if not boxed:
        return (
            f"{shared} > cmaes",
            f"scipy.slsqp with differences and {search} side by side, since {because}; with noise cmaes",
        )
    return (
        f"coordinate_search(separable=true) until noise > {shared} > cmaes",
        f"line searches along the coordinates if the loss is a sum over them, else scipy.slsqp from {places} and "
        f"{search} side by side, since {because} and {n} weights have a box; with noise cmaes",
    )


def _of_linear_memory(n: int) -> str:
    return f"cmaes(covariance={'separable' if n <= MANY else 'limited'})"


def _boxed(vector: ParameterVector) -> bool:
    return bool(np.isfinite(vector.lower).all() and np.isfinite(vector.upper).all())
