"""Tables and plots of comparisons."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

import hybridopt
from hybridopt import report
from hybridopt.report import ReportError
from hybridopt.tracker import RunLog, Tracker


def tracker_of(*curves: tuple[str, int, list[float]]) -> Tracker:
    """A tracker whose runs saw these losses (label, seed, losses), one forward each."""
    tracker = Tracker()
    for label, seed, losses in curves:

        def loss(x: np.ndarray, left: Any = None) -> float:
            return next(left)

        left = iter(losses)
        hybridopt.minimize(
            lambda x, left=left: loss(x, left),
            np.ones(2),
            "pyswarm.pso(swarmsize=10)",
            budget=len(losses),
            bounds=(-1, 1),
            seed=seed,
            tracker=tracker,
            label=label,
        )
    return tracker


def axes_of(tracker: Tracker, x: str = "forward_equivalents") -> Axes:
    (axes,) = report.draw(tracker, x).axes
    return axes


def legend_of(axes: Axes) -> Legend:
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    (legend,) = figure.legends
    return legend


def legend_texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in legend_of(axes).get_texts()]


RESULT = {
    "label": "a", "method": "scipy.slsqp", "seed": 42, "loss": 3.0969475, "best_loss": 2.2315059, "evaluations": 1876,
    "forward": 1876, "backward": 0, "forward_equivalents": 1876.0, "seconds": 0.1234, "reason": "stalled",
    "message": "Iteration limit reached",
}  # fmt: skip
FAILED = RESULT | {
    "label": "b",
    "loss": math.nan,
    "best_loss": math.inf,
    "reason": "failed",
    "message": "no box",
}


# -- tables -----------------------------------------------------------------------------------------------------


def test_table_shows_the_own_loss_and_the_lowest_seen() -> None:
    *_, row = report.table([RESULT]).splitlines()
    assert row.split() == ["a", "42", "3.0969475", "2.2315059", "1876", "1876", "0.123", "stalled"]


def test_table_shows_failures_once_with_their_message() -> None:
    lines = report.table([RESULT, FAILED, FAILED | {"seed": 43}]).splitlines()
    assert lines[-1] == "b failed (seed 42, 43): no box"
    assert lines[-2].split()[-1] == "failed"


def test_table_of_a_result_without_label() -> None:
    plain = {k: v for k, v in RESULT.items() if k != "label"}
    assert "scipy.slsqp" in report.table([plain])


def test_trackers_table_is_this_one() -> None:
    tracker = tracker_of(("a", 1, [3.0, 2.0]))
    assert tracker.table() == report.table(tracker.results())


def test_brackets_in_a_label_are_no_markup() -> None:
    assert "adam(betas=[b],x=:smile:)" in report.table([RESULT | {"label": "adam(betas=[b],x=:smile:)"}])


@pytest.mark.parametrize(("width", "widest"), [(None, 140), (95, 95), (40, 91)])
def test_only_labels_are_folded(width: int | None, widest: int) -> None:
    label = "dual_annealing(evaluations=500, gradients=none) > slsqp(ftol=1e-12, maxiter=500)"
    text = report.table([RESULT | {"label": label}], width=width)
    for number in ("3.0969475", "2.2315059", "1876", "0.123", "stalled"):
        assert number in text
    assert label not in text
    assert max(map(len, text.splitlines())) <= widest
    folded = [line.strip().split("  ")[0] for line in text.splitlines()[3:]]
    assert "".join(folded).replace(" ", "") == label.replace(" ", ""), "nothing is left out"


def test_summary_is_over_seeds_and_counts_failures() -> None:
    runs = [RESULT | {"seed": s, "best_loss": v} for s, v in ((1, 5.0), (2, 1.0), (3, 3.0))]
    rows = report.summary([*runs, FAILED | {"label": "a"}, FAILED]).splitlines()
    assert rows[-2].split() == ["a", "4", "1", "3", "1", "5", "1876", "0.123"]
    assert rows[-1].split()[:4] == ["b", "1", "1", "nan"]


# -- plots ------------------------------------------------------------------------------------------------------


def test_curves_are_steps_of_the_lowest_loss() -> None:
    tracker = tracker_of(("a", 1, [5.0, 7.0, 2.0, 3.0, 2.0]))
    assert report.steps(tracker.runs[0], "forward_equivalents") == ([1.0, 3.0, 5.0], [5.0, 2.0, 2.0])
    line = axes_of(tracker).lines[0]
    assert line.get_drawstyle() == "steps-post"
    assert line.get_xydata().tolist() == [[1, 5], [3, 2], [5, 2]]  # type: ignore[union-attr]


def test_seconds_on_the_x_axis() -> None:
    tracker = tracker_of(("a", 1, [5.0, 2.0]))
    axes = axes_of(tracker, "seconds")
    assert axes.get_xlabel() == "seconds"
    assert list(axes.lines[0].get_xdata()) == tracker.runs[0].column("seconds")


def test_one_colour_a_label_and_all_seeds() -> None:
    axes = axes_of(tracker_of(("a", 1, [5.0, 2.0]), ("b", 1, [4.0, 3.0]), ("a", 2, [6.0, 1.0])))
    curves = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    a1, b1, a2 = (line.get_color() for line in curves)
    assert a1 == a2 != b1
    assert legend_texts(axes) == ["a", "b"]
    assert [h.get_color() for h in legend_of(axes).legend_handles] == [a1, b1]  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("label", ["a", "slsqp(ftol=1e-9)", "W" * 200])
def test_the_legend_lies_beside_the_axes_and_within_the_picture(label: str, count: int) -> None:
    tracker = Tracker()
    for i in range(count):
        tracker.begin(label + f"{i:02}", 0)  # which has no finite loss, as the legend adds
    axes = axes_of(tracker)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    box, outside = legend_of(axes).get_window_extent(), figure.bbox
    assert outside.x0 <= box.x0 < box.x1 <= outside.x1
    assert outside.y0 <= box.y0 < box.y1 <= axes.get_tightbbox().y0  # type: ignore[union-attr]
    assert axes.get_window_extent().height > 0.6 * 5.2 * figure.dpi


def test_long_labels_lose_their_middle_and_stay_different() -> None:
    long = ["x" * 100 + str(i) + "y" * 100 for i in range(12)]
    made = report.shortened(["short", *long], 90)
    assert made[0] == "short"
    assert len(set(made)) == 13
    assert max(map(len, made)) == 90
    assert made[1] == "x" * 45 + "…" + "y" * 44


def test_twelve_labels_look_different() -> None:
    axes = axes_of(tracker_of(*((f"m{i}", 1, [2.0, 1.0]) for i in range(12))))
    curves = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 12


def test_losses_are_on_a_log_scale() -> None:
    axes = axes_of(tracker_of(("a", 1, [5.0, 2.0])))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


@pytest.mark.parametrize("losses", [[5.0, -2.0], [5.0, 0.0], [-1.0, -2.0], [0.0, 0.0]])
def test_losses_that_have_no_logarithm(losses: list[float], tmp_path: Path) -> None:
    tracker = tracker_of(("a", 1, losses))
    assert axes_of(tracker).get_yscale() == "symlog"
    assert tracker.plot(tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.filterwarnings("ignore:.*rejected:RuntimeWarning")
def test_losses_that_are_not_finite_are_not_drawn(tmp_path: Path) -> None:
    tracker = tracker_of(("a", 1, [math.inf, math.nan, 3.0, 4.0]), ("b", 1, [math.nan] * 3))
    assert report.steps(tracker.runs[0], "forward_equivalents") == ([3.0, 4.0], [3.0, 3.0])
    assert legend_texts(axes_of(tracker)) == ["a", "b (1 without a finite loss)"]
    assert tracker.plot(tmp_path / "a.png").stat().st_size > 1000


def test_failed_runs_are_in_the_legend(tmp_path: Path) -> None:
    from hybridopt.compare import compare
    from hybridopt.problems import Problem

    tracker = compare(
        lambda seed: Problem("p", lambda x: (x**2).sum(), np.ones(2)), ["pyswarm.pso", "cma.cmaes"], 10
    )
    assert legend_texts(axes_of(tracker)) == ["pyswarm.pso (1 failed)", "cma.cmaes"]
    only_failed = Tracker()
    only_failed.runs.append(tracker.runs[0])
    assert only_failed.plot(tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["a.png", "a.SVG", "a.pdf"])
def test_the_ending_chooses_the_format(name: str, tmp_path: Path) -> None:
    path = tracker_of(("a $\\no$ _", 1, [5.0, 2.0])).plot(str(tmp_path / name))
    magic = {"a.png": b"\x89PNG", "a.SVG": b"<?xml", "a.pdf": b"%PDF"}[name]
    assert path == tmp_path / name
    assert path.read_bytes().startswith(magic)


@pytest.mark.parametrize(
    ("name", "x", "text"),
    [
        ("a.xyz", "seconds", r"ending in one of .*\.png.*got 'a.xyz'"),
        ("a", "seconds", "ending in one of"),
        ("no/a.png", "seconds", r"expected an existing folder, there is no '.*no'; make it first, or name"),
        ("a.png", "iterations", "'forward_equivalents' or 'seconds', got 'iterations'"),
    ],
)
def test_what_cannot_be_plotted(name: str, x: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=text):
        tracker_of(("a", 1, [5.0, 2.0])).plot(tmp_path / name, x=x)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_plot() -> None:
    with pytest.raises(ReportError, match="at least one run"):
        Tracker().plot("a.png")


def test_the_callers_matplotlib_is_left_alone(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    tracker_of(("a", 1, [5.0, 2.0])).plot(tmp_path / "a.png")
    assert dict(mpl.rcParams) == before


def test_pyplot_is_not_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from hybridopt import report
from hybridopt.tracker import RunLog, Tracker
assert "matplotlib" not in sys.modules, "a table needs no matplotlib"
tracker = Tracker()
tracker.begin("a", 1)
report.plot(tracker, {str(tmp_path / "a.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=_environment())


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_an_empty_log_has_no_curve() -> None:
    assert report.steps(RunLog("a", 1), "seconds") == ([], [])
