"""A model's chosen weights as one flat vector, and back."""

from __future__ import annotations

import copy
import fnmatch
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hybridopt.bounds import Bounds, read_bounds, read_scale, require_positive
from hybridopt.coordinates import LEAST_WHOLE, Coordinates, FloatArray, Mask
from hybridopt.errors import SelectionError
from hybridopt.selection import Named, choose_weights, named_tensors, select_tensors

__all__ = ["FloatArray", "Owner", "ParameterVector", "Select"]

Select: TypeAlias = str | Sequence[str] | Callable[[str, Tensor], bool] | None


class Owner(Protocol):
    """Whoever keeps its iterate in the model's own tensors (an in-place torch optimizer)."""

    def evicted(self) -> None:
        """Save the iterate: somebody else is about to write the weights."""


class ParameterVector:
    """The chosen weights of a model as one flat float64 vector of length `n`, and back.

    The flat order is the order of `names`; within a tensor it is row-major (logical) order, whatever its
    strides. Every weight keeps its own dtype, device and strides: `write` rounds each value to its weight's
    dtype. Nothing is copied until asked for; the tensors stay the model's own.

    Two coordinate systems exist. *Weights* are what the model holds; `read`, `write`, `unflatten`, `lower` and
    `upper` speak weights. *Solver coordinates* are weights, or their logarithms, divided by `scale`; `encode` and
    `decode` convert. Without any of these they are the same numbers, bit for bit.

    Args:
        source: a `torch.nn.Module`; one tensor; a sequence of tensors; a mapping from names to tensors; or torch
            parameter groups (dicts with a `"params"` entry).
        select: which weights. A glob pattern (`"head.*"`), several patterns, or a predicate
            `(name, tensor) -> bool`. Default None: of a module, every parameter that requires a gradient;
            otherwise all tensors given. A frozen weight (of a module, or a `Parameter` among those given) is taken
            only if selected.
        bounds: None (default, unbounded), one pair `(low, high)` for all weights, an array of shape (n, 2), or a
            mapping from patterns to pairs. None or an infinite number in a pair = no bound on that side. Bounds are
            tightened to the nearest numbers that the weight's dtype can hold, so a rounded weight never leaves them.
        scale: None (default), `"start"` = max(|x0|, root mean square of its tensor, 1e-3) for each weight, a
            positive number, an array of shape (n,), or a mapping from patterns to positive numbers. Of a weight that
            is `log` it divides the logarithm (`"start"` then means 1); an `integer` one is not scaled.
        integer: weights that stand for whole numbers (kept in their floating dtype): True = all, patterns, a predicate
            `(name, tensor) -> bool`, or a bool array of shape (n,). Solvers move a continuous coordinate; what is
            evaluated is the nearest whole number, halves to the even one. Bounds are tightened to whole numbers.
            Methods that move the weights in place (torch's optimizers) refuse them.
        log: weights whose logarithm solvers move, for what ranges over magnitudes; chosen as in `integer`. They, and
            their lower bounds where there are any, must be positive. In-place methods ignore it, as they do `scale`.

    Raises:
        SelectionError: the selection is empty, patterns overlap, or a weight is complex, integer, narrower than 16
            bits, nan, without values (meta, lazy), or shares memory with another one.
        BoundsError: bounds have the wrong shape, low >= high, or the start lies outside; a weight or bound is not
            positive although its logarithm is to be searched.

    Example:
        >>> import numpy as np, torch
        >>> from hybridopt import ParameterVector
        >>> model = torch.nn.Linear(2, 1)
        >>> vector = ParameterVector(model, bounds={"weight": (-1, 1)})
        >>> vector.n, vector.names, vector.slices["bias"]
        (3, ('weight', 'bias'), slice(2, 3, None))
        >>> vector.write([0.5, -0.5, 2.0])
        >>> model.bias.item(), vector.read().tolist()
        (2.0, [0.5, -0.5, 2.0])
        >>> tuned = {"width": torch.tensor(16.0), "rate": torch.tensor(1.0)}
        >>> vector = ParameterVector(tuned, integer="width", log="rate")
        >>> vector.decode(np.array([7.8, -1.0])).round(3).tolist()
        [8.0, 0.368]
    """

    def __init__(
        self,
        source: Any,
        select: Select = None,
        *,
        bounds: Any = None,
        scale: Any = None,
        integer: Any = None,
        log: Any = None,
    ) -> None:
        named: Named = select_tensors(named_tensors(source), select)
        self.source = source
        self.module: nn.Module | None = source if isinstance(source, nn.Module) else None
        self.names: tuple[str, ...] = tuple(named.tensors)
        self.tensors: tuple[Tensor, ...] = tuple(named.tensors.values())
        self.aliases: dict[str, str] = named.aliases
        self.groups: list[dict[str, Any]] | None = named.groups
        self._lay_out()
        self.epoch = 0
        self.choices: frozenset[str] = frozenset()
        """Names of tensors of which only the largest entry counts (`Space` sets it)."""
        self.constrained = False  # whether an objective has constraints beside the bounds
        self._whole: tuple[ParameterVector, npt.NDArray[np.intp]] | None = (
            None  # what it is a part of, and which
        )
        self._parts: weakref.WeakSet[ParameterVector] | None = None  # of the whole, once there are any
        self._owner: Owner | None = None
        self._sides: tuple[list[Any], list[Tensor], list[Tensor]] | None = None
        self._staging: tuple[npt.NDArray[np.float64], list[Tensor]] | None = None
        x0 = self.read()
        self._check_start(x0)
        self.integer: Mask | None = choose_weights(integer, named, "integer")
        self.log: Mask | None = choose_weights(log, named, "log")
        if self.integer is not None:
            x0[self.integer] = np.rint(x0[self.integer])
        parts: Bounds = read_bounds(bounds, self.slices, self.tensors, x0, self.aliases, self.integer)
        self.lower: FloatArray = parts.lower
        self.upper: FloatArray = parts.upper
        self.bounded: bool = bool(np.isfinite(self.lower).any() or np.isfinite(self.upper).any())
        if self.log is not None:
            require_positive(self.log, self.slices, x0, self.lower)
        self.scale: FloatArray | None = read_scale(scale, self.slices, x0, self.aliases)
        self._measured = isinstance(scale, str)  # where the weights stood
        if self.scale is not None:
            if isinstance(scale, str) and self.log is not None:
                self.scale[self.log] = 1.0
            if self.integer is not None:
                self.scale[self.integer] = 1.0
        self.coordinates: Coordinates = self._coordinates()

    def _lay_out(self) -> None:
        """Where each tensor stands in the flat vector."""
        self.sizes: tuple[int, ...] = tuple(t.numel() for t in self.tensors)
        ends = np.cumsum((0, *self.sizes)).tolist()
        self.n: int = ends[-1]
        self.slices: dict[str, slice] = {
            name: slice(a, b) for name, a, b in zip(self.names, ends, ends[1:], strict=False)
        }

    def _coordinates(self) -> Coordinates:
        if self.log is None:
            return Coordinates(self.lower, self.upper, self.scale, self.integer)
        kinds = [torch.finfo(t.dtype) for t in self.tensors]
        tiny = np.repeat([kind.tiny for kind in kinds], self.sizes)
        huge = np.repeat([kind.max for kind in kinds], self.sizes)
        if self.integer is not None:
            tiny = np.where(self.integer, LEAST_WHOLE, tiny)
        return Coordinates(
            self.lower, self.upper, self.scale, self.integer, self.log, tiny[self.log], huge[self.log]
        )

    # -- reading and writing ------------------------------------------------------------------------------------

    def read(self) -> FloatArray:
        """The weights as they stand: a new array, shape (n,), float64. One copy of 8n bytes; waits for the device."""
        if not self.tensors:
            return np.empty(0)
        with torch.no_grad():
            flat = [t.reshape(-1).to("cpu", torch.float64) for t in self.tensors]
            return torch.cat(flat).numpy()

    def write(self, x: npt.ArrayLike | Tensor) -> None:
        """Set the weights from `x`, shape (n,), rounding to each weight's dtype; strides and devices are kept.

        In-place optimizers that hold their iterate in these tensors are told first and save it.

        Raises:
            ValueError: `x` has another shape than (n,).
        """
        if self._staging is None:
            buffer = np.empty(self.n)
            pieces = torch.split(torch.from_numpy(buffer), list(self.sizes))
            views = [piece.view(t.shape) for piece, t in zip(pieces, self.tensors, strict=True)]
            self._staging = (buffer, views)
        buffer, views = self._staging
        if isinstance(x, Tensor):
            x = x.detach().to("cpu", torch.float64).numpy()
        if np.shape(x) != buffer.shape:
            raise ValueError(f"x: expected shape ({self.n},), one number per weight, got {np.shape(x)}")
        buffer[:] = x
        if self._owner is not None:
            self.claim(None)
        self.touch()
        with torch.no_grad():
            torch._foreach_copy_(self.tensors, views)

    def unflatten(self, x: Tensor) -> dict[str, Tensor]:
        """The tensors that `x` stands for, by name; differentiable in `x` and safe under `torch.func.vmap`.

        Args:
            x: shape (n,), any floating dtype and device.

        Returns:
            name -> tensor with that weight's shape, dtype and device, contiguous. Tied weights appear under their
            first name; `torch.func.functional_call(..., tie_weights=True)` (its default) restores the ties.

        Example:
            >>> import torch
            >>> from hybridopt import ParameterVector
            >>> model = torch.nn.Linear(1, 1)
            >>> vector = ParameterVector(model)
            >>> x = torch.tensor([3.0, 1.0], requires_grad=True)
            >>> y = torch.func.functional_call(model, vector.unflatten(x), (torch.tensor([2.0]),))
            >>> y.sum().backward()
            >>> x.grad
            tensor([2., 1.])
        """
        if x.shape != (self.n,):
            raise ValueError(f"x: expected shape ({self.n},), one number per weight, got {tuple(x.shape)}")
        parts = torch.split(x, list(self.sizes))
        return {
            name: part.view(t.shape).to(device=t.device, dtype=t.dtype)
            for name, part, t in zip(self.names, parts, self.tensors, strict=True)
        }

    def gather(self, parts: Iterable[Tensor | None]) -> FloatArray:
        """One value per weight, given as tensors in the order of `names` (None counts as zeros), flat in float64."""
        pieces = [
            torch.zeros(t.numel(), dtype=torch.float64)
            if p is None
            else p.reshape(-1).to("cpu", torch.float64)
            for p, t in zip(parts, self.tensors, strict=True)
        ]
        return torch.cat(pieces).numpy()

    # -- parts --------------------------------------------------------------------------------------------------

    def part(self, names: Collection[str]) -> ParameterVector:
        """The named tensors as a vector of their own: they, their bounds, scale and coordinates are these here.

        Example:
            >>> import numpy as np, torch
            >>> from hybridopt import ParameterVector
            >>> vector = ParameterVector(torch.nn.Linear(2, 1), bounds={"bias": (-1, 1)})
            >>> bias = vector.part(["bias"])
            >>> bias, bias.from_whole(np.array([1.0, 2.0, 3.0])).tolist()
            (ParameterVector(1 weights in 1 tensors, bounded), [3.0])
        """
        made = copy.copy(self)
        kept = [i for i, name in enumerate(self.names) if name in names]
        made.names = tuple(self.names[i] for i in kept)
        made.tensors = tuple(self.tensors[i] for i in kept)
        made.aliases = {alias: name for alias, name in self.aliases.items() if name in names}
        if self.groups is not None:
            groups = [{**g, "params": [p for p in g["params"] if p in names]} for g in self.groups]
            made.groups = [g for g in groups if g["params"]]
        index = np.concatenate([np.arange(self.n)[self.slices[name]] for name in made.names])
        made._lay_out()
        root, of_root = (self, index) if self._whole is None else (self._whole[0], self._whole[1][index])
        made._whole = (root, of_root)
        root._parts = weakref.WeakSet() if root._parts is None else root._parts
        root._parts.add(made)
        made._sides = None
        made.lower, made.upper = self.lower[index], self.upper[index]
        made.bounded = bool(np.isfinite(made.lower).any() or np.isfinite(made.upper).any())
        made.scale = None if self.scale is None else self.scale[index]
        made.integer = None if self.integer is None or not self.integer[index].any() else self.integer[index]
        made.log = None if self.log is None or not self.log[index].any() else self.log[index]
        made.coordinates = made._coordinates()
        return made

    @property
    def whole(self) -> ParameterVector:
        """The vector that this one is a part of (of a part of ...), else itself."""
        return self if self._whole is None else self._whole[0]

    def from_whole(self, x: FloatArray) -> FloatArray:
        """What of a point of the whole, shape (n,), is here: a new array."""
        return x.copy() if self._whole is None else x[self._whole[1]]

    # -- solver coordinates -------------------------------------------------------------------------------------

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on in the coordinates of a saved run (`Coordinates.resumed`), also in the parts of this vector."""
        self.coordinates = self.coordinates.resumed(state, self._measured)
        self.scale = self.coordinates.scale
        if self.scale is not None:
            for part in self._parts or ():
                part.scale = part.from_whole(self.scale)
                part.coordinates = part._coordinates()

    def encode(self, x: FloatArray) -> FloatArray:
        """Weights -> solver coordinates, shape (..., n); the same object where they are the same numbers."""
        return self.coordinates.encode(x)

    def decode(self, z: FloatArray) -> FloatArray:
        """Solver coordinates -> weights, shape (..., n), whole numbers rounded, kept inside the bounds."""
        return self.coordinates.decode(z)

    @property
    def eps(self) -> FloatArray:
        """Machine epsilon of each weight's dtype, shape (n,): what a difference step must be large against."""
        return np.repeat([torch.finfo(t.dtype).eps for t in self.tensors], self.sizes)

    def outside(self, x: FloatArray) -> bool:
        """Whether any row of `x` (weights, shape (..., n)) lies outside the bounds."""
        return self.bounded and bool(((x < self.lower) | (x > self.upper)).any())

    # -- snapshots in the weights' own dtype --------------------------------------------------------------------

    def snapshot(self) -> list[Tensor]:
        """Copies of the weights in their own dtype, device and strides."""
        with torch.no_grad():
            return [t.detach().clone(memory_format=torch.preserve_format) for t in self.tensors]

    def copy_to(self, shadow: list[Tensor]) -> None:
        """Overwrite an earlier `snapshot()` with the weights as they stand."""
        with torch.no_grad():
            torch._foreach_copy_(shadow, self.tensors)

    def restore(self, shadow: Sequence[Tensor]) -> None:
        """Set the weights from a `snapshot()`."""
        self.touch()
        with torch.no_grad():
            torch._foreach_copy_(self.tensors, list(shadow))

    def project(self) -> None:
        """Clamp the weights, in place, to the bounds."""
        if not self.bounded:
            return
        self.touch()
        low, high = self._bound_tensors()
        with torch.no_grad():
            torch._foreach_clamp_min_(self.tensors, low)
            torch._foreach_clamp_max_(self.tensors, high)

    def _bound_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """The bounds as tensors like the weights; made again only where a weight's dtype or device has changed."""
        kinds = [(t.dtype, t.device) for t in self.tensors]
        if self._sides is not None and self._sides[0] == kinds:
            return self._sides[1], self._sides[2]
        sides = []
        for side in (self.lower, self.upper):
            pieces = torch.split(torch.from_numpy(side), list(self.sizes))
            sides.append([p.view(t.shape).to(t) for p, t in zip(pieces, self.tensors, strict=True)])
        self._sides = (kinds, sides[0], sides[1])
        return sides[0], sides[1]

    # -- who holds the weights ----------------------------------------------------------------------------------

    def claim(self, owner: Owner | None) -> bool:
        """Make `owner` the one whose iterate the tensors hold; the previous one saves its own first.

        Returns:
            True if the weights may have changed since `owner` last held them (it must put its iterate back).
        """
        if self._owner is owner:
            return False
        previous, self._owner = self._owner, None
        if previous is not None:
            previous.evicted()
        self._owner = owner
        return True

    def release(self, owner: Owner) -> None:
        """Forget `owner` without asking it to save; the weights stay as they stand."""
        if self._owner is owner:
            self._owner = None

    def touch(self) -> None:
        """Say that the weights were changed in place, so that graphs of older values are not used again."""
        self.epoch += 1
        if self._whole is not None:
            self._whole[0].epoch += 1

    def matching(self, pattern: str) -> list[str]:
        """Names that match a glob pattern."""
        return [name for name in self.names if fnmatch.fnmatchcase(name, pattern)]

    def describe(self) -> Mapping[str, Any]:
        """Plain facts that a saved state is checked against: names, shapes, dtypes, what a coordinate stands for."""
        return {
            "names": list(self.names),
            "shapes": [list(t.shape) for t in self.tensors],
            "dtypes": [str(t.dtype) for t in self.tensors],
            "integer": _runs(self.integer),
            "log": _runs(self.log),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have weights of their own, which nobody holds yet, and make their own write buffer."""
        return self.__dict__ | {"_staging": None, "_owner": None, "_parts": None}

    def __repr__(self) -> str:
        bounds = "bounded" if self.bounded else "unbounded"
        parts = {"scaled": self.scale, "integer": self.integer, "log": self.log}
        more = "".join(f", {word}" for word, part in parts.items() if part is not None)
        return f"ParameterVector({self.n} weights in {len(self.names)} tensors, {bounds}{more})"

    def _check_start(self, x0: FloatArray) -> None:
        if self.n == 0:
            raise SelectionError(
                f"weights: expected at least one, the selected tensors {list(self.names)} hold none"
            )
        for name, part in self.slices.items():
            if not np.isfinite(x0[part]).all():
                bad = int((~np.isfinite(x0[part])).sum())
                raise SelectionError(
                    f"weights: {name!r} holds {bad} value(s) that are nan or inf; every start weight must be "
                    "finite: initialise the model, or leave this weight out with select="
                )


def _runs(mask: Mask | None) -> list[list[int]]:
    """The stretches of True, as [first, last + 1]."""
    if mask is None:
        return []
    ends = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False]))))
    return [[int(a), int(b)] for a, b in ends.reshape(-1, 2)]
