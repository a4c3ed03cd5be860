"""The bridge to Optuna: our methods as its sampler, its samplers as our methods."""

from __future__ import annotations

import logging
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import tune
from hybridopt.errors import BoundsError, MethodError, ObjectiveError
from hybridopt.space import Categorical, Float, Int, Space
from hybridopt.testing import OptimizerContract

optuna = pytest.importorskip("optuna")

from hybridopt_optuna import TPE, HybridSampler, OptunaCMAES, suggest  # noqa: E402

SPACE = Space(
    {
        "lr": Float(1e-4, 1, log=True),
        "width": Int(2, 40),
        "optimizer": Categorical(["sgd", "adam"]),
        "momentum": Float(0, 0.99, when=("optimizer", "sgd")),
    }
)
EIGHT = "pso(swarmsize=8)"
Params = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    yield
    optuna.logging.set_verbosity(level)


def bowl(config: dict[str, Any]) -> float:
    value = (math.log10(config["lr"]) + 2) ** 2 + ((config["width"] - 20) / 20) ** 2
    return float(value + (1.0 if config["optimizer"] == "adam" else 0.01 + (config["momentum"] - 0.9) ** 2))


def objective(trial: Any) -> float:
    return bowl(suggest(trial, SPACE))


def study_of(sampler: Any, **options: Any) -> Any:
    return optuna.create_study(sampler=sampler, **options)


def params(study: Any) -> Params:
    return [trial.params for trial in study.trials]


def by_tune(method: str, trials: int, train: Callable[..., float] = bowl) -> Params:
    return [dict(t.config) for t in tune(train, SPACE, method, trials, seed=3).trials]


def by_study(trials: int, method: str = EIGHT) -> Params:
    study = study_of(HybridSampler(SPACE, method, seed=3))
    study.optimize(objective, trials)
    return params(study)


# -- our methods as a sampler ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        EIGHT,
        "de",
        "cmaes(popsize=8)",
        "random_search",
        "nelder_mead",
        "race(cmaes, pso)",
        "pso(evaluations=13) > cmaes",
        "slsqp",
    ],
)
def test_a_study_walks_the_path_of_tune(method: str) -> None:
    expected = by_tune(method, 45)
    assert len(expected) > 25
    assert by_study(45, method)[: len(expected)] == expected


def test_order_of_telling_does_not_matter() -> None:
    study = study_of(HybridSampler(SPACE, EIGHT, seed=3))
    for _ in range(4):
        trials = [study.ask() for _ in range(8)]
        losses = [objective(trial) for trial in trials]
        for trial, loss in reversed(list(zip(trials, losses, strict=True))):
            study.tell(trial, loss)
    assert params(study) == by_study(32)


def test_spare_trials_change_nothing() -> None:
    """Eleven at a time of generations of eight: three mix the others' coordinates, and nobody is told of them."""
    study = study_of(HybridSampler(SPACE, EIGHT, seed=3))
    spare: list[Any] = []
    for _ in range(3):
        trials = [study.ask() for _ in range(11)]
        losses = [objective(trial) for trial in trials]
        for trial, loss in zip(trials, losses, strict=True):
            study.tell(trial, loss)
        spare += trials[8:]
    extra = {trial.number for trial in spare}
    assert [t.params for t in study.trials if t.number not in extra] == by_study(24)
    for trial in spare:
        others = study.trials[trial.number - trial.number % 11 :][:8]
        assert trial.params["lr"] in [t.params["lr"] for t in others]
        assert trial.params["width"] in [t.params["width"] for t in others]
    mixed = [trial.params not in params(study)[trial.number - trial.number % 11 :][:8] for trial in spare]
    assert sum(mixed) >= 7  # a mixture may happen to be one of its parts


def test_spare_trials_of_one_point_at_a_time_are_random() -> None:
    study = study_of(HybridSampler(SPACE, "nelder_mead", seed=3))
    lrs = [suggest(study.ask(), SPACE)["lr"] for _ in range(4)]
    assert len(set(lrs)) == 4


