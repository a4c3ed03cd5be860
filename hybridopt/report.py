"""What a person sees of a comparison: a table and a picture."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from hybridopt.tracker import ReportError, RunLog, Tracker, check_folder

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"forward_equivalents": "forward-equivalents", "seconds": "seconds"}
"""What the x axis of a plot can show, with its title."""
COLUMN, ENTRY, LINE = 60, 90, 125
"""Characters at most: of a column of labels, in which longer ones are folded; of a legend's entry, and its line."""


# -- tables -----------------------------------------------------------------------------------------------------


def table(results: Iterable[Mapping[str, Any]], *, width: int | None = None) -> str:
    """One line a run, as text; under it, the message of every run that failed.

    Columns for the score of the kept point, and for by how much the best point breaks the constraints, are there if
    a run has such.

    Args:
        results: records as in `Result.to_dict()`, with `label` (default: their `method`).
        width: characters a line; only labels are folded to fit. None = as wide as needed for labels of 60.
    """
    results = list(results)
    judged = {}
    if any(r.get("score") is not None for r in results):
        judged["score"] = "score"
    if any(r.get("violation", 0) > 0 for r in results):
        judged["violation"] = "constraints\nbroken by"
    counted = ["evalua-\ntions", "forward-\nequivalents", "seconds"]
    made = _table(["method", "seed", "loss", "best loss", *judged.values(), *counted])
    made.add_column("ended by", no_wrap=True)
    failures: dict[tuple[str, str], list[str]] = {}
    for r in results:
        judgements = ("" if r.get(key) is None else _number(r[key]) for key in judged)
        made.add_row(
            _label(r),
            str(r["seed"]),
            _number(r["loss"]),
            _number(r["best_loss"]),
            *judgements,
            str(r["evaluations"]),
            f"{r['forward_equivalents']:g}",
            f"{r['seconds']:.3g}",
            r["reason"],
        )
        if r["reason"] == "failed":
            failures.setdefault((_label(r), str(r.get("message", ""))), []).append(str(r["seed"]))
    lines = [f"{label} failed (seed {', '.join(seeds)}): {why}" for (label, why), seeds in failures.items()]
    return "\n".join([render(made, width), *lines])


def trials(records: Sequence[Mapping[str, Any]], *, width: int | None = None) -> str:
    """One line a trial of a search for hyperparameters, best first, as text.

    Args:
        records: dicts with number, state, loss, seconds, and a value for each parameter that counted.
        width: as in `table`.
    """
    names = list(dict.fromkeys(name for r in records for name in r))[4:]
    made = _table(["trial", "state", "loss", "seconds", *names])
    order = {"complete": 0, "pruned": 1, "failed": 2}
    for r in sorted(records, key=lambda r: (order[r["state"]], r["loss"])):
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (r.get(name, "") for name in names)]
        made.add_row(str(r["number"]), r["state"], _number(r["loss"]), f"{r['seconds']:.3g}", *cells)
    return render(made, width)


