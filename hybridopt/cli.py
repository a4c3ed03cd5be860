"""The command line: `hybridopt compare` and `hybridopt methods [NAME]`."""

from __future__ import annotations

import inspect
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from hybridopt import __version__, registry, report
from hybridopt import compare as comparing
from hybridopt.errors import HybridoptError, MethodError, PluginError, nearest
from hybridopt.harness import Run
from hybridopt.ledger import Budget, Reason
from hybridopt.machine import missing
from hybridopt.optimizer import Method, Need, Step
from hybridopt.problems import builder, names
from hybridopt.text import print_value
from hybridopt.tracker import Tracker, check_folder

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class _UsageFault(click.ClickException):
    """What a person typed wrong: one line on stderr and exit code 2."""

    exit_code = EXIT_USAGE


class _Commands(click.Group):
    """A group that reports every fault of usage, click's own and ours, in one line."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        known = self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            raise _UsageFault(f"unknown command {name!r}{nearest(name, known)}")
        return super().resolve_command(ctx, args)


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning as a person wants it: without the place in our source."""
    click.echo(f"Warning: {message}", err=True)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except click.NoSuchOption as error:
        context = error.ctx
        params = context.command.get_params(context) if context is not None else []
        known = [o for p in params for o in p.opts if o.startswith("--")]
        near = nearest(error.option_name, known)
        raise _UsageFault(f"unknown option {error.option_name!r}{near}") from error
    except click.UsageError as error:
        raise _UsageFault(error.format_message()) from error
    except HybridoptError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise _UsageFault(" ".join(line for line in lines if line.strip("^"))) from error


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True
)
@click.version_option(__version__, prog_name="hybridopt")
@click.pass_context
def main(context: click.Context) -> None:
    """Minimise a PyTorch model's loss with gradient methods, gradient-free methods, and chains of both."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# -- compare ----------------------------------------------------------------------------------------------------


@main.command()
@click.option(
    "--problem",
    default="identity",
    show_default=True,
    metavar="P",
    help=f"{', '.join(names())}, with options as in 'bbob(f=8, d=5)'; or file.py:function, which takes seed or "
    "nothing and returns a Problem or (loss, target).",
)
@click.option(
    "--methods",
    metavar="M,M,...",
    help="Comma-separated methods with options and chains, e.g. 'cmaes(sigma=0.5), dual_annealing(evaluations=500) "
    "> slsqp'. Default: the seven of the seed comparison.",
)
@click.option(
    "--budget",
    metavar="N",
    help="Of each run: 137 (evaluations), 1000fe (forward-equivalents), 30s (seconds). Default: what the seed "
    "comparison sets, else 1000fe a weight, at most 100000fe.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help=f"How many seeds: {comparing.DEFAULT_SEED}, {comparing.DEFAULT_SEED + 1}, ...",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write one object a method and seed.")  # fmt: skip
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Draw the lowest loss over cost; the ending chooses the format.")  # fmt: skip
@click.option(
    "--x",
    type=click.Choice(list(report.AXES)),
    default="forward_equivalents",
    show_default=True,
    help="What the plot shows as cost.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="T",
    help="Of torch; more than one slows small models down.",
)
@click.pass_context
def compare(
    context: click.Context,
    problem: str,
    methods: str | None,
    budget: str | None,
    seeds: int,
    json_file: Path | None,
    plot_file: Path | None,
    x: str,
    threads: int,
) -> None:
    """Run methods on one problem from the same start and show what each reached for what it spent.

    Without options: the seed comparison, seven methods on the problem `identity` with seed 42. The exit code is 1
    if a run failed.
    """
    if json_file is not None:
        check_folder(json_file)
    if plot_file is not None:
        report.check_plot(plot_file, x)
    given = None if methods is None else split_methods(methods)
    lines = comparing.entries(given, own_budgets=problem == "identity")
    limits = None if budget is None else Budget.parse(budget)
    build = builder(problem)
    chosen = range(comparing.DEFAULT_SEED, comparing.DEFAULT_SEED + seeds)
    tracker = Tracker()
    with _threads(threads), _progress(len(lines) * seeds) as display:
        for _ in comparing.runs(build, lines, limits, chosen, tracker=tracker, callbacks=display.step):
            display.advance()
    results = tracker.results()
    _show(results, several=seeds > 1)
    if json_file is not None:
        text = json.dumps(comparing.records(tracker), indent=2, allow_nan=False)
        json_file.write_text(text + "\n", encoding="utf-8")
        click.echo(f"results: {json_file}")
    if plot_file is not None:
        click.echo(f"plot: {tracker.plot(plot_file, x=x)}")
    reasons = {r["reason"] for r in results}
    if Reason.INTERRUPTED.value in reasons:
        context.exit(EXIT_INTERRUPTED)
    if Reason.FAILED.value in reasons:
        context.exit(EXIT_FAILED)


def split_methods(text: str) -> list[str]:
    """The methods of a comma-separated list; commas within brackets or quotes do not separate.

    Raises:
        MethodError: there is nothing between two commas.

    Example:
        >>> from hybridopt.cli import split_methods
        >>> split_methods("cmaes(sigma=0.5, popsize=10), dual_annealing(evaluations=500) > slsqp")
        ['cmaes(sigma=0.5, popsize=10)', 'dual_annealing(evaluations=500) > slsqp']
    """
    parts = [""]
    depth, quote = 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        elif character == "," and depth <= 0:
            parts.append("")
            continue
        parts[-1] += character
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise MethodError(f"methods: expected a method between commas, got {text!r}")
    return parts


def _show(results: list[dict[str, Any]], *, several: bool) -> None:
    width = Console().width if sys.stdout.isatty() else None
    click.echo(report.table(results, width=width))
    if several:
        click.echo("\n" + report.summary(results, width=width))
    settings = {r["label"]: r["method"] for r in results if r["label"] != r["method"]}
    if settings:
        click.echo("\nsettings:")
        for label, method in settings.items():
            click.echo(f"  {label}: {method}")


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Display:
    """What is at work, on a terminal; nothing is drawn when the output goes elsewhere."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)
        self._next = 0.0

    def step(self, run: Run, step: Step) -> None:
        """A callback of the harness: at most ten updates a second."""
        now = time.monotonic()
        if self._progress.disable or now < self._next:
            return
        self._next = now + 0.1
        ledger = run.objective.ledger
        text = f"{run.label} seed {run.seed}: {ledger.evaluations} evaluations, best {ledger.best_loss:.6g}"
        self._progress.update(self._task, description=text)

    def advance(self) -> None:
        """One run is done."""
        self._progress.advance(self._task)