def test_threads() -> None:
    study = study_of(HybridSampler(SPACE, EIGHT, seed=3))
    study.optimize(objective, 40, n_jobs=3)
    served = {t.system_attrs["hybridopt:point"][1]: t.params for t in study.trials if t.system_attrs}
    assert len(served) > 24
    assert [served[i] for i in range(len(served))] == by_study(len(served))


def test_a_blocking_solver_in_threads() -> None:
    study = study_of(HybridSampler(SPACE, "nelder_mead", seed=3))
    study.optimize(objective, 30, n_jobs=2)
    served = {t.system_attrs["hybridopt:point"][1]: t.params for t in study.trials if t.system_attrs}
    assert [served[i] for i in range(len(served))] == by_study(len(served), "nelder_mead")


def test_pruned_trials_are_told_with_their_last_value() -> None:
    def prune(trial: Any) -> float:
        loss = objective(trial)
        trial.report(loss + 5, 1)
        trial.report(loss, 2)
        raise optuna.TrialPruned

    study = study_of(HybridSampler(SPACE, EIGHT, seed=3))
    study.optimize(prune, 32)
    assert params(study) == by_study(32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("how", ["raise", "nan", "prune"])
def test_failed_trials_are_rejected(how: str) -> None:
    def train(config: dict[str, Any]) -> float:
        return math.nan if config["width"] > 24 else bowl(config)

    def fail(trial: Any) -> float:
        loss = train(suggest(trial, SPACE))
        if math.isnan(loss) and how == "raise":
            raise ValueError
        if math.isnan(loss) and how == "prune":
            raise optuna.TrialPruned
        return loss

    study = study_of(HybridSampler(SPACE, EIGHT, seed=3))
    study.optimize(fail, 40, catch=(ValueError,))
    assert 2 < sum(t.state is not optuna.trial.TrialState.COMPLETE for t in study.trials) < 38
    assert params(study) == by_tune(EIGHT, 40, train) != by_study(40)


def test_maximising() -> None:
    study = study_of(HybridSampler(SPACE, EIGHT, seed=3), direction="maximize")
    study.optimize(lambda trial: -objective(trial), 32)
    assert params(study) == by_study(32)


def test_another_seed_another_path() -> None:
    study = study_of(HybridSampler(SPACE, EIGHT, seed=4))
    study.optimize(objective, 8)
    assert params(study) != by_study(8)


def test_callers_generators_are_left_alone() -> None:
    """Also between two trials, where training draws from them."""
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    study = study_of(HybridSampler(SPACE, EIGHT, seed=3))
    for _ in range(10):
        trial = study.ask()
        loss = objective(trial)
        assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # type: ignore[index]
        study.tell(trial, loss)


# -- a method that ends ------------------------------------------------------------------------------------------


def test_it_begins_again_when_the_method_ends() -> None:
    study = study_of(HybridSampler(SPACE, EIGHT, seed=3, budget=11))
    study.optimize(objective, 33)
    found = params(study)
    assert found[:11] == by_study(11)
    assert found[11:14] != found[8:11]
    starts = [[p["lr"] for p in found[i : i + 8]] for i in (0, 11, 22)]
    assert len({tuple(s) for s in starts}) == 3
    assert [t.system_attrs["hybridopt:point"][1] for t in study.trials] == list(range(33))


@pytest.mark.parametrize(
    "chain",
    ["random_search(evaluations=50%, popsize=5) > cmaes", "cmaes(evaluations=10%, popsize=8) > cmaes"],
)
def test_a_budget_is_shared_out(chain: str) -> None:
    study = study_of(HybridSampler(SPACE, chain, seed=3, budget=40))
    study.optimize(objective, 40)
    assert params(study) == by_tune(chain, 40)


@pytest.mark.parametrize("method", ["auto", "coordinate_search", "restart(slsqp)"])
def test_methods_for_values_alone(method: str) -> None:
    study = study_of(HybridSampler(SPACE, method, seed=0, budget=80))
    study.optimize(objective, 80)
    assert study.best_value < 0.5


# -- going on ----------------------------------------------------------------------------------------------------


def stored(tmp_path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))


