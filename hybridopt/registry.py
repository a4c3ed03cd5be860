"""Methods by name: built in, or from third parties by the entry point group `hybridopt.optimizers`."""

from __future__ import annotations

import functools
import importlib
import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from hybridopt.errors import MethodError, PluginError, nearest
from hybridopt.optimizer import Method

GROUP = "hybridopt.optimizers"

# What this distribution registers by entry point itself, so that a bare checkout works too (a test keeps the two
# equal).
BUILTIN: dict[str, str] = {
    "adadelta": "hybridopt_torch.ours:Adadelta",
    "adagrad": "hybridopt_torch.ours:Adagrad",
    "sparse_adam": "hybridopt_torch.ours:SparseAdam",
    "muon": "hybridopt_torch.ours:Muon",
    "lbfgs": "hybridopt_torch.ours:LBFGS",
    "lamb": "hybridopt_torch.ours:LAMB",
    "ademamix": "hybridopt_torch.ours:AdEMAMix",
    "amsgrad": "hybridopt_torch.ours:AMSGrad",
    "adafactor": "hybridopt_torch.ours:Adafactor",
    "adam": "hybridopt_torch.ours:Adam",
    "adamax": "hybridopt_torch.ours:Adamax",
    "adamw": "hybridopt_torch.ours:AdamW",
    "adan": "hybridopt_torch.ours:Adan",
    "adopt": "hybridopt_torch.ours:ADOPT",
    "asgd": "hybridopt_torch.ours:ASGD",
    "lion": "hybridopt_torch.ours:Lion",
    "nadam": "hybridopt_torch.ours:NAdam",
    "radam": "hybridopt_torch.ours:RAdam",
    "rmsprop": "hybridopt_torch.ours:RMSprop",
    "rprop": "hybridopt_torch.ours:Rprop",
    "sgd": "hybridopt_torch.ours:SGD",
    "auto": "hybridopt.presets:Auto",
    "cmaes": "hybridopt.population.cmaes:CMAES",
    "coordinate_search": "hybridopt.population.line:CoordinateSearch",
    "bayes": "hybridopt.population.bayes:BayesianOptimization",
    "lq_cmaes": "hybridopt.population.surrogate:LQCMAES",
    "pso": "hybridopt.population.pso:PSO",
    "de": "hybridopt.population.de:DifferentialEvolution",
    "snes": "hybridopt.population.nes:SNES",
    "xnes": "hybridopt.population.nes:XNES",
    "openai_es": "hybridopt.population.es:OpenAIES",
    "pgpe": "hybridopt.population.es:PGPE",
    "random_search": "hybridopt.population.sampling:RandomSearch",
    "sobol": "hybridopt.population.sampling:SobolSearch",
    "cma.cmaes": "hybridopt_cma:CMAES",
    "optuna.cmaes": "hybridopt_optuna:OptunaCMAES",
    "optuna.tpe": "hybridopt_optuna:TPE",
    "pyswarm.pso": "hybridopt_pyswarm:PSO",
    "scipy.basinhopping": "hybridopt_scipy:BasinHopping",
    "scipy.bfgs": "hybridopt_scipy:BFGS",
    "scipy.cg": "hybridopt_scipy:CG",
    "scipy.least_squares": "hybridopt_scipy:LeastSquares",
    "scipy.newton_cg": "hybridopt_scipy:NewtonCG",
    "scipy.trust_ncg": "hybridopt_scipy:TrustNCG",
    "scipy.trust_krylov": "hybridopt_scipy:TrustKrylov",
    "scipy.trust_exact": "hybridopt_scipy:TrustExact",
    "scipy.dogleg": "hybridopt_scipy:Dogleg",
    "scipy.cobyla": "hybridopt_scipy:COBYLA",
    "scipy.cobyqa": "hybridopt_scipy:COBYQA",
    "scipy.differential_evolution": "hybridopt_scipy:DifferentialEvolution",
    "scipy.direct": "hybridopt_scipy:DIRECT",
    "scipy.lbfgsb": "hybridopt_scipy:LBFGSB",
    "scipy.nelder_mead": "hybridopt_scipy:NelderMead",
    "scipy.powell": "hybridopt_scipy:Powell",
    "scipy.shgo": "hybridopt_scipy:SHGO",
    "scipy.tnc": "hybridopt_scipy:TNC",
    "scipy.trust_constr": "hybridopt_scipy:TrustConstr",
    "scipy.dual_annealing": "hybridopt_scipy:DualAnnealing",
    "scipy.slsqp": "hybridopt_scipy:SLSQP",
    "torch.adadelta": "hybridopt_torch:Adadelta",
    "torch.adafactor": "hybridopt_torch:Adafactor",
    "torch.adagrad": "hybridopt_torch:Adagrad",
    "torch.adam": "hybridopt_torch:Adam",
    "torch.adamax": "hybridopt_torch:Adamax",
    "torch.adamw": "hybridopt_torch:AdamW",
    "torch.asgd": "hybridopt_torch:ASGD",
    "torch.lbfgs": "hybridopt_torch:LBFGS",
    "torch.muon": "hybridopt_torch:Muon",
    "torch.nadam": "hybridopt_torch:NAdam",
    "torch.radam": "hybridopt_torch:RAdam",
    "torch.rmsprop": "hybridopt_torch:RMSprop",
    "torch.rprop": "hybridopt_torch:Rprop",
    "torch.sgd": "hybridopt_torch:SGD",
    "torch.sparse_adam": "hybridopt_torch:SparseAdam",
}

