"""What a result says of itself: where it breaks constraints, and how a score judged it."""

from __future__ import annotations

import numpy as np
import pytest

import hybridopt


def bowl(x: np.ndarray) -> float:
    return float((x**2).sum())


@pytest.fixture(scope="module")
def tracker() -> hybridopt.Tracker:
    return hybridopt.Tracker()


@pytest.fixture(scope="module")
def plain(tracker: hybridopt.Tracker) -> hybridopt.Result:
    return hybridopt.minimize(bowl, np.ones(2), "cmaes", budget=8, seed=0, tracker=tracker)


def test_a_plain_result_says_nothing_of_constraints_and_scores(plain: hybridopt.Result) -> None:
    expected = f"cmaes: best loss {plain.best_loss:.8g} (own {plain.loss:.8g}) in 8 evaluations, 8 forward-equivalents"
    assert str(plain).startswith(expected)


def test_a_point_that_breaks_constraints_is_not_printed_like_a_good_one(
    tracker: hybridopt.Tracker, plain: hybridopt.Result
) -> None:
    before = tracker.table()
    assert "broken" not in before
    result = hybridopt.minimize(
        bowl, np.ones(2), "cobyla", budget=1, seed=0, constraints=lambda x: x[0] - 3, tracker=tracker
    )
    assert result.violation == 2
    assert not result.success
    assert "breaks the constraints by 2, in 1 evaluations" in str(result)
    assert [r["violation"] for r in tracker.results()] == [0, 2]
    header, *_, good, bad = tracker.table().splitlines()
    assert "constraints" in header
    assert good.split()[:5] == ["cmaes", "0", f"{plain.loss:.8g}", f"{plain.best_loss:.8g}", "0"]
    assert bad.split()[:5] == ["scipy.cobyla", "0", "2", "2", "2"]


def test_constraints_that_are_kept_are_not_mentioned() -> None:
    result = hybridopt.minimize(
        bowl, np.ones(2), "slsqp", budget=60, seed=0, constraints=lambda x: x[0] - 0.5
    )
    assert result.violation == 0
    assert result.success
    assert "constraints" not in str(result)


def test_a_score_that_chose_the_point_is_shown() -> None:
    tracker = hybridopt.Tracker()
    for score in (None, lambda x: 0.0):
        result = hybridopt.minimize(
            bowl, np.ones(2), "cmaes", budget=30, seed=0, score=score, tracker=tracker, label="c"
        )
    assert f"score 0 of the kept point, in {result.evaluations} evaluations" in str(result)
    assert [r["score"] for r in tracker.results()] == [None, 0.0]
    header, *_, without, scored = (line.split() for line in tracker.table().splitlines()[1:])
    assert header[5] == "score"
    assert (without[4], scored[4]) == ("30", "0")
