"""Adafactor: Adam's scaling from the row and column means of squared gradients instead of a number per weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, Unpack

import torch
from torch import Tensor
from torch.optim import _adafactor as torch_adafactor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._extras import StepOptions
from hybridopt.optim._groups import BATCHED, GroupStep, same_shaped
from hybridopt.optim._shards import whole_step

# Elements: of weights stacked, or of the rows of a larger one that are updated at a time (they stay in the cache); from
# where finding out that nothing is clamped pays; from where a single weight is faster than in torch's for-loop.
STACKED, SEPARABLE, LARGE = 1 << 17, 1 << 13, 1 << 16
STACKED_THERE = 1 << 22  # on a device
# Smaller weights are for torch's for-loop when fewer: 1, 2, 3 matrices of 8 x 8 take 197, 292, 311 µs a step stacked
# and 167, 270, 365 in the loop; 1, 2, 3 vectors of 64 131, 210, 224 and 105, 148, 192 (AMD EPYC, one thread, 2026-11).
ENOUGH_MATRICES, ENOUGH_VECTORS = 3, 5

_DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)
_ONE = torch.tensor(1.0)  # to make it takes 10 µs a step
Numbers: TypeAlias = list[float] | Tensor
"""One of each weight: Python's, or a float64 tensor of shape (weights,) on their device."""
_torchs_step: Any = torch_adafactor.adafactor


class Adafactor(GroupStep, torch.optim.Adafactor):
    """`torch.optim.Adafactor`, same-shaped weights batched: same arguments, same results, same state dict.

    For models whose optimizer state must be small: per matrix one number a row and one a column. Where memory does not
    matter `Adam` needs less care.

    Args:
        params, lr, beta2_decay, eps, d, weight_decay, foreach, maximize: as in torch.
        fused: `True` is `implementation="fused"`.
        implementation: `"auto"` (default): batched in float32 and float64 on CPU and CUDA, else torch's default;
            `"foreach"`, `"reference"`: torch's own; `"fused"`: no such kernel: one warning, then as auto.
        options: `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`, `seed`, by keyword;
            see `StepOptions`. They, and 16-bit weights, take the time of float32 copies.

    Notes:
        On a GPU nothing waits for it, so that a CUDA graph can record a step, and `lr` may be a tensor there; counts of
        steps are kept there, too (torch: on the CPU, and it waits twice a weight). Not yet measured on one.
        Weights that are DTensors are gathered one at a time (torch cannot step them); their states are whole on every
        process.
        Memory beyond the state: a few copies of 131 thousand weights; of a whole weight that is not a matrix, if larger
        (torch: of every weight). Results are torch's up to the rounding of sums and products.

    Source:
        Shazeer and Stern 2018, arXiv:1804.04235, with torch's departures from it: means for sums, eps where it divides.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.ones(3, 2, requires_grad=True)
        >>> optimizer = hybridopt.optim.Adafactor([x], lr=0.1)
        >>> for _ in range(60):
        ...     optimizer.zero_grad()
        ...     loss = (x**2).sum()
        ...     loss.backward()
        ...     optimizer.step()
        >>> loss.item() < 0.1
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.Adafactor.__init__(
            self, params, lr, beta2_decay, eps, d, weight_decay, foreach=foreach, maximize=maximize
        )
        self._configure(options, foreach, fused)

    def _active(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return "row_var", "col_var", "variance"

    def _elsewhere(self, factor: float | None) -> None:
        step = functools.partial(super()._elsewhere, factor)
        if self._spread:
            whole_step(self, step)
            self._say("weights gathered one by one")
        else:
            step()

    def _step_group(self, group: dict[str, Any]) -> str:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        rows: list[Any] = []  # None for vectors, as `columns`
        columns: list[Any] = []
        variances: list[Any] = []  # None for matrices
        steps: list[Tensor] = []
        torchs: Any = (
            self  # checks of weights and gradients, and creation of the state, are torch's own: untyped
        )
        torchs._init_group(group, params, grads, rows, columns, variances, steps)
        eps1, eps2 = group["eps"]
        if eps1 is None and params:
            first = self._stand_for.get(params[0], params[0])
            eps1 = torch.finfo(first.dtype).eps  # of the first weight, for its whole group: as torch does
        options: dict[str, Any] = {"eps1": eps1, "eps2": eps2}
        options |= {name: group[name] for name in ("d", "lr", "beta2_decay", "weight_decay", "maximize")}
        lists = (params, grads, rows, columns, variances, steps)
        why = self._not_batched(params, grads)
        if why or self._implementation in ("reference", "foreach"):
            self._accelerator_graph_capture_health_check()
            _torchs_step(*lists, foreach=group["foreach"], **options)
            return self._torchs(why)
        rest: list[int] = []
        here = not params or _on_host(params[0])
        if not here:
            self._bring_steps(params, steps)
        for batch in same_shaped(params, STACKED if here else STACKED_THERE):
            if here and _few([params[i] for i in batch]):
                rest += batch
            else:
                _update(*[[column[i] for i in batch] for column in lists], **options)
        if rest:
            _torchs_step(*[[column[i] for i in rest] for column in lists], **options)
        few = params and len(rest) == len(params)
        return self._torchs("too few small weights of one shape") if few else BATCHED

    def _bring_steps(self, params: list[Tensor], steps: list[Tensor]) -> None:
        """Have the counts of steps where the weights are: torch makes them on the CPU."""
        for i, (p, step) in enumerate(zip(params, steps, strict=True)):
            if step.device != p.device:
                self.state[p]["step"] = steps[i] = step.to(p.device)

    def _not_batched(self, params: list[Tensor], grads: list[Tensor]) -> str:
        """Why torch's own code must do this group."""
        for p, g in zip(params, grads, strict=True):
            if p.dtype not in _DTYPES or g.dtype != p.dtype:
                return f"a weight is {p.dtype} and its gradient {g.dtype}"
            if p.device.type not in ("cpu", "cuda") or p.device != params[0].device or g.device != p.device:
                return f"a weight is on {p.device}"
            if type(p) not in _PLAIN or type(g) not in _PLAIN or g.layout is not torch.strided:
                return f"a weight is a {type(p).__name__}, its gradient a {type(g).__name__} with layout {g.layout}"
        return ""


