"""The engine of comparisons: equal starts, boxes for those that need them, failures shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt.compare import (
    JSON_KEYS,
    SEED_COMPARISON,
    Entry,
    compare,
    default_budget,
    entries,
    records,
    runs,
)
from hybridopt.errors import BudgetError, MethodError
from hybridopt.problems import Problem, ProblemError


def bowl(seed: int) -> Problem:
    start = torch.full((3,), 0.5 + 0.01 * seed, dtype=torch.float64)
    return Problem("bowl", lambda x: ((x - 2) ** 2).sum(), start, bounds=(-1.0, 1.0))


def boxless(seed: int) -> Problem:
    return Problem("boxless", lambda x: (x**2).sum(), torch.ones(2, dtype=torch.float64))


def test_one_result_a_method_and_seed_in_order() -> None:
    tracker = compare(bowl, ["slsqp", "cma.cmaes(sigma=0.5)"], budget=40, seeds=[1, 2])
    assert [(r["label"], r["seed"]) for r in tracker.results()] == [
        ("slsqp", 1),
        ("slsqp", 2),
        ("cma.cmaes(sigma=0.5)", 1),
        ("cma.cmaes(sigma=0.5)", 2),
    ]
    assert [len(log) for log in tracker.runs] == [r["evaluations"] for r in tracker.results()]


def test_every_method_begins_at_the_start_of_its_seed() -> None:
    tracker = compare(bowl, ["slsqp", "adam", "dual_annealing"], budget=5, seeds=[1, 9])
    for log in tracker.runs:
        assert log.column("loss")[0] == pytest.approx(3 * (1.5 - 0.01 * log.seed) ** 2)


def test_only_what_needs_a_box_is_held_in_it() -> None:
    tracker = compare(
        bowl,
        [
            "cma.cmaes(sigma=0.5)",
            "slsqp",
            "dual_annealing(evaluations=30) > slsqp",
            "slsqp > (adam(steps=3) > dual_annealing)(evaluations=30) > slsqp",
        ],
        budget=300,
    )
    free, slsqp, chain, nested = (r["best_loss"] for r in tracker.results())
    assert free < 1e-3  # the optimum, 2, lies outside the box
    assert slsqp < 1e-3
    assert chain == nested == pytest.approx(3.0)  # (1 - 2)² for each of three weights, at the box's corner


def test_what_the_problem_says_reaches_the_run() -> None:
    """A surrogate makes a gradient cost two forwards; a selection leaves the other weights alone."""
    model = torch.nn.Linear(2, 1).double()
    bias = model.bias.item()

    def build(seed: int) -> Problem:
        return Problem(
            "p",
            lambda m: m.weight.abs().sum(),
            model,
            surrogate=lambda m: (m.weight**2).sum() + m.bias.sum(),
            select="weight",
        )

    [result] = compare(build, ["adam(lr=.1)"], budget=5).results()
    assert (result["forward"], result["backward"]) == (10, 5)
    assert model.bias.item() == bias


def test_a_failed_method_is_a_row_and_the_others_go_on() -> None:
    tracker = compare(boxless, ["pyswarm.pso", "slsqp"], budget=50, seeds=[1])
    failed, fine = tracker.results()
    assert failed["reason"] == "failed"
    assert "expected finite bounds" in failed["message"]
    assert "Problem(...)" in failed["message"]
    assert fine["reason"] == "converged"
    assert records(tracker)[0] == {
        "method": "pyswarm.pso", "seed": 1, "loss": None, "best_loss": None, "evaluations": 0,
        "forward": 0, "backward": 0, "forward_equivalents": 0.0, "seconds": 0.0, "reason": "failed",
    }  # fmt: skip


def test_a_failure_half_way_keeps_what_was_spent() -> None:
    def nan_later(seed: int) -> Problem:
        def loss(x: np.ndarray) -> float:
            calls.append(1)
            return float("nan") if len(calls) == 1 else float((x**2).sum())

        calls: list[int] = []
        return Problem("nan at the start", loss, np.ones(2))

    with pytest.warns(RuntimeWarning, match="rejected"):
        tracker = compare(nan_later, ["slsqp(gradients=differences)", "cma.cmaes"], budget=20)
    failed, fine = tracker.results()
    assert (failed["reason"], failed["evaluations"]) == ("failed", 1)
    assert "expected a finite loss" in failed["message"]
    assert fine["evaluations"] == 20


def test_a_fault_in_the_loss_passes_unchanged() -> None:
    class Mine(Exception):
        pass

    def broken(seed: int) -> Problem:
        def loss(x: np.ndarray) -> float:
            raise Mine

        return Problem("broken", loss, np.ones(2))

    with pytest.raises(Mine):
        compare(broken, ["cma.cmaes"], budget=20)


def test_a_target_shared_between_runs_is_refused() -> None:
    shared = torch.ones(2, dtype=torch.float64)

    def build(seed: int) -> Problem:
        return Problem("shared", lambda x: (x**2).sum(), shared)

    with pytest.raises(ProblemError, match="expected the same start at every call with seed 42"):
        compare(build, ["slsqp", "cma.cmaes"], budget=20)


def test_an_interrupted_run_ends_the_comparison() -> None:
    tracker = compare(bowl, ["slsqp", "cma.cmaes"], budget=50, callbacks=lambda run, step: run.steps == 2)
    assert [r["reason"] for r in tracker.results()] == ["interrupted"]


def test_runs_yields_one_at_a_time() -> None:
    tracker = hybridopt.Tracker()
    going = runs(bowl, ["slsqp", "cma.cmaes"], 10, [1], tracker=tracker)
    assert next(going)["label"] == "slsqp"
    assert len(tracker.runs) == 1


def test_budgets() -> None:
    own = [Entry("a", "cma.cmaes", 7), Entry("b", "cma.cmaes")]
    assert [r["evaluations"] for r in compare(bowl, own, 11).results()] == [11, 11]
    assert compare(bowl, own).results()[0]["evaluations"] == 7
    assert (
        compare(bowl, ["adam"]).results()[0]["forward_equivalents"] == 3999
    )  # 1000 (n + 1) = 4000 for n = 3, at 3 a step
    assert default_budget(10**6).forward_equivalents == 100_000
    assert [e.budget for e in entries(None, own_budgets=False)] == [None] * 7
    with pytest.raises(BudgetError, match="3x"):
        compare(bowl, ["slsqp"], "3x")
    with pytest.raises(BudgetError):
        entries([Entry("a", "cma.cmaes", 0)])


def test_labels_of_a_mapping() -> None:
    tracker = compare(bowl, {"one": "slsqp", "two": hybridopt.method("slsqp", ftol=1e-9)}, 30)
    assert [(r["label"], r["method"]) for r in tracker.results()] == [
        ("one", "scipy.slsqp"),
        ("two", "scipy.slsqp(ftol=1e-09)"),
    ]


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        (["slsq"], "nearest: slsqp"),
        (["slsqp", "slsqp"], "given twice"),
        ([], "at least one"),
        (["slsqp-fd"], "only a label.*scipy.slsqp\\(gradients=differences"),
    ],
)
def test_wrong_methods_are_found_before_anything_runs(methods: list[str], text: str) -> None:
    tracker = hybridopt.Tracker()
    with pytest.raises(MethodError, match=text):
        compare(bowl, ["cma.cmaes", *methods] if methods else [], 5, tracker=tracker)
    assert tracker.runs == []


def test_no_seed_is_an_error() -> None:
    with pytest.raises(ProblemError, match="seeds"):
        compare(bowl, ["slsqp"], 5, seeds=[])


def test_records_are_json_with_the_keys_of_the_issue(tmp_path: Path) -> None:
    found = json.loads(json.dumps(records(compare(bowl, ["slsqp"], 50)), allow_nan=False))
    keys = (
        "method, seed, loss, best_loss, evaluations, forward, backward, forward_equivalents, seconds, reason"
    )
    assert list(found[0]) == list(JSON_KEYS) == keys.split(", ")
    row = found[0]
    assert row["forward_equivalents"] == row["forward"] + 2 * row["backward"]


def test_global_generators_and_the_callers_methods_are_left_alone() -> None:
    methods: list[Any] = ["cma.cmaes", Entry("p", "pyswarm.pso(swarmsize=5)")]
    before = torch.get_rng_state(), np.random.get_state()
    compare("identity", methods, 20)
    assert methods == ["cma.cmaes", Entry("p", "pyswarm.pso(swarmsize=5)")]
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_equal(np.random.get_state(), before[1])


def test_labels_of_the_seed_comparison() -> None:
    labels = ["adam", "slsqp-fd", "slsqp", "pso", "cmaes", "dual_annealing", "dual_annealing > slsqp"]
    assert [entry.label for entry in SEED_COMPARISON] == labels
    for entry in entries(None):  # full names: the rows stay outside libraries when a bare name is ours
        assert all(stage.split("(")[0].count(".") == 1 for stage in str(entry.method).split(" > "))
