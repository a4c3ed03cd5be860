"""Optuna both ways: its samplers as hybridopt methods, and any gradient-free method as an Optuna sampler.

Optuna is an extra: `pip install 'torch-hybridopt[optuna]'`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybridopt_optuna._method import TPE, OptunaCMAES, OptunaMethod

if TYPE_CHECKING:
    from hybridopt_optuna._sampler import HybridSampler, suggest

__all__ = ["TPE", "HybridSampler", "OptunaCMAES", "OptunaMethod", "suggest"]


def __getattr__(name: str) -> Any:
    if name in (
        "HybridSampler",
        "suggest",
    ):  # the methods must be known by name where Optuna is not installed
        from hybridopt_optuna import _sampler

        return getattr(_sampler, name)
    raise AttributeError(f"module 'hybridopt_optuna' has no attribute {name!r}")