@pytest.mark.parametrize("method", [EIGHT, "nelder_mead", "pso(evaluations=13) > cmaes", "optuna.tpe"])
@pytest.mark.parametrize("cut", [0, 5, 16, 21])
def test_goes_on_in_a_new_process(tmp_path: Path, method: str, cut: int) -> None:
    text: Any = TPE() if method == "optuna.tpe" else method
    for trials in (cut, 32 - cut):
        sampler = HybridSampler(SPACE, text, seed=3)
        study = study_of(sampler, storage=stored(tmp_path), study_name="s", load_if_exists=True)
        study.optimize(objective, trials)
    assert params(study) == by_study(32, text)


def test_a_drawn_seed_is_kept_in_the_study(tmp_path: Path) -> None:
    for trials in (11, 21):
        study = study_of(
            HybridSampler(SPACE, EIGHT), storage=stored(tmp_path), study_name="s", load_if_exists=True
        )
        study.optimize(objective, trials)
    seed = study._storage.get_study_system_attrs(study._study_id)["hybridopt:seed"]
    again = study_of(HybridSampler(SPACE, EIGHT, seed=seed))
    again.optimize(objective, 32)
    assert params(again) == params(study)


def test_two_samplers_take_turns_on_one_study(tmp_path: Path) -> None:
    """As two processes do: each sees the trials of the other, running ones included."""
    first = study_of(HybridSampler(SPACE, EIGHT, seed=3), storage=stored(tmp_path), study_name="s")
    second = optuna.load_study(
        study_name="s", storage=stored(tmp_path), sampler=HybridSampler(SPACE, EIGHT, seed=3)
    )
    for _ in range(8):
        trials = [(study, study.ask()) for study in (first, second, second, first)]
        losses = [objective(trial) for _, trial in trials]
        for (study, trial), loss in zip(trials, losses, strict=True):
            study.tell(trial, loss)
    assert params(first) == by_study(32)


def test_points_of_dead_trials_are_tried_again(tmp_path: Path) -> None:
    storage = stored(tmp_path)
    study = study_of(HybridSampler(SPACE, EIGHT, seed=3), storage=storage, study_name="s")
    study.optimize(objective, 2)
    lost = suggest(study.ask(), SPACE)  # and the process is killed
    study = optuna.load_study(study_name="s", storage=storage, sampler=HybridSampler(SPACE, EIGHT, seed=3))
    study.optimize(objective, 14)
    found = [t.params for t in study.trials if t.number != 2]
    expected = by_study(16)
    assert lost == expected[2]
    assert found == expected[:2] + expected[3:8] + [lost] + expected[8:]


def test_a_pickled_sampler() -> None:
    study = study_of(HybridSampler(SPACE, EIGHT, seed=3))
    study.optimize(objective, 11)
    study.sampler = pickle.loads(pickle.dumps(study.sampler))
    study.optimize(objective, 21)
    assert params(study) == by_study(32)


def test_enqueued_trials_take_no_point() -> None:
    study = study_of(HybridSampler(SPACE, EIGHT, seed=3))
    study.optimize(objective, 3)
    study.enqueue_trial({"lr": 0.5, "width": 7, "optimizer": "adam"})
    study.enqueue_trial({"lr": 0.25})
    study.optimize(objective, 15)
    assert params(study)[3] == {"lr": 0.5, "width": 7, "optimizer": "adam"}
    assert params(study)[4]["lr"] == 0.25
    assert [p for i, p in enumerate(params(study)) if i not in (3, 4)] == by_study(16)