# Compositions and bridges that floors below them reach by name, so that nothing imports upwards.
_COMPOSITIONS: dict[str, str] = {
    "chain": "hybridopt.compose.chain:chain",
    "stage": "hybridopt.compose.stage:stage",
    "rules": "hybridopt.until:RULES",
    "cycle": "hybridopt.compose.chain:Cycle",
    "restart": "hybridopt.compose.restart:Restart",
    "race": "hybridopt.compose.race:Race",
    "portfolio": "hybridopt.compose.portfolio:Portfolio",
    "multistart": "hybridopt.compose.multistart:MultiStart",
    "split": "hybridopt.compose.split:Split",
    "torch": "hybridopt_torch:method_of",
    "table": "hybridopt.report:table",
    "plot": "hybridopt.report:plot",
    "trials": "hybridopt.report:trials",
}


COMPOSED = ("cycle", "restart", "split", "race", "portfolio", "multistart")
"""Compositions that the text form writes as a call with methods inside: `restart(slsqp, sigma=1)`."""


@functools.cache
def _entries() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {
        name: EntryPoint(name=name, value=value, group=GROUP) for name, value in BUILTIN.items()
    }
    for entry in entry_points(group=GROUP):
        other = found.get(entry.name)
        if other is not None and other.value != entry.value:
            raise PluginError(
                f"plugin: the name {entry.name!r} is claimed twice, by {other.value!r} and {entry.value!r}; rename "
                "or uninstall one of them"
            )
        found[entry.name] = entry
    return found


def reload() -> None:
    """Look for plugins again (after one was installed into a running process)."""
    _entries.cache_clear()


def names() -> list[str]:
    """All registered names, without importing anything."""
    return sorted(_entries())


def full_name(name: str) -> str:
    """The registered name that `name` stands for; a bare name (`slsqp`) stands for the one that ends in it.

    Where several do, the one of this distribution.

    Raises:
        MethodError: unknown (the nearest names are shown), or several end in it.
    """
    entries = _entries()
    if name in entries:
        return name
    ends = [full for full in entries if full.rpartition(".")[2] == name]
    # what somebody installs beside takes no name away
    own = [full for full in ends if full in BUILTIN]
    if len(ends) == 1 or len(own) == 1:
        return (own or ends)[0]
    if ends:
        raise MethodError(f"method: {name!r} could be {' or '.join(sorted(ends))}; write one of them")
    short = {full.rpartition(".")[2]: full for full in entries}
    raise MethodError(f"method: unknown name {name!r}{nearest(name, {*entries, *short})}")


def factory(name: str) -> Any:
    """What makes the named method: a `Method` class; for a place `"package.module:Class"`, whatever stands there.

    Raises:
        MethodError: unknown name.
        PluginError: it cannot be imported, or is no method (its name and the cause are given).
    """
    if ":" in name:
        entry = EntryPoint(name=name, value=name, group=GROUP)
    else:
        entry = _entries()[full_name(name)]
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:
        raise PluginError(f"plugin: {entry.name!r} ({entry.value}) cannot be imported: {error!r}") from error
    if ":" not in name and not (isinstance(found, type) and issubclass(found, Method)):
        raise PluginError(
            f"plugin: {entry.name!r} ({entry.value}) is {found!r}, expected a subclass of hybridopt.Method"
        )
    return found


def methods() -> dict[str, type[Method]]:
    """All methods that can be imported, by name; a broken plugin is reported by a warning and left out."""
    found: dict[str, type[Method]] = {}
    for name in names():
        try:
            found[name] = factory(name)
        except PluginError as error:
            warnings.warn(f"{error}; it is left out", RuntimeWarning, stacklevel=2)
    return found


def composition(name: str) -> Any:
    """A composition or bridge from a higher floor."""
    module, _, attribute = _COMPOSITIONS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
