"""The command line, as a person or a script uses it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import hybridopt
from hybridopt import cli, registry
from hybridopt_optuna import TPE

KEYS = ["method", "seed", "loss", "best_loss", "evaluations", "forward", "backward", "forward_equivalents",
        "seconds", "reason"]  # fmt: skip
PROBLEM = """
import torch
from hybridopt.problems import Problem

def bowl():
    return (lambda x: (x**2).sum()), torch.ones(2)

def boxed(seed):
    return Problem("boxed", lambda x: (x**2).sum(), torch.full((2,), seed / 100), bounds=(-1, 1))

def nan():
    return (lambda x: (x * float("nan")).sum()), torch.ones(2)

def shared(made=[]):
    made.append(torch.ones(2))
    return (lambda x: (x**2).sum()), made[0]
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(PROBLEM)
    return str(path)


# -- compare ----------------------------------------------------------------------------------------------------


def test_json_has_one_object_a_method_and_seed(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    methods = "pyswarm.pso, adam(lr=0.1, steps=20) > cma.cmaes"
    result = run("compare", "--methods", methods, "--budget", "30", "--seeds", "2", "--json", str(out))
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [list(r) for r in found] == [KEYS] * 4
    chain = "adam(lr=0.1, steps=20) > cma.cmaes"
    assert [(r["method"], r["seed"]) for r in found] == [
        ("pyswarm.pso", 42),
        ("pyswarm.pso", 43),
        (chain, 42),
        (chain, 43),
    ]
    assert {r["evaluations"] for r in found} == {30}
    assert {r["reason"] for r in found} == {"evaluations"}
    for r in found:
        assert f"{r['best_loss']:.8g}" in result.stdout
    assert f"results: {out}" in result.stdout
    assert "median" in result.stdout  # of several seeds
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "problem", "budgets"),
    [([], "identity", [100] + [100_000] * 6), (["--problem", "digits"], "digits", [None] * 7)],
)
def test_without_methods_it_is_the_seed_comparison(
    arguments: list[str], problem: str, budgets: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def runs(build: Any, lines: Any, budget: Any, seeds: Any, **more: Any) -> Any:
        own = [None if e.budget is None else e.budget.evaluations for e in lines]
        seen.extend([build(0).name, [e.label for e in lines], own, budget, list(seeds)])
        return iter(())

    monkeypatch.setattr("hybridopt.compare.runs", runs)
    assert run("compare", *arguments).exit_code == 0
    labels = ["adam", "slsqp-fd", "slsqp", "pso", "cmaes", "dual_annealing", "dual_annealing > slsqp"]
    assert seen == [problem, labels, budgets, None, [42]]


def test_labels_are_explained() -> None:
    result = run("compare", "--budget", "5")
    assert "slsqp-fd: scipy.slsqp(" in result.stdout
    assert "eps=0.001" in result.stdout


@pytest.mark.parametrize(
    ("budget", "counter", "most"),
    [("17", "evaluations", 17), ("40fe", "forward_equivalents", 40), ("0.05s", "seconds", 2.0)],
)
def test_budgets(budget: str, counter: str, most: float, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run("compare", "--methods", "adam", "--budget", budget, "--json", str(out))
    [row] = json.loads(out.read_text())
    assert row["reason"] == counter
    assert row[counter] <= most


def test_default_budget_of_chosen_methods(file: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run("compare", "--problem", f"{file}:bowl", "--methods", "torch.sgd(lr=0)", "--json", str(out))
    [row] = json.loads(out.read_text())
    assert row["forward_equivalents"] == 3000  # 1000 (n + 1), n = 2


def test_users_problem(file: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = run(
        "compare",
        "--problem",
        f"{file}:boxed",
        "--methods",
        "pyswarm.pso,slsqp",
        "--budget",
        "1000",
        "--json",
        str(out),
    )
    assert result.exit_code == 0, result.output
    assert [r["best_loss"] < 1e-3 for r in json.loads(out.read_text())] == [True, True]


def test_plot(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    result = run("compare", "--methods", "slsqp", "--budget", "20", "--plot", str(out), "--x", "seconds")
    assert result.exit_code == 0, result.output
    assert f"plot: {out}" in result.stdout
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_plot_has_the_axis_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(hybridopt.Tracker, "plot", lambda self, path, x: seen.append(x) or path)
    for axis in ("seconds", "forward_equivalents"):
        run("compare", "--methods", "slsqp", "--budget", "2", "--plot", "out.png", "--x", axis)
    assert seen == ["seconds", "forward_equivalents"]


def test_a_failed_method_is_shown_and_the_others_go_on(file: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = run(
        "compare",
        "--problem",
        f"{file}:bowl",
        "--methods",
        "pyswarm.pso,slsqp",
        "--budget",
        "50",
        "--json",
        str(out),
    )
    assert result.exit_code == 1
    assert "pyswarm.pso failed (seed 42): pyswarm.pso: expected finite bounds" in result.stdout
    failed, fine = json.loads(out.read_text())
    assert failed["reason"] == "failed"
    assert failed["loss"] is failed["best_loss"] is None
    assert fine["reason"] == "converged"


@pytest.mark.filterwarnings("default")
def test_losses_that_are_not_finite_are_null(file: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = run(
        "compare", "--problem", f"{file}:nan", "--methods", "cma.cmaes", "--budget", "5", "--json", str(out)
    )
    assert result.stderr.startswith("Warning: loss nan at evaluation 1")
    assert result.stderr.count("\n") == 1
    [row] = json.loads(out.read_text())
    assert row["best_loss"] is None
    assert row["reason"] == "non_finite"


def test_an_interrupt_ends_it_with_what_was_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli._Display, "step", lambda self, run, step: run.steps == 3)
    out = tmp_path / "out.json"
    result = run("compare", "--methods", "slsqp,cma.cmaes", "--budget", "50", "--json", str(out))
    assert result.exit_code == 130
    assert [r["reason"] for r in json.loads(out.read_text())] == ["interrupted"]


def test_threads_are_set_for_the_run_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        cli._Display, "step", lambda self, run, step: seen.append(torch.get_num_threads()) or None
    )
    torch.set_num_threads(2)
    run("compare", "--methods", "slsqp", "--budget", "2", "--threads", "3")
    run("compare", "--methods", "slsqp", "--budget", "2")
    assert seen == [3, 3, 1, 1]
    assert torch.get_num_threads() == 2


# -- faults of usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["compare", "--problem", "identty"], "unknown name 'identty'; nearest: identity"),
        (["compare", "--problem", "nowhere.py:f"], "there is no file 'nowhere.py'"),
        (["compare", "--methods", "slsq"], "unknown name 'slsq'; nearest: slsqp"),
        (["compare", "--methods", "slsqp > adm"], "unknown name 'adm'; nearest: adam"),
        (["compare", "--methods", "slsqp(ftl=1)"], "unknown option 'ftl'; nearest: ftol"),
        (["compare", "--methods", "adam(l=1)"], "unknown option 'l'; nearest: lr"),
        (["compare", "--methods", "slsqp > slsqp(ftl=1)"], "unknown option 'ftl'; nearest: ftol"),
        (["compare", "--methods", "slsqp(ftol=1"], "expected"),
        (["compare", "--methods", "slsqp,,pyswarm.pso"], "expected a method between commas"),
        (["compare", "--methods", "slsqp-fd"], "write 'scipy.slsqp(gradients=differences"),
        (["compare", "--methods", "slsqp,slsqp"], "given twice"),
        (["compare", "--budget", "3x"], "'137' (evaluations), '1000fe'"),
        (["compare", "--budget", "0"], "evaluations > 0"),
        (["compare", "--seeds", "0"], "--seeds"),
        (["compare", "--budgt", "3"], "unknown option '--budgt'; nearest: --budget"),
        (["compare", "--json", "nowhere/out.json"], "there is no 'nowhere'"),
        (["compare", "--plot", "nowhere/out.png"], "there is no 'nowhere'"),
        (["compare", "--plot", "out.xyz"], "ending in one of"),
        (["compare", "--x", "iterations"], "'forward_equivalents', 'seconds'"),
        (["compare", "extra"], "extra"),
        (["methods", "SLSQP"], "unknown name 'SLSQP'; nearest: slsqp"),
        (["methods", "slsqp", "adam"], "adam"),
        (["compar"], "unknown command 'compar'; nearest: compare"),
        (["--versio"], "unknown option '--versio'; nearest: --version"),
    ],
)
def test_one_clear_line(arguments: list[str], text: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert text in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_shared_target_is_one_line_too(file: str) -> None:
    result = run("compare", "--problem", f"{file}:shared", "--methods", "slsqp,cma.cmaes", "--budget", "20")
    assert result.exit_code == 2
    assert "expected the same start" in result.stderr
    assert result.stderr.count("\n") == 1


def test_split_methods() -> None:
    split = cli.split_methods
    assert split("a,b") == ["a", "b"]
    assert split(" a(x=1, y=(2, 3)) , b[1,2] > c ") == ["a(x=1, y=(2, 3))", "b[1,2] > c"]
    assert split("a(x='p,q'), b(y=\"r,)\")") == ["a(x='p,q')", 'b(y="r,)")']
    assert split("(a > b)(evaluations=3),c") == ["(a > b)(evaluations=3)", "c"]


# -- the rest ---------------------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    assert run("--version").stdout == f"hybridopt, version {hybridopt.__version__}\n"
    assert "compare" in run().stdout
    shown = run("compare", "-h").stdout
    for option in (
        "--problem",
        "--methods",
        "--budget",
        "--seeds",
        "--json",
        "--plot",
        "--threads",
        "digits",
        "bbob(f=8, d=5)",
    ):
        assert option in shown


def test_methods_lists_what_each_needs() -> None:
    result = run("methods")
    rows = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert set(registry.names()) <= set(rows)
    assert rows["pyswarm.pso"].split()[1:3] == ["bounds", "constraints"]
    assert rows["torch.adam"].split()[1:3] == ["gradient", "bounds"]
    assert "quasi-Newton" in rows["scipy.slsqp"]
    assert result.stderr == ""


def test_methods_says_which_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TPE, "libraries", ("optuna", "no_such_package_here"))
    rows = {line.split()[0]: line for line in run("methods").stdout.splitlines()}
    assert "bounds, package no_such_package_here  " in rows["optuna.tpe"]
    assert [name for name, row in rows.items() if "package no_such_package_here" in row] == ["optuna.tpe"]


def test_methods_lists_compositions_too() -> None:
    rows = [line.split()[0] for line in run("methods").stdout.splitlines()]
    assert {f"{name}(...)" for name in registry.COMPOSED} <= set(rows)


@pytest.mark.parametrize(
    ("name", "call", "meaning"),
    [
        ("slsqp", "slsqp(ftol=1e-06, maxiter=100, eps=None, gradients=auto)", "ftol: stop when the loss"),
        ("torch.sgd", "torch.sgd(lr=0.001, momentum=0, dampening=0", "momentum (float, optional)"),
        ("adam", "adam(lr=0.001, betas=(0.9, 0.999)", "weight_decay"),
        ("restart", "restart(method, begin_at=perturb, sigma=None", "sigma: in solver coordinates"),
        ("race", "race(methods, rung=None, keep=0.5)", "keep: the part that goes on"),
    ],
)
def test_methods_shows_the_options_of_one(name: str, call: str, meaning: str) -> None:
    result = run("methods", name)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(call)
    assert meaning in result.stdout


def test_every_method_can_be_shown() -> None:
    for name in (*registry.names(), *registry.COMPOSED):
        assert cli._description(name).startswith(f"{name}("), name


def test_the_package_runs_as_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hybridopt", "--version"],
        capture_output=True, text=True, timeout=120, env=environment(), check=True,
    )  # fmt: skip
    assert done.stdout == f"hybridopt, version {hybridopt.__version__}\n"


def test_methods_reports_a_broken_plugin_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = registry._entries() | {"my.broken": EntryPoint("my.broken", "nowhere_at_all:X", registry.GROUP)}
    monkeypatch.setattr(registry, "_entries", lambda: entries)
    result = run("methods")
    assert result.exit_code == 0
    assert "my.broken" in result.stderr
    assert "nowhere_at_all" in result.stderr
    assert "my.broken" not in result.stdout
    assert "scipy.slsqp" in result.stdout


COMMAND = [
    sys.executable,
    "-W",
    "error",
    "-m",
    "hybridopt.cli",
    "compare",
    "--methods",
    "cma.cmaes",
    "--budget",
    "2000",
]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "120"}


def test_no_progress_when_piped() -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=120, env=environment(), check=True)
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "cma.cmaes" in done.stdout


def test_progress_on_a_terminal() -> None:
    main, terminal = pty.openpty()
    with subprocess.Popen(COMMAND, stdout=terminal, stderr=terminal, env=environment()) as process:
        os.close(terminal)
        seen = b""
        try:
            while part := os.read(main, 4096):
                seen += part
        except OSError:  # how Linux says that the other side is closed
            pass
        assert process.wait(120) == 0
    os.close(main)
    text = seen.decode()
    assert "cma.cmaes seed 42:" in text
    assert "1/1" in text
    assert text.index("cma.cmaes seed 42:") < text.rindex("ended by")