# -- spaces ------------------------------------------------------------------------------------------------------


def test_a_space_from_the_trials() -> None:
    def train(trial: Any) -> float:
        lr = trial.suggest_float("lr", 1e-4, 1, log=True)
        drop = trial.suggest_float("drop [%]", 0.05, 0.5, step=0.15)
        width = trial.suggest_int("width", 4, 32, step=4)
        depth = trial.suggest_int("depth", 1, 64, log=True)
        flag = trial.suggest_categorical("flag", [True, 1.5, None])
        one = trial.suggest_int("one", 3, 3)
        assert isinstance(width, int)
        assert isinstance(depth, int)
        assert width in range(4, 33, 4)
        assert one == 3
        assert min(abs(drop - d) for d in (0.05, 0.2, 0.35, 0.5)) < 1e-12
        loss = (math.log10(lr) + 2) ** 2 + drop + ((width - 20) / 16) ** 2 + math.log2(depth / 8) ** 2 / 9
        return loss + (flag is not None)

    study = study_of(HybridSampler(seed=0))
    study.optimize(train, 150)
    best = study.best_params
    assert best["flag"] is None
    assert best["width"] in (16, 20, 24)
    assert best["drop [%]"] == 0.05
    assert best["one"] == 3
    assert study.best_value < 0.2
    assert sum("hybridopt:point" in t.system_attrs for t in study.trials) == 149
    seen = {(t.params["flag"], t.params["width"]) for t in study.trials}
    assert {flag for flag, _ in seen} == {True, 1.5, None}
    assert {width for _, width in seen} == set(range(4, 33, 4))


def test_parameters_that_not_all_trials_have() -> None:
    """The space shrinks on the way; what is left is searched, the rest is drawn, both the same in every process."""

    def train(trial: Any) -> float:
        lr = trial.suggest_float("lr", 1e-4, 1, log=True)
        name = trial.suggest_categorical("optimizer", ["sgd", "adam"])
        momentum = trial.suggest_float("momentum", 0, 0.99) if name == "sgd" else 0.0
        return bowl({"lr": lr, "width": 20, "optimizer": name, "momentum": momentum})

    whole, cut = (study_of(HybridSampler(method=EIGHT, seed=5)) for _ in range(2))
    whole.optimize(train, 60)
    for trials in (1, 3, 20, 36):
        cut.sampler = HybridSampler(method=EIGHT, seed=5)
        cut.optimize(train, trials)
    assert params(whole) == params(cut)
    assert len({t.system_attrs["hybridopt:point"][0] for t in whole.trials[1:]}) == 2
    assert whole.best_value < 0.5


def test_suggested_where_it_does_not_count() -> None:
    def train(trial: Any) -> float:
        config = suggest(trial, SPACE)
        return bowl(config) + 0 * trial.suggest_float("momentum", 0, 0.99)

    study = study_of(HybridSampler(SPACE, EIGHT, seed=3))
    study.optimize(train, 32)
    drawn = [t.params["momentum"] for t in study.trials if t.params["optimizer"] == "adam"]
    assert len(set(drawn)) == len(drawn) > 3
    assert all(0 <= m <= 0.99 for m in drawn)
    names = ("lr", "width", "optimizer")
    assert [[p[n] for n in names] for p in params(study)] == [[p[n] for n in names] for p in by_study(32)]


def test_hyperband_keeps_one_search() -> None:
    def train(trial: Any) -> float:
        loss = objective(trial)
        for epoch in range(8):
            trial.report(loss, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return loss

    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=8)
    study = study_of(HybridSampler(SPACE, EIGHT, seed=3), pruner=pruner)
    study.optimize(train, 32)
    assert any(t.state is optuna.trial.TrialState.PRUNED for t in study.trials)
    assert params(study) == by_study(32)