@contextmanager
def _progress(total: int) -> Iterator[_Display]:
    # labels hold brackets, which are no markup here
    columns = (
        SpinnerColumn(),
        BarColumn(20),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not terminal) as progress:
        yield _Display(progress, total)


# -- methods ----------------------------------------------------------------------------------------------------


@main.command()
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the installed methods, what each must have (needs) and what it takes when it is there (uses).

    A package among the needs is not installed.

    With the NAME of a method or composition: its options, their defaults, and what they mean.
    """
    if name is not None:
        click.echo(_description(name))
        return
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("method", "needs", "uses", "summary"):
        made.add_column(column, no_wrap=column != "summary")
    broken = []
    for name in registry.names():
        try:
            kind = registry.factory(name)
        except PluginError as error:
            broken.append(str(error))
            continue
        method = kind if isinstance(kind, type) and issubclass(kind, Method) else Method
        needs = [*_words(method.needs), *(f"package {p}" for p in missing(*getattr(kind, "libraries", ())))]
        made.add_row(name, _listed(needs), _listed(_words(method.uses)), _summary(kind))
    for name in registry.COMPOSED:
        made.add_row(f"{name}(...)", "as inside", "as inside", _summary(registry.composition(name)))
    width = Console().width if sys.stdout.isatty() else None
    click.echo(report.render(made, width))
    for message in broken:
        click.echo(f"broken: {message}", err=True)


def _description(name: str) -> str:
    """A method's options with their defaults, and its docstring."""
    kind = registry.composition(name) if name in registry.COMPOSED else registry.factory(name)
    optimizer = getattr(kind, "cls", kind)  # a torch optimizer, which takes the options, as a method
    options = []
    for option in inspect.signature(optimizer).parameters.values():
        if option.default is not option.empty:
            options.append(f"{option.name}={print_value(option.default)}")
        elif optimizer is kind:
            options.append(option.name)
    return f"{name}({', '.join(options)})\n\n{inspect.getdoc(optimizer)}"


def _words(needs: frozenset[Need]) -> list[str]:
    return sorted(need.value for need in needs)


def _listed(words: list[str]) -> str:
    return ", ".join(words) or "-"


def _summary(kind: Any) -> str:
    return (kind.__doc__ or "").strip().split("\n", 1)[0]


if __name__ == "__main__":
    main()