def _few(alike: list[Tensor]) -> bool:
    """Whether torch's for-loop is faster."""
    p = alike[0]
    return p.numel() < LARGE and len(alike) < (ENOUGH_MATRICES if p.ndim > 1 else ENOUGH_VECTORS)


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    rows: list[Tensor],
    columns: list[Tensor],
    variances: list[Tensor],
    steps: list[Tensor],
    *,
    lr: Any,
    beta2_decay: float,
    eps1: float,
    eps2: float,
    d: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step of weights of one shape, in place, stacked if they are several; letters as in torch's documentation."""
    p, numel, single = params[0], params[0].numel(), len(params) == 1
    here = _on_host(p)
    if isinstance(lr, Tensor):
        lr = lr.item() if _on_host(lr) and not here else lr.squeeze()
    torch._foreach_add_(steps, _ONE if here else 1.0)
    counts: Numbers = [step.item() for step in steps] if here else torch.stack(steps).double()
    betas = _each(lambda t: t**beta2_decay, counts)  # 1 - β2 of step t
    norms = _lengths(params)
    G = _stacked(grads)
    parts, targets = [G], [params]
    if p.ndim > 1:
        height = max(1, STACKED * p.shape[-2] // numel)
        if here and single and p.ndim == 2 and height < p.shape[-2]:
            # a few rows at a time; what is needed twice is computed twice
            parts = list(torch.split(G, height, dim=-2))
            targets = [[part] for part in torch.split(p, height, dim=-2)]
        direction = _factored(parts, rows, columns, betas, eps1)
    else:
        _follow(variances, G * G, betas)
        V = _stacked(variances).clamp(min=eps1 * eps1)

        def direction(i: int) -> Tensor:
            return V.rsqrt_().mul_(G)

    U = direction(0)
    lengths = _lengths(_unstacked(U, single))
    for i in range(1, len(parts)):
        lengths = [math.hypot(*lengths, *_lengths([direction(i)]))]

    def size(norm: Any, t: Any, length: Any) -> Any:
        alpha = _at_least(eps2, norm / numel**0.5) * _at_most(lr, 1 / t**0.5)
        return (1 if maximize else -1) * alpha / _at_least(1.0, length / (numel**0.5 * d))

    sizes = _each(size, norms, counts, lengths)
    decay = 1 - lr * weight_decay
    for i, weights in enumerate(targets):
        if i:
            U = direction(i)
        if weight_decay != 0:
            torch._foreach_mul_(weights, float(decay) if here else decay)
        if single and here:
            weights[0].add_(U, alpha=float(sizes[0]))
        else:
            factors = torch.as_tensor(sizes, dtype=U.dtype, device=U.device)
            U.mul_(factors.squeeze() if single else factors.view(-1, *[1] * p.ndim))
            torch._foreach_add_(weights, _unstacked(U, single))


def _on_host(tensor: Tensor) -> bool:
    """Whether numbers of whole weights are Python's; elsewhere tensors, and nobody waits for the device."""
    return tensor.is_cpu


def _each(function: Callable[..., Any], *numbers: Numbers) -> Numbers:
    """A function of numbers of each weight: of Python's one by one, of tensors at once."""
    if isinstance(numbers[0], Tensor):
        made: Tensor = function(*numbers)
        return made
    return [function(*row) for row in zip(*numbers, strict=True)]


def _at_least(floor: Any, x: Any) -> Any:
    """The larger; the floor where x is nan, as by Python's max(floor, x)."""
    return torch.where(x > floor, x, floor) if isinstance(x, Tensor) else max(floor, x)


def _at_most(cap: Any, x: Any) -> Any:
    return torch.where(x < cap, x, cap) if isinstance(x, Tensor) else min(cap, x)


def _lengths(tensors: list[Tensor]) -> Numbers:
    norms = torch.stack(torch._foreach_norm(tensors))
    return norms.tolist() if _on_host(norms) else norms.double()


def _follow(averages: list[Tensor], values: Tensor, betas: Numbers) -> None:
    """Move running means towards new values, which are stacked if they are several."""
    rates: Any = list(betas.to(values.dtype).unbind()) if isinstance(betas, Tensor) else betas
    torch._foreach_lerp_(averages, _unstacked(values, len(averages) == 1), rates)


def _factored(
    parts: list[Tensor], rows: list[Tensor], columns: list[Tensor], betas: Numbers, eps1: float
) -> Callable[[int], Tensor]:
    """Update R and C with the mean squares of the gradients, whose rows come in parts.

    Returns:
        A part's U = G / sqrt(V), V = R C / mean(R) but at least eps1^2, by the number of the part.
    """
    row_means, column_sums = zip(*map(_squares, parts), strict=True)
    row_mean = torch.cat(row_means, dim=-2)
    column_mean = functools.reduce(torch.add, column_sums).div_(row_mean.shape[-2])
    _follow(rows, row_mean, betas)
    _follow(columns, column_mean, betas)
    R, C = _stacked(rows), _stacked(columns)
    mean = R.mean(dim=-2, keepdim=True).clamp_(min=eps1)
    if _separable(R, C, mean, eps1):
        a, b = _cut(R.rsqrt(), parts), C.rsqrt().mul_(mean.sqrt())
        return lambda i: (parts[i] * a[i]).mul_(b)
    r = _cut(R, parts)
    return lambda i: (r[i] * C).div_(mean).clamp_(min=eps1 * eps1).rsqrt_().mul_(parts[i])


def _cut(R: Tensor, parts: list[Tensor]) -> Sequence[Tensor]:
    """Rows of R as the parts have them."""
    return (R,) if len(parts) == 1 else torch.split(R, parts[0].shape[-2], dim=-2)


def _squares(G: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the squares in each row, sums of those in each column."""
    S = G * G
    return S.mean(dim=-1, keepdim=True), S.sum(dim=-2, keepdim=True)


def _separable(R: Tensor, C: Tensor, mean: Tensor, eps1: float) -> bool:
    """Whether no R C overflows, underflows or is clamped: one root a row and a column then does, not one a weight."""
    if R.numel() * C.shape[-1] < SEPARABLE or not _on_host(R):
        return False
    low = R.amin(dim=-2, keepdim=True) * C.amin(dim=-1, keepdim=True)
    high = R.amax(dim=-2, keepdim=True) * C.amax(dim=-1, keepdim=True)
    limits = torch.finfo(R.dtype)
    return bool(((low >= limits.tiny) & (low >= eps1 * eps1 * mean) & (high <= limits.max)).all())


def _stacked(tensors: list[Tensor]) -> Tensor:
    """In a new first dimension, but a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)


def _unstacked(stack: Tensor, single: bool) -> list[Tensor]:
    return [stack] if single else list(stack.unbind())