def summary(results: Iterable[Mapping[str, Any]], *, width: int | None = None) -> str:
    """One line a method over its seeds, as text: median of the best loss and of the cost, and the spread.

    Args:
        results: as in `table`. Runs that failed are counted and have no part in the other columns.
        width: as in `table`.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for r in results:
        groups.setdefault(_label(r), []).append(r)
    made = _table(["method", "runs", "failed", "median\nbest loss", "lowest", "highest"])
    made.add_column("median forward-\nequivalents", justify="right", no_wrap=True)
    made.add_column("median\nseconds", justify="right", no_wrap=True)
    for label, runs in groups.items():
        ended = [r for r in runs if r["reason"] != "failed"]
        best = [r["best_loss"] for r in ended]
        middle = [statistics.median(r[k] for r in ended) if ended else math.nan for k in AXES]
        losses = [f(best) if best else math.nan for f in (statistics.median, min, max)]
        made.add_row(
            label,
            str(len(runs)),
            str(len(runs) - len(ended)),
            *map(_number, losses),
            f"{middle[0]:g}",
            f"{middle[1]:.3g}",
        )
    return render(made, width)


def render(made: Table, width: int | None = None) -> str:
    """A rich table as plain text: no colours, no markup, no trailing blanks.

    Args:
        made: the table. Columns that may wrap are folded to fit, down to 16 characters; the others never are.
        width: characters a line; None = as wide as the columns may be.
    """
    console = Console(
        file=io.StringIO(),
        width=10_000,
        color_system=None,
        markup=False,
        emoji=False,
        legacy_windows=False,
        force_jupyter=False,  # in a notebook rich would also show an empty output of its own
    )
    for column in made.columns:
        excess = 0 if width is None else console.measure(made).maximum - width
        if excess > 0 and not column.no_wrap:
            widest = max(cell_len(str(cell)) for cell in column.cells)
            column.max_width = max(16, min(widest, column.max_width or widest) - excess)
    with console.capture() as capture:
        console.print(made)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join(line for line in lines if line)


def _table(columns: Sequence[str]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column(columns[0], overflow="fold", max_width=COLUMN)
    for name in columns[1:]:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def _label(record: Mapping[str, Any]) -> str:
    return str(record.get("label", record["method"]))


def _number(value: float) -> str:
    return f"{value:.8g}"


# -- plots ------------------------------------------------------------------------------------------------------


def plot(tracker: Tracker, path: str | Path, x: str = "forward_equivalents") -> Path:
    """Draw the lowest loss seen so far over cost into a file; see `draw`.

    Args:
        tracker: with at least one run.
        path: the file to write; its ending chooses the format (.png, .svg, .pdf, ...).
        x: `"forward_equivalents"` or `"seconds"` (wall clock, since the run's first evaluation).

    Returns:
        The path written.

    Raises:
        ReportError: no runs, another x, an ending that names no format, or a folder that is not there.
    """
    path = Path(path)
    check_plot(path, x)
    draw(tracker, x).savefig(path, dpi=150)
    return path


def draw(tracker: Tracker, x: str = "forward_equivalents") -> Figure:
    """The lowest loss seen so far over cost, both on log scales: one colour a label, one thin line a seed.

    Where a loss is zero or negative the loss axis is symmetric-logarithmic, linear below the smallest magnitude
    drawn. Losses that are not finite are not drawn, so a line begins at its first finite loss; a label without any
    still has its place in the legend, which stands below the axes; of labels of more than 90 characters the middle
    is left out there. pyplot, its backend and its figures are not touched.

    Args:
        tracker, x: as in `plot`.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if not tracker.runs:
        raise ReportError("plot: expected a tracker with at least one run, got an empty one")
    labels = list(dict.fromkeys(run.label for run in tracker.runs))
    texts = [
        text + _remark(tracker, label) for label, text in zip(labels, shortened(labels, ENTRY), strict=True)
    ]
    columns = max(1, LINE // (max(map(len, texts)) + 8))  # 8: the line drawn before each, and space
    height = 5.2 + 0.18 * math.ceil(len(labels) / columns)  # inches; a line of the legend takes 0.18
    figure = Figure(
        figsize=(9, height), layout="constrained"
    )  # draws with Agg, or what the file's format needs
    axes = figure.add_subplot()
    palette = colormaps["tab10"].colors  # type: ignore[attr-defined]
    legend: dict[str, Artist] = {}
    lowest: list[float] = []
    for run in tracker.runs:
        index = labels.index(run.label)
        style: Any = ("-", "--", ":", "-.")[index // len(palette) % 4]
        look: Any = {"color": palette[index % len(palette)], "linestyle": style, "linewidth": 1}
        xs, ys = steps(run, x)
        (line,) = axes.step(xs, ys, where="post", **look)
        axes.plot(xs[-1:], ys[-1:], ".", color=line.get_color())
        legend.setdefault(run.label, line)
        lowest += ys
    if lowest:
        axes.set_xscale("log")
        _scale_losses(axes, lowest)
    axes.set_xlabel(AXES[x])
    axes.set_ylabel("lowest loss so far")
    axes.grid(which="major", alpha=0.3)
    shown = figure.legend(
        list(legend.values()),
        texts,
        loc="outside lower center",
        ncols=columns,
        prop={"family": "monospace", "size": "small"},  # so that a number of characters is a width
    )
    for text in shown.get_texts():
        text.set_parse_math(False)
    return figure


def shortened(labels: Sequence[str], width: int) -> list[str]:
    """Labels of at most `width` characters, the middle of longer ones left out; different labels stay different.

    Example:
        >>> from hybridopt.report import shortened
        >>> shortened(["cmaes(sigma=0.5)", "cmaes(sigma=0.25)", "pso"], 12)
        ['cmaes(…=0.5)', 'cmaes(…0.25)', 'pso']
        >>> shortened(["split(a, a, cmaes)", "split(a, b, cmaes)"], 12)
        ['split(…maes)', 'spli…es) (2)']
    """
    made: list[str] = []
    for label in labels:
        short, again = _without_middle(label, width), 1
        while short in made:
            again += 1
            short = f"{_without_middle(label, width - len(f' ({again})'))} ({again})"
        made.append(short)
    return made


def _without_middle(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    head = width // 2
    return f"{text[:head]}…{text[len(text) - (width - head - 1) :]}"


def check_plot(path: Path, x: str = "forward_equivalents") -> None:
    """Raise `ReportError` if `plot` could not write this file."""
    from matplotlib.backend_bases import FigureCanvasBase

    if x not in AXES:
        raise ReportError(f"plot: expected x to be {' or '.join(map(repr, AXES))}, got {x!r}")
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in known:
        raise ReportError(
            f"plot: expected a file name ending in one of .{', .'.join(known)}, got {path.name!r}"
        )
    check_folder(path)


def steps(run: RunLog, x: str) -> tuple[list[float], list[float]]:
    """The corners of a run's best-so-far curve (cost, lowest loss) and its end; empty without a finite loss."""
    xs: list[float] = []
    ys: list[float] = []
    costs, best = run.column(x), run.column("best_loss")
    for cost, loss in zip(costs, best, strict=True):
        if math.isfinite(loss) and (not ys or loss < ys[-1]):
            xs.append(cost)
            ys.append(loss)
    if ys and costs[-1] > xs[-1]:
        xs.append(costs[-1])
        ys.append(ys[-1])
    return xs, ys


def _scale_losses(axes: Axes, losses: Sequence[float]) -> None:
    if min(losses) > 0:
        axes.set_yscale("log")
        return
    sizes = [abs(v) for v in losses if v != 0] or [1.0]
    axes.set_yscale("symlog", linthresh=max(min(sizes), 1e-12 * max(sizes)))


def _remark(tracker: Tracker, label: str) -> str:
    """What the legend adds about runs that left no curve, or ended in failure."""
    failed = sum(r["reason"] == "failed" for r in tracker.results() if r["label"] == label)
    empty = sum(not steps(run, "forward_equivalents")[0] for run in tracker.runs if run.label == label)
    if failed:
        return f" ({failed} failed)"
    return f" ({empty} without a finite loss)" if empty else ""
