"""The floors of docs/architecture.md: a file imports only from floors below, or its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridopt.registry import BUILTIN

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [ROOT / "hybridopt", *sorted((ROOT / "adapters").glob("hybridopt_*"))]

# Every file, or a whole folder of files that may import each other ("/"). A file that stands nowhere is an error.
FLOORS: dict[int, tuple[str, ...]] = {
    1: (
        "hybridopt/bounds.py",
        "hybridopt/callbacks.py",
        "hybridopt/code.py",
        "hybridopt/coordinates.py",
        "hybridopt/rows.py",
        "hybridopt/errors.py",
        "hybridopt/filters.py",
        "hybridopt/ledger.py",
        "hybridopt/machine.py",
        "hybridopt/options.py",
        "hybridopt/randomness.py",
        "hybridopt/rules/",
        "hybridopt/selection.py",
        "hybridopt/space.py",
        "hybridopt/vector.py",
    ),
    2: (
        "hybridopt/accounts.py",
        "hybridopt/batch.py",
        "hybridopt/constraints.py",
        "hybridopt/derivatives.py",
        "hybridopt/evaluation.py",
        "hybridopt/feasibility.py",
        "hybridopt/forms.py",
        "hybridopt/generation.py",
        "hybridopt/guard.py",
        "hybridopt/jacobian.py",
        "hybridopt/objective.py",
        "hybridopt/optimizer.py",
        "hybridopt/point.py",
        "hybridopt/points.py",
        "hybridopt/products.py",
        "hybridopt/program.py",
        "hybridopt/registry.py",
        "hybridopt/residuals.py",
        "hybridopt/result.py",
        "hybridopt/scores.py",
        "hybridopt/text.py",
        "hybridopt/tracker.py",
    ),
    3: (
        "hybridopt/ask.py",
        "hybridopt/carrier.py",
        "hybridopt/differences.py",
        "hybridopt/engines/",
        "hybridopt/gradients.py",
        "hybridopt/initial.py",
        "hybridopt/journal.py",
        "hybridopt/solver.py",
        "hybridopt/start.py",
        "hybridopt/trail.py",
    ),
    4: (
        "hybridopt/optim/",
        "hybridopt/population/",
        "hybridopt_cma/",
        "hybridopt_optuna/",
        "hybridopt_pyswarm/",
        "hybridopt_scipy/",
        "hybridopt_torch/",
    ),
    5: ("hybridopt/compose/", "hybridopt/until.py"),
    6: (
        "hybridopt/adapters.py",
        "hybridopt/presets.py",
    ),  # where methods stand side by side
    7: ("hybridopt/harness.py", "hybridopt/layers.py", "hybridopt/pruning.py", "hybridopt/tuning.py"),
    8: (
        "hybridopt/__init__.py",
        "hybridopt/__main__.py",
        "hybridopt/cli.py",
        "hybridopt/compare.py",
        "hybridopt/problems/",
        "hybridopt/report.py",
        "hybridopt/testing/",
    ),
}

# Folders of methods, which never import each other, and the public or private files that methods there share.
# (In hybridopt/ a private file is always shared, in an adapter package methods are private files.)
METHODS = (
    "hybridopt/optim/",
    "hybridopt/population/",
    "hybridopt/rules/",
    "hybridopt_cma/",
    "hybridopt_optuna/",
    "hybridopt_pyswarm/",
    "hybridopt_scipy/",
    "hybridopt_torch/",
)
SHARED = (
    "hybridopt/population/cmaes.py",  # the search that lq_cmaes spares evaluations
    "hybridopt/optim/own.py",
    "hybridopt/rules/adam.py",  # SparseAdam's too
    "hybridopt_scipy/_minimize.py",
    "hybridopt_torch/_closure.py",
    "hybridopt_torch/_inplace.py",
    "hybridopt_torch/_many.py",
    "hybridopt_torch/_method.py",
    "hybridopt_torch/ours.py",
)

# Files that must work with any method and therefore name none.
NAMELESS = ("hybridopt/compose/", "hybridopt/harness.py", "hybridopt/report.py")


def place(file: Path) -> str:
    """Path as in FLOORS: from the source root on."""
    base = ROOT / "adapters" if (ROOT / "adapters") in file.parents else ROOT
    return file.relative_to(base).as_posix()


FILES = {place(file): file for package in PACKAGES for file in sorted(package.rglob("*.py"))}


def within(name: str, folder: str) -> bool:
    return name.startswith(folder) if folder.endswith("/") else name == folder


def floors_of(name: str) -> list[int]:
    return [floor for floor, members in FLOORS.items() for member in members if within(name, member)]


def imports(file: Path, name: str) -> Iterator[tuple[int, str]]:
    """(line, place) of each of our own files that a file imports, anywhere in it, for types only included."""
    package = name.split("/")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules = [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            modules = [(".".join([*base, *filter(None, [node.module])]), tuple(a.name for a in node.names))]
        else:
            continue
        for module, members in modules:
            path = module.replace(".", "/")
            if path.split("/")[0] not in {p.name for p in PACKAGES}:
                continue
            for member in members or ("",):
                candidates = (
                    f"{path}/{member}.py",
                    f"{path}/{member}/__init__.py",
                    f"{path}.py",
                    f"{path}/__init__.py",
                )
                found = next((c for c in candidates if c in FILES), None)
                assert found is not None, f"{name}:{node.lineno} imports {module}, which does not exist"
                yield node.lineno, found


def test_every_file_has_one_floor() -> None:
    unknown = [name for name in FILES if len(floors_of(name)) != 1]
    assert not unknown, f"put them on a floor in {Path(__file__).name}: {unknown}"
    gone = [m for members in FLOORS.values() for m in members if not any(within(name, m) for name in FILES)]
    assert not gone, f"on a floor, but not there: {gone}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_floors_below_or_its_own(name: str) -> None:
    (own,) = floors_of(name)
    upwards = [
        f"{name}:{line} (floor {own}) imports {other} (floor {floors_of(other)[0]})"
        for line, other in imports(FILES[name], name)
        if floors_of(other)[0] > own
    ]
    assert not upwards


def is_method(name: str) -> bool:
    private = Path(name).name.startswith("_") and name.startswith("hybridopt/")
    in_folder = any(within(name, folder) for folder in METHODS)
    return in_folder and not private and name not in SHARED and Path(name).name != "__init__.py"


@pytest.mark.parametrize("name", [n for n in FILES if any(within(n, folder) for folder in METHODS)])
def test_methods_never_import_each_other(name: str) -> None:
    (folder,) = [f for f in METHODS if within(name, f)]
    for line, other in imports(FILES[name], name):
        if not is_method(other) or other == name:
            continue
        lists_its_own = name == f"{folder}__init__.py" and within(other, folder)
        own_equation = within(other, "hybridopt/rules/") and Path(other).name == Path(name).name
        assert lists_its_own or own_equation, f"{name}:{line} imports {other}"


@pytest.mark.parametrize("name", [n for n in FILES if any(within(n, m) for m in NAMELESS)])
def test_compositions_harness_and_report_name_no_method(name: str) -> None:
    known = {part for full in BUILTIN for part in (full, full.rpartition(".")[2])}
    known |= {value.rpartition(":")[2] for value in BUILTIN.values()}
    known -= {"sobol"}  # a sequence of points too, to begin at
    tree = ast.parse(FILES[name].read_text())
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    named = [
        f"{name}:{node.lineno} {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in documentation and node.value in known
    ]
    assert not named


@pytest.mark.parametrize("name", FILES)
def test_nothing_prints_or_exits(name: str) -> None:
    if name in ("hybridopt/cli.py",):
        return
    calls = [
        f"{name}:{node.lineno}"
        for node in ast.walk(ast.parse(FILES[name].read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("print", "exit", "quit")
    ]
    assert not calls
