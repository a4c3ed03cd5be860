"""`hybridopt.registry`: methods by name, and plugins that may be broken or claim a name twice."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from hybridopt import registry
from hybridopt.adapters import SLSQP, Adam
from hybridopt.errors import MethodError, PluginError
from hybridopt.optimizer import Method
from hybridopt.text import method

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend that these entry points, name=value, are installed (and no others)."""

    def install(**entries: str) -> None:
        found = [
            EntryPoint(name.replace("__", "."), value, registry.GROUP) for name, value in entries.items()
        ]
        monkeypatch.setattr(registry, "entry_points", lambda group: found if group == registry.GROUP else [])
        registry.reload()

    yield install
    monkeypatch.undo()
    registry.reload()


def test_the_table_for_a_bare_checkout_is_what_pyproject_registers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][registry.GROUP] == registry.BUILTIN


def test_everything_registered_is_a_method_under_its_own_name(plugins: Callable[..., None]) -> None:
    plugins()
    found = registry.methods()
    assert sorted(found) == registry.names() == sorted(registry.BUILTIN)
    for name, cls in found.items():
        assert issubclass(cls, Method)
        assert cls.name == name
        assert method(name) == cls()
        assert str(cls()) == name, "all options have defaults, and defaults are not printed"
        assert cls.__doc__


def test_the_lazy_facade_offers_the_same_classes() -> None:
    import hybridopt.adapters as facade

    outside = {made for name, made in registry.methods().items() if "." in name}
    assert {getattr(facade, name) for name in facade.__all__} == outside
    with pytest.raises(AttributeError, match=r"no attribute 'Slsqp'; known: .*SLSQP"):
        facade.Slsqp  # noqa: B018


def test_importing_hybridopt_imports_no_outside_solver() -> None:
    code = (
        "import sys, hybridopt, hybridopt.registry; hybridopt.registry.names()\n"
        "print([m for m in ('cma', 'pyswarm', 'scipy.optimize', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    path = [str(ROOT), str(ROOT / "adapters")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_a_bare_name_stands_for_the_only_one_that_ends_in_it(plugins: Callable[..., None]) -> None:
    plugins(other__newton="hybridopt_scipy:SLSQP", plain="hybridopt_scipy:SLSQP")
    assert registry.full_name("slsqp") == "scipy.slsqp"
    assert registry.full_name("scipy.slsqp") == "scipy.slsqp"
    assert registry.full_name("newton") == "other.newton"
    assert registry.full_name("plain") == "plain"
    plugins(other__cobyla="hybridopt_scipy:SLSQP", other__slsqp="hybridopt_scipy:COBYLA")
    assert registry.full_name("cobyla") == "scipy.cobyla", "what is installed beside takes no name away"
    assert str(method("auto")) == "auto"
    assert str(method("restart(slsqp)")) == "restart(scipy.slsqp)"
    plugins(some__newton="hybridopt_scipy:SLSQP", other__newton="hybridopt_scipy:SLSQP")
    with pytest.raises(
        MethodError, match=r"'newton' could be other\.newton or some\.newton; write one of them"
    ):
        registry.full_name("newton")
    # "the bare name is ours once we have our own": a full name wins
    plugins(cobyla="hybridopt_scipy:SLSQP")
    assert method("cobyla") == SLSQP()
    assert str(method("scipy.cobyla")) == "scipy.cobyla"
    assert method("torch.adam") == Adam() != method("adam")
    for wrong in ("lsqp", "scipy.slsq", "torch.Adam"):
        with pytest.raises(MethodError, match=rf"unknown name '{wrong}'; nearest: "):
            registry.full_name(wrong)
    with pytest.raises(MethodError, match=r"unknown name 'zzzz'; known: .*slsqp"):
        registry.full_name("zzzz")


def test_a_name_that_two_plugins_claim_is_an_error(plugins: Callable[..., None]) -> None:
    plugins(scipy__slsqp="mine:SLSQP")
    with pytest.raises(
        PluginError,
        match=r"'scipy\.slsqp' is claimed twice, by 'hybridopt_scipy:SLSQP' and 'mine:SLSQP'; rename",
    ):
        method("cma.cmaes")
    plugins(scipy__slsqp="hybridopt_scipy:SLSQP")  # the same one again (an editable install beside a wheel)
    assert method("slsqp") == SLSQP()


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        (None, "ModuleNotFoundError"),
        ("raise OSError('libfoo.so is missing')", "libfoo.so is missing"),
        ("raise SystemExit(3)", "SystemExit"),
        ("x = (", "SyntaxError"),
        ("pass", "AttributeError"),
        ("Newton = 3", "is 3, expected a subclass of hybridopt.Method"),
        ("class Newton: pass", "expected a subclass of hybridopt.Method"),
    ],
)
def test_a_broken_plugin_is_reported_by_name_and_skipped(
    plugins: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str | None,
    cause: str,
) -> None:
    if source is not None:
        (tmp_path / "broken_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
    plugins(foo__newton="broken_plugin:Newton")
    assert "foo.newton" in registry.names(), "listing names imports nothing"
    with pytest.warns(RuntimeWarning, match=r"plugin: 'foo\.newton' .*; it is left out") as caught:
        found = registry.methods()
    assert len(caught) == 1
    assert cause in str(caught[0].message)
    assert sorted(found) == sorted(registry.BUILTIN)
    assert method("slsqp") == SLSQP(), "the others work"
    with pytest.raises(PluginError, match=r"plugin: 'foo\.newton' \(broken_plugin:Newton\)"):
        method("newton")
