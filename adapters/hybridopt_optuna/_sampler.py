"""Any gradient-free method as an Optuna sampler: the study's trials are the answers to its questions."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from hybridopt import randomness
from hybridopt.errors import MethodError, ObjectiveError, Stop
from hybridopt.objective import Objective
from hybridopt.optimizer import Kind, Method, Need, Optimizer, Request, leaves
from hybridopt.randomness import derive_seed
from hybridopt.space import Categorical, Float, Int, Parameter, Space, Value, _counts
from hybridopt.text import method as read_method

FloatArray: TypeAlias = npt.NDArray[np.float64]
POINT = "hybridopt:point"  # of a trial: which search it serves, and which of its points it tries
SEED = "hybridopt:seed"  # of a study whose sampler was given none
_ONE = (Kind.VALUE, Kind.VALUE_AND_GRADIENT)
_CANNOT = (Need.GRADIENT, Need.RESIDUALS, Need.HESSIAN)


class HybridSampler(BaseSampler):
    """Searches an Optuna study with any method or composition that needs no gradients.

    Use it where the study, its storage, dashboard and pruners are Optuna's; without a study `hybridopt.tune` is
    simpler. The method asks for a generation at a time, and its points are handed to trials in turn; when the last of
    them has ended it is told their losses. Where more trials run at once than a generation has points left, the spare
    ones mix the coordinates of its points; they count in the study, but the method is not told of them. A pruned trial
    is told with its last intermediate value, a failed one (or a pruned one without) as rejected. When the method ends
    before the study does, it begins again at a random point with another seed.

    Nothing but the trials is stored: each carries the number of the point that it tries, and a sampler in a new process
    tells its method the recorded losses again, so that the search goes on exactly there. Several processes may work on
    one study if they give the same seed (or none, and begin one after the other). Trials that were running when a
    process met the study may be dead: their points are tried again, once nothing else is left of the generation.

    Args:
        space: the parameters, with their conditions; None (default) = those that all completed trials have in common,
            so that the first trial is random. Parameters outside it, and those whose condition does not hold at a
            point, are drawn uniformly.
        method: text or a `Method`. One that asks for whole populations is what parallel trials need.
        seed: None = drawn and kept in the study.
        budget: number of trials in view, for methods that share it out (`auto`, `pso(evaluations=30%) > cmaes`); the
            method ends when it is spent.

    Raises:
        MethodError: the method needs gradients or residuals.
        ObjectiveError: (in a trial) the study has several objectives, or suggests a parameter from another range than
            `space` says.

    Example:
        >>> import math, optuna
        >>> from hybridopt_optuna import HybridSampler
        >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
        >>> def train(trial):
        ...     lr = trial.suggest_float("lr", 1e-4, 1, log=True)
        ...     return (math.log10(lr) + 2) ** 2
        >>> study = optuna.create_study(sampler=HybridSampler(method="cmaes", seed=0))
        >>> study.optimize(train, n_trials=40)
        >>> round(study.best_params["lr"], 2)
        0.01
    """

    def __init__(
        self,
        space: Space | None = None,
        method: str | type | Method = "cmaes",
        *,
        seed: int | None = None,
        budget: Any = None,
    ) -> None:
        if space is not None and not isinstance(space, Space):
            raise ObjectiveError(
                f"HybridSampler: expected a Space or None, got {type(space).__name__}; see hybridopt.space"
            )
        self.space = space
        self.method = read_method(method)
        for part in leaves(self.method):
            lacking = [need.value for need in _CANNOT if need in part.needs]
            if lacking and not part.parts:
                raise MethodError(
                    f"HybridSampler: {part.label} needs more of a trial than its value ({lacking[0]}); use a method "
                    "that does not, e.g. cmaes"
                )
        self.seed = seed
        self.budget = budget
        self._given = None if space is None else {n: _distribution(p) for n, p in space.parameters.items()}
        self._lock = threading.RLock()
        self._search: _Search | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles find the search again in the study."""
        return self.__dict__ | {"_lock": None, "_search": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    # -- Optuna's protocol --------------------------------------------------------------------------------------

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that the method searches."""
        if self._given is not None:
            return dict(self._given)
        common = intersection_search_space(_trials(study))
        return {name: distribution for name, distribution in common.items() if not distribution.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point of the method, as values."""
        if len(study.directions) > 1:
            raise ObjectiveError(
                f"HybridSampler: expected a study with one objective, got {len(study.directions)}"
            )
        if not search_space:
            return {}
        with self._lock:
            search = self._find(study, search_space)
            number, x = search.point(_trials(study), study.direction, trial.number)
            if number is not None:
                # before the lock is given up: the next trial must see that this point is taken
                study._storage.set_trial_system_attr(trial._trial_id, POINT, [search.key, number])
        return search.codec.values(x)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that the method does not search in this trial: uniform."""
        given = self._given or {}
        if given.get(param_name, param_distribution) != param_distribution:
            raise ObjectiveError(
                f"HybridSampler: {param_name!r}: expected the trial to suggest it from {given[param_name]}, as the "
                f"space says, got {param_distribution}; see hybridopt_optuna.suggest"
            )
        codec = _Codec({param_name: param_distribution})
        seed = derive_seed(self._study_seed(study), "independent", param_name, trial.number)
        return codec.values(codec.space.sample(np.random.default_rng(seed)))[param_name]

    # -- inside -------------------------------------------------------------------------------------------------

    def _study_seed(self, study: Study) -> int:
        if self.seed is not None:
            return self.seed
        with self._lock:
            known = study._storage.get_study_system_attrs(study._study_id).get(SEED)
            if known is None:
                known = randomness.draw_seed()
                study._storage.set_study_system_attr(study._study_id, SEED, known)
            return int(known)

    def _find(self, study: Study, search_space: dict[str, BaseDistribution]) -> _Search:
        """The search over these parameters: the one at work, or a new one that the study's trials bring up to date."""
        seed = self._study_seed(study)
        said = [str(self.method), seed, self.budget, None if self.space is None else self.space.describe()]
        said += [(name, distribution_to_json(d)) for name, d in search_space.items()]
        key = hashlib.blake2b(repr(said).encode(), digest_size=8).hexdigest()
        if self._search is None or (self._search.study, self._search.key) != (study.study_name, key):
            codec = _Codec(search_space, self.space)
            self._search = _Search(study.study_name, key, codec, self.method, seed, self.budget)
        return self._search


def suggest(trial: Trial, space: Space) -> dict[str, Value]:
    """Suggest every parameter of a space that counts, in an Optuna trial with any sampler.

    Example:
        >>> import optuna
        >>> from hybridopt import Categorical, Int, Space
        >>> from hybridopt_optuna import suggest
        >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
        >>> space = Space({"act": Categorical(["relu", "tanh"]), "width": Int(2, 9, when=("act", "tanh"))})
        >>> trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)).ask()
        >>> suggest(trial, space)
        {'act': 'tanh', 'width': 2}
    """
    found: dict[str, Value] = {}
    for name, parameter in space.parameters.items():
        if _counts(parameter, found):
            found[name] = trial._suggest(name, _distribution(parameter))
    return found


class _Search:
    """A method at work on the parameters of one study, told by its trials."""

    def __init__(self, study: str, key: str, codec: _Codec, method: Method, seed: int, budget: Any) -> None:
        self.study, self.key, self.codec = study, key, codec
        self._method, self._seed, self._budget = method, seed, budget
        self._told = 0  # points whose losses the method knows: the number of the first one of `_rows`
        self._rows: FloatArray
        self._runs = 0
        self._dead: frozenset[int] | None = None  # trials that may be: running when this process met them
        self._begin()
        self._advance([])

    def point(
        self, trials: Sequence[FrozenTrial], direction: StudyDirection, asking: int
    ) -> tuple[int | None, FloatArray]:
        """The number of the point for a new trial, None if it is a spare one, and the point itself.

        Args:
            trials: all of the study.
            direction: of the study.
            asking: the new trial's number.
        """
        serving: dict[int, list[FrozenTrial]] = {}
        for trial in trials:
            key, number = trial.system_attrs.get(POINT, (None, 0))
            if key == self.key and number >= self._told:
                serving.setdefault(number, []).append(trial)
        if self._dead is None:
            self._dead = frozenset(number for tries in serving.values() for number in _running(tries))
        sign = -1.0 if direction is StudyDirection.MAXIMIZE else 1.0
        while True:
            numbers = range(self._told, self._told + len(self._rows))
            losses = [
                _loss(serving.get(number, ()), self.codec.values(row), sign)
                for number, row in zip(numbers, self._rows, strict=True)
            ]
            known = [loss for loss in losses if loss is not None]
            if len(known) < len(losses):
                break
            self._told += len(known)
            self._advance(known)
        for waiting_for in (frozenset(), self._dead):
            for number, row, loss in zip(numbers, self._rows, losses, strict=True):
                if loss is None and _running(serving.get(number, ())) <= waiting_for:
                    return number, row
        return None, self._spare(asking)

    def _spare(self, asking: int) -> FloatArray:
        """Coordinates of the generation's points, mixed; of a single one there is nothing to mix."""
        rng = np.random.default_rng(derive_seed(self._seed, "spare", asking))
        if len(self._rows) == 1:
            return self.codec.space.sample(rng)
        n = self._rows.shape[1]
        mixed: FloatArray = self._rows[rng.integers(len(self._rows), size=n), np.arange(n)]
        return mixed

    def _begin(self) -> None:
        """Begin a run of the method: the first at the middle of the space with the seed itself, as `tune` does."""
        seed = self._seed if self._runs == 0 else derive_seed(self._seed, "run", self._runs)
        self._vector = self.codec.space.vector()
        if self._runs:
            self._vector.write(self.codec.space.sample(np.random.default_rng(seed)))
        self._runs += 1
        self._state: dict[str, Any] | None = None
        with _Known(self._vector, self._budget, []) as objective:
            fitted, _ = self._method.fitted(objective)
            self._optimizer: Optimizer = fitted.start(self._vector, seed)

    def _advance(self, losses: list[float]) -> None:
        """Tell the losses of all `_rows`, and go on to the next points that the method wants to know of."""
        while True:
            # an objective holds the global generators, so none stays open while trials are running
            objective = _Known(self._vector, self._budget, losses)
            with objective:
                if self._state is not None:
                    objective.load_state_dict(self._state)
                ended = self._ask(objective)
                self._state = objective.state_dict()
            if not ended:
                return
            losses = []
            self._optimizer.close()
            self._begin()

    def _ask(self, objective: _Known) -> bool:
        """Answer what is known; whether the method has ended, else `_rows` is what it wants to know."""
        while True:
            request = self._optimizer.ask()
            rows = _points(objective, request)
            if len(rows) > len(objective.known):
                self._rows = self._vector.decode(rows)
                return False
            try:
                step = self._optimizer.tell(objective.answer(request))
            except Stop:
                return True
            objective.known.clear()  # of a generation that a limit in seconds has cut short
            if step is not None and step.reason is not None:
                return True


class _Known(Objective):
    """Answers from a list of losses, in the order of the questions."""

    def __init__(self, vector: Any, budget: Any, known: list[float]) -> None:
        self.known = known
        super().__init__(lambda params: self.known.pop(0), vector, budget, batch="loop", keep="best")

    @property
    def differentiable(self) -> bool:
        """Trials have no gradients."""
        return False


def _points(objective: _Known, request: Request) -> FloatArray:
    """The points whose losses the answer to a request takes, shape (k, n), in solver coordinates."""
    if request.x is None or request.kind not in (*_ONE, Kind.POPULATION):
        return np.empty((0, objective.vector.n))  # a derivative, which is said to be missing
    rows = np.atleast_2d(request.x)
    ledgers = (objective.ledger, *request.scopes)
    for depth, scope in enumerate(request.scopes, start=1):
        if scope.shares:  # of a stage that has not begun: no trials beyond its limit
            scope.resolve(ledgers[:depth])
    left = min(
        min(led.max_evaluations - led.evaluations, led.max_equivalents - led.forward) for led in ledgers
    )
    return rows[: int(max(0, min(left, len(rows))))]


def _trials(study: Study) -> list[FrozenTrial]:
    """All trials, those of other brackets of a Hyperband pruner included."""
    return study._storage.get_all_trials(study._study_id, deepcopy=False)


def _running(trials: Sequence[FrozenTrial]) -> frozenset[int]:
    """The numbers of those that have not ended."""
    return frozenset(t.number for t in trials if t.state is TrialState.RUNNING)


def _loss(trials: Sequence[FrozenTrial], values: Mapping[str, Any], sign: float) -> float | None:
    """What the method is told of a point: nan to reject it, None if no trial has tried it yet.

    Trials whose parameters are others (because they were enqueued with fixed ones) have not tried it. Of several the
    first to end counts, so that a search told again later is told the same.
    """
    tried = [
        t
        for t in trials
        if t.state.is_finished() and all(values.get(name, v) == v for name, v in t.params.items())
    ]
    if not tried:
        return None
    first = min(tried, key=lambda t: (t.datetime_complete, t.number))
    return math.nan if first.values is None else sign * first.values[0]


# -- parameters there and here -----------------------------------------------------------------------------------


class _Codec:
    """Optuna's parameters as a space, and its points as their values."""

    def __init__(self, distributions: Mapping[str, BaseDistribution], given: Space | None = None) -> None:
        self._distributions = dict(distributions)
        self._given = given
        # by position: Optuna's names may hold any character
        self.space = given or Space({str(i): _parameter(d) for i, d in enumerate(distributions.values())})

    def values(self, x: FloatArray) -> dict[str, Any]:
        """The values, for Optuna, of those parameters that count at a point."""
        found = self.space.values(x)
        if self._given is not None:
            return found
        return {name: _value(d, found[str(i)]) for i, (name, d) in enumerate(self._distributions.items())}


def _parameter(distribution: BaseDistribution) -> Parameter:
    """Our form of a distribution; where it goes in steps, and of choices, the number of the step or choice."""
    if isinstance(distribution, CategoricalDistribution):
        return Categorical(range(len(distribution.choices)))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, log = distribution.low, distribution.high, distribution.log
    if distribution.step is None:
        return Float(low, high, log)
    if log:
        return Int(int(low), int(high), log=True)
    return Int(0, round((high - low) / distribution.step))


def _value(distribution: BaseDistribution, number: Any) -> Any:
    """The other way round."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[number]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.step is None or distribution.log:
        return number
    return min(distribution.low + number * distribution.step, distribution.high)


def _distribution(parameter: Parameter) -> BaseDistribution:
    """Optuna's form of a parameter."""
    if isinstance(parameter, Categorical):
        return CategoricalDistribution(parameter.choices)
    if isinstance(parameter, Int):
        return IntDistribution(parameter.low, parameter.high, parameter.log)
    return FloatDistribution(parameter.low, parameter.high, parameter.log)
