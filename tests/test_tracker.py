"""One row per evaluation, in counters that mean the same for every method."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from hybridopt import Tracker, minimize
from hybridopt.tracker import ReportError


def rosenbrock(x):
    return ((1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2).sum()


@pytest.fixture(scope="module")
def tracker() -> Tracker:
    tracker = Tracker()
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    for method in ("cmaes(popsize=6, evaluations=20) > slsqp", "slsqp(gradients=differences)"):
        minimize(rosenbrock, x.clone(), method, budget=60, seed=0, tracker=tracker, label=method[:5])
    return tracker


def test_one_row_per_evaluation_with_running_counters(tracker):
    for run, result in zip(tracker.runs, tracker.results(), strict=True):
        rows = list(run.rows())
        assert [r.evaluations for r in rows] == list(range(1, result["evaluations"] + 1))
        assert rows[-1].forward == result["forward"]
        assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(rows))
        assert all(r.forward_equivalents == r.forward + 2 * r.backward for r in rows)
        assert [r.best_loss for r in rows] == list(np.minimum.accumulate([r.loss for r in rows]))
        assert rows[-1].best_loss == result["best_loss"]


def test_stages_and_probes_are_marked(tracker):
    chain, differences = tracker.runs
    assert {(r.method, r.stage) for r in chain.rows()} == {("cmaes", 0), ("scipy.slsqp", 1)}
    assert [r.stage for r in chain.rows()].count(0) == 20
    assert sum(r.probe for r in chain.rows()) == 1  # the check of the gradient
    assert 0 < sum(r.probe for r in differences.rows()) < len(differences)


def test_columns(tracker):
    run = tracker.runs[0]
    assert run.column("loss") == [r.loss for r in run.rows()]
    assert run.column("evaluations") == [r.evaluations for r in run.rows()]
    with pytest.raises(KeyError, match="expected one of"):
        run.column("iterations")


def test_plain_data(tracker, tmp_path):
    data = tracker.to_dict()
    assert [r["label"] for r in data["runs"]] == ["cmaes", "slsqp"]
    assert len(data["runs"][0]["rows"]) == len(tracker.runs[0])
    path = tmp_path / "rows.jsonl"
    tracker.to_jsonl(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == sum(map(len, tracker.runs))
    assert rows[0]["label"] == "cmaes"


def test_rows_need_a_folder(tracker, tmp_path):
    with pytest.raises(ReportError, match="expected an existing folder, there is no"):
        tracker.to_jsonl(tmp_path / "no" / "rows.jsonl")


def test_losses_that_are_not_finite_become_null(tmp_path):
    tracker = Tracker()
    with pytest.warns(RuntimeWarning, match="rejected"):
        minimize(lambda x: float("nan"), np.zeros(2), "cmaes", budget=3, seed=0, tracker=tracker)
    tracker.to_jsonl(tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows] == [None] * 3
    assert [r["best_loss"] for r in rows] == [None] * 3


def test_table_and_plot(tracker, tmp_path):
    text = tracker.table()
    assert "cmaes" in text
    assert "slsqp" in text
    written = tracker.plot(tmp_path / "losses.png")
    assert written.read_bytes()[:4] == b"\x89PNG"