def test_bad_input() -> None:
    with pytest.raises(MethodError, match=r"torch\.adam needs more of a trial than its value \(gradient\)"):
        HybridSampler(method="torch.adam > cmaes")
    with pytest.raises(MethodError, match=r"scipy\.least_squares needs more .* \(residuals\)"):
        HybridSampler(method="least_squares")
    with pytest.raises(ObjectiveError, match="expected a Space or None, got dict"):
        HybridSampler({"lr": Float(0, 1)})  # type: ignore[arg-type]
    study = study_of(HybridSampler(SPACE), directions=["minimize", "minimize"])
    with pytest.raises(ObjectiveError, match="one objective, got 2"):
        suggest(study.ask(), SPACE)
    with pytest.raises(ObjectiveError, match=r"'lr': expected the trial to suggest it from .*low=0\.0001"):
        study_of(HybridSampler(SPACE)).ask().suggest_float("lr", 5, 6, log=True)


# -- its samplers as methods -------------------------------------------------------------------------------------


@pytest.mark.slow
class TestTPE(OptimizerContract):
    method = TPE()
    budget = 150
    random = True
    evaluations = 24


@pytest.mark.slow
class TestOptunaCMAES(OptimizerContract):
    method = OptunaCMAES()
    budget = 400
    random = True
    evaluations = 24


def square(x: Any) -> float:
    return float(((x - 0.5) ** 2).sum())


def points_of(
    method: Any, budget: int, target: Any = None, loss: Any = square, **options: Any
) -> list[list[float]]:
    points: list[list[float]] = []

    def counted(x: Any) -> float:
        points.append(x.tolist())
        return float(loss(x))

    target = np.zeros(3) if target is None else target
    hybridopt.minimize(counted, target, method, budget=budget, seed=3, **{"bounds": (-2.0, 2.0)} | options)
    return points


def points_of_optuna(
    sampler: Any, space: dict[str, Any], trials: int, batch: int = 1, loss: Any = square
) -> list[list[float]]:
    study = study_of(sampler)
    study.enqueue_trial(dict.fromkeys(space, 0))
    points = []
    for _ in range(trials // batch):
        asked = [study.ask(space) for _ in range(batch)]
        for trial in asked:
            points.append([trial.params[name] for name in space])
            value = loss(np.array(points[-1]))
            if math.isnan(value):
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, value)
    return points


BOX = {name: optuna.distributions.FloatDistribution(-2, 2) for name in ("x0", "x1", "x2")}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(
    "method, sampler, options",
    [
        (TPE(), "TPESampler", {}),
        (TPE(startup=3, candidates=5), "TPESampler", {"n_startup_trials": 3, "n_ei_candidates": 5}),
        (TPE(multivariate=False), "TPESampler", {"multivariate": False}),
        (TPE(batch=4), "TPESampler", {}),
        (OptunaCMAES(), "CmaEsSampler", {}),
        (OptunaCMAES(popsize=6), "CmaEsSampler", {"popsize": 6}),
        (OptunaCMAES(separable=True), "CmaEsSampler", {"use_separable_cma": True}),
    ],
    ids=str,
)
def test_walks_optunas_path(method: Any, sampler: str, options: dict[str, Any]) -> None:
    expected = points_of_optuna(getattr(optuna.samplers, sampler)(seed=3, **options), BOX, 28, method.batch)
    assert points_of(method, 28) == expected


