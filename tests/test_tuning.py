"""Searching hyperparameters: trials, early stopping, workers, failures, resume."""

from __future__ import annotations

import concurrent.futures
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hybridopt import minimize, tune
from hybridopt.errors import MethodError, ObjectiveError, StateError
from hybridopt.layers import layer_groups, layers
from hybridopt.pruning import HalvingPruner, MedianPruner
from hybridopt.space import Categorical, Float, Int, Space
from hybridopt.tuning import Trial, TrialPruned, TrialRecord

SPACE = Space(
    {
        "lr": Float(1e-4, 1, log=True),
        "width": Int(2, 40),
        "optimizer": Categorical(["sgd", "adam"]),
        "momentum": Float(0, 0.99, when=("optimizer", "sgd")),
    }
)


def bowl(config: dict[str, Any]) -> float:
    """Lowest, 0.01, at lr 0.01, width 20, sgd with momentum 0.9."""
    value = (math.log10(config["lr"]) + 2) ** 2 + ((config["width"] - 20) / 20) ** 2
    return float(value + (1.0 if config["optimizer"] == "adam" else 0.01 + (config["momentum"] - 0.9) ** 2))


def learning(config: dict[str, Any], trial: Trial) -> float:
    """A learning curve towards `bowl`."""
    for epoch in range(1, 9):
        trial.report(epoch, bowl(config) + 1 / epoch)
    return bowl(config)


def rows(tuning: Any) -> list[tuple[Any, ...]]:
    return [(t.number, t.config, t.loss, t.state, t.reports) for t in tuning.trials]


# -- searching ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["cmaes", "de", "random_search", "nelder_mead", "race(cmaes, pso)", "pso > cmaes"]
)
def test_any_method(method: str) -> None:
    if method.startswith("race"):
        pytest.importorskip("hybridopt.compose.race")
    tuning = tune(bowl, SPACE, method.replace("pso > ", "pso(evaluations=30) > "), 120, seed=1)
    assert len(tuning.trials) == 120 or tuning.result.reason.value == "converged"
    assert [t.number for t in tuning.trials] == list(range(len(tuning.trials)))
    assert tuning.best.loss == min(t.loss for t in tuning.trials)
    assert tuning.best.loss < 0.7
    assert all(t.loss == bowl(t.config) for t in tuning.trials)
    assert all(("momentum" in t.config) is (t.config["optimizer"] == "sgd") for t in tuning.trials)


def test_by_default_and_by_auto_a_model_of_the_losses_searches() -> None:
    """It finds the best loss, 0.01, in sixty trials, of which CMA-ES leaves 0.0104 to 0.04."""
    by_default, by_auto = (tune(bowl, SPACE, *method, budget=60, seed=2) for method in ((), ("auto",)))
    assert rows(by_auto) == rows(by_default)
    assert by_auto.result.notes[-1].startswith(
        "auto chose bayes, since each evaluation is a training run: bayes("
    )
    assert by_default.best.loss < 0.0103


def test_start_is_where_a_local_method_begins() -> None:
    start = {"lr": 0.5, "width": 33, "optimizer": "sgd", "momentum": 0.1}
    assert tune(bowl, SPACE, "nelder_mead", 3, seed=0, start=start).trials[0].config == pytest.approx(start)


def test_same_seed_same_trials() -> None:
    assert rows(tune(bowl, SPACE, budget=30, seed=4)) == rows(tune(bowl, SPACE, budget=30, seed=4))
    assert rows(tune(bowl, SPACE, budget=30, seed=4)) != rows(tune(bowl, SPACE, budget=30, seed=5))


def test_table_and_dicts() -> None:
    tuning = tune(bowl, SPACE, budget=12, seed=4)
    text = str(tuning)
    assert text.splitlines()[0].split()[:4] == ["trial", "state", "loss", "seconds"]
    assert len(text.splitlines()) >= 13
    dicts = tuning.to_dicts()
    assert dicts[3]["lr"] == tuning.trials[3].config["lr"]
    assert list(dicts[0])[:4] == ["number", "state", "loss", "seconds"]


