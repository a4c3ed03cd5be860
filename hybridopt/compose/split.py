"""Disjoint weights to different methods in one run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from hybridopt.compose._split_run import SplitRun
from hybridopt.compose.stage import Stage, gather
from hybridopt.errors import MethodError, SelectionError
from hybridopt.optimizer import (
    HandOver,
    Method,
    Need,
    Optimizer,
)
from hybridopt.options import Count, check_options
from hybridopt.selection import spread_patterns
from hybridopt.text import method as read_method
from hybridopt.text import print_call
from hybridopt.vector import ParameterVector

REST = "..."
"""The pattern of all weights that no other pattern matches."""


@dataclass(frozen=True)
class Split(Method):
    """Different methods for different weights: `split("gate.*": cmaes, "...": adamw(lr=0.001))`.

    For models of which a part has no useful gradient (rounded thresholds, integers), and for options that differ from
    layer to layer. Every loss is one of the whole model: each part is asked about with the others where they stand.
    A method that follows gradients in place (`adam`) stands where its weights do. Any other stands at the point of
    lowest loss that it was told, compared with the loss last told of where all stand, so a split of such methods never
    gets worse; a part whose method has ended stays there.

    What a method remembers of earlier losses was true for where the other parts stood then. That is harmless for
    methods that compare only what they ask at once (`adam`, `cmaes`, `snes`). `pso` and `de` compare with their
    members' older losses, line searches (`slsqp`, `lbfgs`) with those of a few steps ago: give them longer turns.

    Args:
        weights: patterns for names of weights (as in `select`), each with a method, stage or composition. They must be
            disjoint and leave no weight out; the pattern `"..."` means all that the others leave.
        order: `"simultaneous"` (default): the parts whose methods ask for the same (a loss, or a loss and its gradient,
            at one point) are told of one evaluation, in which all of them have moved: `adam` on one layer and `sgd` on
            another cost one forward and backward a step. The others, populations above all, take turns.
            `"alternating"`: one part after another moves, the others wait.
        turn: steps that a part makes before the next one moves; default 1, more only if alternating. Difference
            stencils and gradients always belong to the turn of their point.

    Each step evaluates a point of all n weights, so a population of p takes p·n·8 bytes, however small its part.
    Constraints are not kept by a split of several parts: its start refuses them.

    Raises:
        MethodError: no parts, something that is no method, an unknown order.
        SelectionError: (when it starts) patterns overlap or match nothing, or weights are left over.

    Example:
        >>> import torch, hybridopt
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> split = hybridopt.method('split("0.*": adam(lr=0.1), "1.*": cmaes)')
        >>> str(hybridopt.Split({"0.*": hybridopt.method("adam", lr=0.1), "1.*": hybridopt.method("cmaes")}))
        'split("0.*": adam(lr=0.1), "1.*": cmaes)'
        >>> x = torch.eye(2)
        >>> r = hybridopt.minimize(lambda m: (m(x) - 1).square().sum(), model, split, budget=600, seed=0)
        >>> r.best_loss < 1e-4
        True
    """

    name: ClassVar[str] = "split"

    weights: Any
    order: Literal["simultaneous", "alternating"] = "simultaneous"
    turn: Count = 1

    def __post_init__(self) -> None:
        pairs = tuple(self.weights.items()) if isinstance(self.weights, Mapping) else self.weights
        if not isinstance(pairs, tuple) or not pairs:
            raise MethodError(
                f"split: expected patterns with methods, {{'gate.*': ...}}, got {self.weights!r}"
            )
        for pattern, made in pairs:
            if not isinstance(pattern, str):
                raise MethodError(f"split: expected a pattern and a method, got {pattern!r}: {made!r}")
        check_options(self)
        if self.turn > 1 and self.order == "simultaneous":
            raise MethodError(f"split: turn={self.turn} expects order=alternating")
        object.__setattr__(self, "weights", tuple((p, _bare(read_method(made))) for p, made in pairs))
        gather(self, (made for _, made in self.weights))
        if len(pairs) > 1:
            object.__setattr__(self, "uses", self.uses - {Need.CONSTRAINTS})
        object.__setattr__(self, "takes", frozenset[str]().union(*(part.takes for part in self.parts)))

    def call(self, limits: Mapping[str, Any] = MappingProxyType({})) -> str:
        """See `Method.call`."""
        inside = [f"{json.dumps(pattern, ensure_ascii=False)}: {made}" for pattern, made in self.weights]
        options = {k: v for k, v in self.options().items() if k in ("order", "turn")}
        return print_call(self.name, {**options, **limits}, *inside)

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`."""
        return SplitRun(self, vector, seed, warm)

    def assign(self, vector: ParameterVector) -> list[list[str]]:
        """The names of each part's weights.

        Raises:
            SelectionError: patterns overlap or match nothing, or weights are left over.
        """
        patterns = [pattern for pattern, _ in self.weights]
        twice = next((p for i, p in enumerate(patterns) if p in patterns[:i]), None)
        if twice is not None:
            raise SelectionError(f"split: the pattern {twice!r} is given twice; name each weight once")
        given = {pattern: None for pattern in patterns if pattern != REST}
        owner = spread_patterns(given, vector.names, vector.aliases, "split") if given else {}
        left = [name for name in vector.names if name not in owner]
        if left and REST not in patterns:
            raise SelectionError(
                f"split: no pattern matches {', '.join(map(repr, left[:8]))}{', ...' if left[8:] else ''}; add one "
                f"({REST!r} means all that is left), or leave them out with select="
            )
        if REST in patterns and not left:
            raise SelectionError(f"split: the other patterns leave nothing for {REST!r}; remove it")
        owner |= dict.fromkeys(left, REST)
        return [[name for name in vector.names if owner[name] == pattern] for pattern in patterns]


def _bare(made: Method) -> Method:
    return made.method if isinstance(made, Stage) and made.plain else made
