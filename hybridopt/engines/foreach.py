"""A rule over many tensors at once, by torch's `_foreach_` functions: on any device, a few kernels a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridopt.errors import MethodError


class TensorList:
    """Tensors that are computed with as one; the other operand is a number, a list of numbers, or a `TensorList`.

    Example:
        >>> import torch
        >>> from hybridopt.engines.foreach import TensorList
        >>> x = TensorList([torch.tensor([1.0]), torch.tensor([2.0, 3.0])])
        >>> (x * 2 + x).tensors
        [tensor([3.]), tensor([6., 9.])]
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    def _with(self, function: Callable[..., Any], other: Any) -> TensorList:
        return TensorList(function(self.tensors, other.tensors if isinstance(other, TensorList) else other))

    def __add__(self, other: Any) -> TensorList:
        return self._with(torch._foreach_add, other)

    def __sub__(self, other: Any) -> TensorList:
        return self._with(torch._foreach_sub, other)

    def __mul__(self, other: Any) -> TensorList:
        return self._with(torch._foreach_mul, other)

    def __truediv__(self, other: Any) -> TensorList:
        return self._with(torch._foreach_div, other)

    def __pow__(self, other: Any) -> TensorList:
        return self._with(torch._foreach_pow, other)

    def __rpow__(self, other: float) -> TensorList:
        return TensorList(list(torch._foreach_pow(other, self.tensors)))

    def __mod__(self, other: Any) -> TensorList:
        return self._each("__mod__", other)

    def __pos__(self) -> TensorList:
        return self

    def __neg__(self) -> TensorList:
        return TensorList(torch._foreach_neg(self.tensors))

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> TensorList:
        negative = -self
        return negative._with(torch._foreach_add, other)

    def __rtruediv__(self, other: Any) -> TensorList:
        reciprocal = TensorList(torch._foreach_reciprocal(self.tensors))
        return reciprocal._with(torch._foreach_mul, other)

    def _each(self, name: str, other: Any) -> TensorList:
        others = other.tensors if isinstance(other, TensorList) else [other] * len(self.tensors)
        return TensorList([getattr(a, name)(b) for a, b in zip(self.tensors, others, strict=True)])

    def __gt__(self, other: Any) -> TensorList:
        return self._each("__gt__", other)

    def __lt__(self, other: Any) -> TensorList:
        return self._each("__lt__", other)

    def __ge__(self, other: Any) -> TensorList:
        return self._each("__ge__", other)

    def __le__(self, other: Any) -> TensorList:
        return self._each("__le__", other)

    def __eq__(self, other: object) -> TensorList:  # type: ignore[override]
        return self._each("__eq__", other)

    def __ne__(self, other: object) -> TensorList:  # type: ignore[override]
        return self._each("__ne__", other)

    def __and__(self, other: Any) -> TensorList:
        return self._each("__and__", other)

    def __or__(self, other: Any) -> TensorList:
        return self._each("__or__", other)

    def __xor__(self, other: Any) -> TensorList:
        return self._each("__xor__", other)

    def __invert__(self) -> TensorList:
        return TensorList([~t for t in self.tensors])

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise MethodError(
            "rule: expected no `if`, `and`, `or` or `not` on values; use xp.where(condition, a, b)"
        )

    def sqrt(self) -> TensorList:
        """Elementwise."""
        return TensorList(torch._foreach_sqrt(self.tensors))

    def exp(self) -> TensorList:
        """Elementwise."""
        return TensorList(torch._foreach_exp(self.tensors))

    def log(self) -> TensorList:
        """Elementwise."""
        return TensorList(torch._foreach_log(self.tensors))

    def __abs__(self) -> TensorList:
        return TensorList(torch._foreach_abs(self.tensors))

    def sign(self) -> TensorList:
        """Elementwise."""
        return TensorList(torch._foreach_sign(self.tensors))

    def maximum(self, other: Any) -> TensorList:
        """Elementwise; nan where either is."""
        return self._with(torch._foreach_maximum, other)

    def minimum(self, other: Any) -> TensorList:
        """Elementwise; nan where either is."""
        return self._with(torch._foreach_minimum, other)

    def where(self, a: Any, b: Any) -> TensorList:
        """`a` where these conditions hold, `b` elsewhere."""
        pick = [x.tensors if isinstance(x, TensorList) else [x] * len(self.tensors) for x in (a, b)]
        return TensorList([torch.where(c, x, y) for c, x, y in zip(self.tensors, *pick, strict=True)])

    def write(self, targets: Sequence[Tensor]) -> None:
        """Copy the values into `targets`."""
        torch._foreach_copy_(list(targets), self.tensors)