def test_a_training_in_torch() -> None:
    """It needs gradients, which a gradient-free search switches off around a loss."""

    def train(config: dict[str, Any], trial: Trial) -> float:
        generator = torch.Generator().manual_seed(trial.seed)
        x = torch.randn(64, 2, generator=generator)
        w = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=float(config["lr"]))
        for _ in range(20):
            optimizer.zero_grad()
            loss = ((x @ w - x.sum(1)) ** 2).mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    tuning = tune(train, Space({"lr": Float(1e-3, 1, log=True)}), budget=20, seed=0)
    assert tuning.best.loss < 1e-3
    assert not any(t.error for t in tuning.trials)


# -- early stopping ----------------------------------------------------------------------------------------------


def test_median_rule() -> None:
    rule = MedianPruner(n_warmup_steps=0)
    earlier = [{1: 1.0, 2: value} for value in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert rule.hopeless(2, {1: 1.0, 2: 0.31}, earlier)
    assert not rule.hopeless(2, {1: 1.0, 2: 0.29}, earlier)
    assert not rule.hopeless(2, {1: 0.29, 2: 0.9}, earlier)  # its best so far counts
    assert rule.hopeless(2, {2: math.nan}, earlier)
    assert not rule.hopeless(2, {2: 9.0}, earlier[:3])
    assert MedianPruner(3, 0).hopeless(2, {2: 9.0}, earlier[:3])
    assert not rule.hopeless(3, {3: 9.0}, earlier)  # nobody came so far
    assert not rule.hopeless(5, {5: 1.0}, [{10: 0.5}] * 5)  # nobody had reported yet
    for nan in ({1: math.nan, 2: 0.5}, {1: 0.5, 2: math.nan}):
        assert rule.hopeless(2, {2: 0.6}, [nan] * 5)
    assert not rule.hopeless(2, {2: 0.6}, [{2: math.nan}] * 5)  # nan is the worst, not nothing
    assert rule.hopeless(2, {2: math.nan}, [{2: math.nan}] * 5)


def test_halving_rule() -> None:
    """Rungs at 2, 4 and 8 of at most 10 steps: there the better half of all five goes on, the third included."""
    rule = HalvingPruner(min_resource=2)
    earlier = [{4: value, 5: 0.0, 10: 0.0} for value in (0.1, 0.2, 0.3, 0.4)]
    assert rule.hopeless(4, {4: 0.31}, earlier)
    assert not rule.hopeless(4, {4: 0.29}, earlier)
    assert rule.hopeless(4, {4: math.nan}, earlier)
    assert not rule.hopeless(4, {4: 9.0}, earlier[:3])
    assert not rule.hopeless(5, {4: 0.0, 5: 9.0}, earlier)  # no rung
    assert not rule.hopeless(1, {1: 9.0}, earlier)  # before the first
    assert rule.hopeless(9, {4: 0.0, 9: 9.0}, earlier)  # its first report after a rung counts
    assert rule.hopeless(5, {3: 0.0, 5: 0.31}, earlier)  # so does theirs
    assert rule.hopeless(
        4, {4: math.nan}, [{4: math.nan, 10: 0.0}] * 4
    )  # nan is the worst even among its like
    assert not HalvingPruner(min_resource=5).hopeless(
        10, {5: 0.0, 10: 9.0}, earlier
    )  # no rung at the very end
    quarter = HalvingPruner(min_resource=2, reduction_factor=4)  # of five the better two
    assert quarter.hopeless(2, {2: 0.21}, earlier)
    assert not quarter.hopeless(2, {2: 0.19}, earlier)
    assert not quarter.hopeless(4, {2: 0.0, 4: 9.0}, earlier)  # the next rung is 8


def test_the_grace_period() -> None:
    """Unless it is given: a fifth, or an eighth, of the longest earlier trial's steps."""
    earlier = [dict.fromkeys(range(1, 41), 0.0)] * 4
    worst = dict.fromkeys(range(1, 41), 9.0)

    def first(rule: Any) -> int:
        told = ({s: loss for s, loss in worst.items() if s <= step} for step in worst)
        return next(max(reports) for reports in told if rule.hopeless(max(reports), reports, earlier))

    assert first(MedianPruner()) == 9
    assert first(MedianPruner(n_warmup_steps=20)) == 21
    assert first(HalvingPruner()) == 5
    assert first(HalvingPruner(min_resource=7)) == 7
    cut = tune(learning, SPACE, budget=40, seed=2, early=MedianPruner(n_warmup_steps=5))
    assert min(max(t.reports) for t in cut.trials if t.state == "pruned") == 6


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MedianPruner(n_warmup_steps=-1), "MedianPruner: expected n_warmup_steps >= 0, got -1"),
        (lambda: MedianPruner(n_startup_trials=0), "MedianPruner: expected n_startup_trials >= 1, got 0"),
        (
            lambda: HalvingPruner(min_resource=0.5),
            "HalvingPruner: expected min_resource to be a whole number",
        ),
        (lambda: HalvingPruner(reduction_factor=1), "HalvingPruner: expected reduction_factor >= 2, got 1"),
    ],
)
def test_what_is_no_pruner(make: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()


@pytest.mark.parametrize("early", ["median", "halving"])
def test_hopeless_trials_are_given_up(early: Any) -> None:
    full = tune(learning, SPACE, budget=60, seed=2)
    cut = tune(learning, SPACE, budget=60, seed=2, early=early)
    assert {t.state for t in full.trials} == {"complete"}
    pruned = [t for t in cut.trials if t.state == "pruned"]
    assert 5 < len(pruned) < 55
    for t in pruned:
        assert t.loss == t.reports[max(t.reports)]
    assert cut.best.state == "complete"
    assert sum(len(t.reports) for t in cut.trials) < 0.8 * sum(len(t.reports) for t in full.trials)


def test_reports_go_forward() -> None:
    trial = Trial(0, 0)
    trial.report(3, 1.0)
    for step in (3, 4.5):
        with pytest.raises(ObjectiveError, match=f"expected a whole number above 3 as step, got {step}"):
            trial.report(step, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TrialPruned, match="trial 9 was given up after step 1"):
        Trial(9, 0, MedianPruner(n_warmup_steps=0), ({1: 0.0},) * 4).report(1, 1.0)


# -- failures ----------------------------------------------------------------------------------------------------


def test_failed_trials_are_recorded_and_not_fatal() -> None:
    def train(config: dict[str, Any]) -> float:
        if config["width"] > 24:
            raise MemoryError("out of memory")
        return bowl(config)

    with pytest.warns(RuntimeWarning) as caught:
        tuning = tune(train, SPACE, budget=60, seed=2)
    failed = [t for t in tuning.trials if t.state == "failed"]
    assert failed
    first = f"tune: trial {failed[0].number} failed with MemoryError: out of memory; its point is rejected"
    assert [str(w.message)[: len(first)] for w in caught] == [first]
    assert caught[0].filename == __file__
    table = str(tuning).splitlines()
    assert sum(line.endswith("MemoryError: out of memory") for line in table) == len(failed)
    assert all("MemoryError: out of memory" in t.error and t.config["width"] > 24 for t in failed)  # type: ignore[operator]
    assert tuning.best.config["width"] <= 24  # type: ignore[operator]
    assert len(tuning.trials) == 60


@pytest.mark.parametrize("method", ["cmaes", "nelder_mead", "race(cmaes, pso)"])
def test_all_failed(method: str) -> None:
    def train(config: dict[str, Any]) -> float:
        raise ValueError("never\nand why")

    with pytest.warns(RuntimeWarning) as caught:
        tuning = tune(train, SPACE, method, budget=20, seed=2)
    first, last = (str(w.message) for w in caught)
    assert first.startswith("tune: trial 0 failed with ValueError: never; its point")
    assert last.startswith("tune: all 20 trials failed, the first one with ValueError: never; its traceback")
    assert {w.filename for w in caught} == {__file__}
    with pytest.raises(
        ObjectiveError, match=r"(?s)no trial of 20 has a finite loss; the first one:.*ValueError: never"
    ):
        _ = tuning.best


def test_a_forgotten_return_is_said() -> None:
    with pytest.warns(RuntimeWarning):
        tuning = tune(lambda config: None, SPACE, budget=2, seed=0)  # type: ignore[arg-type, return-value]
    said = "ObjectiveError: loss: expected a number or a one-element tensor, got NoneType"
    assert [t.cause for t in tuning.trials] == [said] * 2


def test_a_trial_that_gives_itself_up() -> None:
    def train(config: dict[str, Any], trial: Trial) -> float:
        if config["width"] > 20:
            raise TrialPruned
        return bowl(config)

    with pytest.warns(
        RuntimeWarning, match=r"tune: trial \d+ \(pruned\) had a loss of nan; its point is rejected"
    ):
        tuning = tune(train, SPACE, budget=20, seed=2)
    assert {t.state for t in tuning.trials} == {"complete", "pruned"}


def test_interrupts_pass() -> None:
    def train(config: dict[str, Any]) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(train, SPACE, budget=20, seed=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": 3}, r"expected a function train\(config\) or train\(config, trial\), got 3"),
        ({"space": {"lr": 3}}, "expected a Space, got dict"),
        ({"early": "soon"}, "expected early to be 'median', 'halving', a pruner or None, got 'soon'"),
        ({"workers": 0}, "expected workers >= 1 or an executor, got 0"),
        ({"workers": 2.5}, "expected workers >= 1 or an executor, got 2.5"),
        ({"early": "median"}, r"early='median' expects train\(config, trial\)"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        tune(**({"train": bowl, "space": SPACE, "budget": 5} | change))


# -- workers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [None, "median"])
def test_workers_change_nothing(early: Any) -> None:
    one = tune(learning, SPACE, "cmaes(popsize=8)", 45, seed=3, early=early)
    four = tune(learning, SPACE, "cmaes(popsize=8)", 45, seed=3, early=early, workers=4)
    assert rows(one) == rows(four)


def test_trials_of_a_generation_run_together() -> None:
    """Five of them wait for each other, the start and four drawn: one at a time they would wait for ever."""
    meeting = threading.Barrier(5, timeout=20)

    def train(config: dict[str, Any]) -> float:
        meeting.wait()
        return bowl(config)

    tuning = tune(train, SPACE, "cmaes(popsize=4)", 5, seed=3, workers=5)
    assert [t.state for t in tuning.trials] == ["complete"] * 5


def test_no_trial_beyond_the_budget_is_begun() -> None:
    begun: list[int] = []

    def train(config: dict[str, Any], trial: Trial) -> float:
        begun.append(trial.number)
        return bowl(config)

    tune(train, SPACE, "cmaes(popsize=8, evaluations=13) > pso(swarmsize=7)", 25, seed=3, workers=4)
    assert sorted(begun) == list(range(25))


@pytest.mark.slow
def test_processes() -> None:
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        found = tune(learning, SPACE, "cmaes(popsize=8)", 20, seed=3, early="median", workers=pool)
        assert pool.submit(int, 3).result() == 3  # the caller's executor stays open
    assert rows(found) == rows(tune(learning, SPACE, "cmaes(popsize=8)", 20, seed=3, early="median"))


# -- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("cut", [1, 7, 8, 20])
def test_resume(tmp_path: Path, cut: int, workers: int) -> None:
    """Killed in the middle of a generation, nothing already trained is trained again, and the path is the same."""
    file = tmp_path / "study.pt"
    whole = tune(learning, SPACE, "cmaes(popsize=8)", 30, seed=3, early="median")

    class Killed(BaseException):
        pass

    def kill(record: TrialRecord) -> None:
        if record.number == cut - 1:
            raise Killed

    with pytest.raises(Killed):
        tune(
            learning, SPACE, "cmaes(popsize=8)", 30, seed=3, early="median", workers=workers, checkpoint=file,
            callbacks=kill,
        )  # fmt: skip
    trained: list[int] = []

    def again(config: dict[str, Any], trial: Trial) -> float:
        trained.append(trial.number)
        return learning(config, trial)

    rest = tune(again, SPACE, "cmaes(popsize=8)", 30, seed=3, early="median", checkpoint=file)
    assert rows(rest) == rows(whole)
    assert trained == list(range(cut, 30))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_longer_budget_goes_on(tmp_path: Path, workers: int) -> None:
    file = tmp_path / "study.pt"
    trained: list[int] = []

    def train(config: dict[str, Any], trial: Trial) -> float:
        trained.append(trial.number)
        return bowl(config)

    for budget in (20, 45):
        found = tune(train, SPACE, "cmaes(popsize=8)", budget, seed=3, checkpoint=file, workers=workers)
    assert rows(found) == rows(tune(bowl, SPACE, "cmaes(popsize=8)", 45, seed=3))
    assert sorted(trained) == list(range(45))


def test_a_checkpoint_of_another_study(tmp_path: Path) -> None:
    file = tmp_path / "study.pt"
    tune(bowl, SPACE, budget=5, seed=3, checkpoint=file)
    with pytest.raises(StateError, match="saved with another space"):
        tune(bowl, Space({"lr": Float(0, 1)}), budget=5, seed=3, checkpoint=file)
    with pytest.raises(StateError, match="it was saved with seed 3, got seed=4"):
        tune(bowl, SPACE, budget=5, seed=4, checkpoint=file)
    with pytest.raises(StateError, match="expected an existing folder"):
        tune(bowl, SPACE, budget=5, checkpoint=tmp_path / "none" / "study.pt")
    minimize(lambda x: float((x**2).sum()), np.ones(2), "cmaes", budget=5, checkpoint=tmp_path / "run.pt")
    with pytest.raises(StateError, match="expected one that tune wrote"):
        tune(bowl, SPACE, budget=5, checkpoint=tmp_path / "run.pt")


def test_a_callback_ends_the_search() -> None:
    seen: list[int] = []

    def enough(record: TrialRecord) -> bool:
        seen.append(record.number)
        return record.number == 9

    tuning = tune(bowl, SPACE, "cmaes(popsize=8)", 90, seed=3, callbacks=enough)
    assert len(tuning.trials) == 17  # the start; the second generation is trained to its end
    assert seen == list(range(17))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_ends_the_search_and_keeps_its_trials(workers: int) -> None:
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:

        def train(config: dict[str, Any], trial: Trial) -> float:
            if trial.number == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return bowl(config)

        with pytest.warns(UserWarning, match="ending after this step"):
            tuning = tune(train, SPACE, "random_search(popsize=4)", 90, seed=3, workers=workers)
    finally:
        signal.signal(signal.SIGINT, found)
    assert len(tuning.trials) == 9  # the start and two generations
    assert tuning.best is not None


# -- a ready space -----------------------------------------------------------------------------------------------


def test_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    space = layers(model, multiplier=4, weight_decay=(1e-6, 1e-2))
    assert list(space.parameters) == [
        f"{layer}.{what}" for layer in ("0", "1", "3") for what in ("lr", "weight_decay")
    ]
    values = {
        "0.lr": 2.0,
        "0.weight_decay": 1e-3,
        "1.lr": 0.25,
        "1.weight_decay": 1e-6,
        "3.lr": 1.0,
        "3.weight_decay": 1e-2,
    }
    groups = layer_groups(model, values, lr=0.1)
    assert [g["lr"] for g in groups] == [0.2, 0.025, 0.1]
    assert [g["weight_decay"] for g in groups] == [1e-3, 1e-6, 1e-2]
    given = [p for g in groups for p in g["params"]]
    assert {id(p) for p in given} == {id(p) for p in model.parameters()}
    torch.optim.SGD(groups)
    assert list(layers(nn.Linear(1, 1)).parameters) == ["model.lr"]
    with pytest.raises(ObjectiveError, match="expected a model with weights"):
        layers(nn.ReLU())


def test_layers_that_share_a_weight() -> None:
    """A weight of two layers is of the first one; torch refuses it in two groups."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 1))
    model[1].weight = model[0].weight
    space = layers(model)
    assert list(space.parameters) == ["0.lr", "2.lr"]
    torch.optim.SGD(layer_groups(model, {"0.lr": 2.0, "2.lr": 1.0}, lr=0.1))