def test_whole_numbers_and_logarithms() -> None:
    """Whole numbers are such to the sampler, both ends in reach; logarithms are uniform as such."""
    weights = {"n": torch.tensor([0.0, 0.0]), "rate": torch.tensor([1.0])}
    seen: list[tuple[float, ...]] = []

    def loss(w: dict[str, torch.Tensor]) -> float:
        seen.append((*w["n"].tolist(), w["rate"].item()))
        return 0.0

    hybridopt.minimize(
        loss, weights, TPE(startup=100), budget=100, seed=3, integer="n", log="rate",
        bounds={"n": (-1, 2), "rate": (1e-4, 1e4)},
    )  # fmt: skip
    assert {first for first, _, _ in seen} == {second for _, second, _ in seen} == {-1.0, 0.0, 1.0, 2.0}
    assert len({rate for _, _, rate in seen}) == 100
    assert 30 < sum(rate < 1 for _, _, rate in seen) < 70
    space = {
        "x0": optuna.distributions.IntDistribution(-4, 4),
        "x1": optuna.distributions.FloatDistribution(-2, 2),
    }
    bounds = np.array([(-4, 4), (-2, 2)], dtype=float)
    found = points_of(
        OptunaCMAES(margin=True), 60, np.zeros(2), bounds=bounds, integer=np.array([True, False])
    )
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        native = optuna.samplers.CmaEsSampler(seed=3, with_margin=True)
    assert found == points_of_optuna(native, space, 60)


def test_losses_that_are_not_finite_are_pruned_trials() -> None:
    def loss(x: Any) -> float:
        return math.nan if x[0] > 0 else square(x)

    expected = points_of_optuna(optuna.samplers.TPESampler(seed=3), BOX, 30, loss=loss)
    with pytest.warns(RuntimeWarning):
        assert points_of(TPE(), 30, loss=loss) == expected


def test_points_of_a_predecessor() -> None:
    """They are trials that have ended: no random ones are needed, and nothing is evaluated twice."""
    first = points_of("de", 30)
    both = points_of(hybridopt.method("de(evaluations=30)") >> TPE(), 60)
    assert both[:30] == first
    alone = hybridopt.method("de(evaluations=30)") >> TPE().limit(handover="point")
    assert both[31:] != points_of(alone, 60)[31:]
    near = [square(np.array(x)) for x in both[31:]]
    assert np.median(near) < 0.6 * np.median([square(np.array(x)) for x in first])


def test_optuna_keeps_quiet(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a loss's own study its messages pass."""
    optuna.logging.set_verbosity(optuna.logging.INFO)
    optuna.logging.enable_propagation()
    made: list[bool] = []

    def loss(x: Any) -> float:
        if not made:
            made.append(True)
            study_of(optuna.samplers.RandomSampler())
        return square(x)

    with caplog.at_level(logging.INFO):
        points_of(OptunaCMAES(separable=True), 15, np.zeros(1), loss=loss)
    optuna.logging.disable_propagation()
    assert len({record.message for record in caplog.records}) == 1  # each study has a name of its own
    assert optuna.logging.get_verbosity() == optuna.logging.INFO


def test_without_optuna() -> None:
    """Its methods keep their names, and say what is missing when they are started."""
    code = """
import sys
sys.modules["optuna"] = None
import numpy as np
import hybridopt, hybridopt_optuna
try:
    hybridopt.minimize(lambda x: 0.0, np.zeros(1), hybridopt_optuna.TPE(), budget=3, bounds=(-1, 1))
except hybridopt.errors.MethodError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("optuna.tpe: expected Optuna (")
    assert out.endswith("pip install 'torch-hybridopt[optuna]'\n")


def test_bad_options() -> None:
    for make, message in [
        (lambda: TPE(batch=0), "expected batch >= 1, got 0"),
        (lambda: TPE(startup=-1), "expected startup >= 0 and candidates >= 1, got -1 and 24"),
        (lambda: TPE(multivariate=3), "expected multivariate to be True or False or None, got 3"),  # type: ignore[arg-type]
        (lambda: OptunaCMAES(popsize=4), "expected popsize >= 5 or None, got 4"),
        (lambda: OptunaCMAES(margin=True, separable=True), "expected margin or separable, got both"),
    ]:
        with pytest.raises(MethodError, match=message):
            make()
    with pytest.raises(BoundsError, match=r"optuna\.tpe: expected finite bounds"):
        points_of(TPE(), 3, bounds=None)
