"""L-BFGS."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.errors import MethodError
from hybridopt.optim._extras import Extras, StepOptions
from hybridopt.optim._implementation import Chosen, outside_graphs

_NUMBERS: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}
ARMIJO, CURVATURE = 1e-4, 0.9  # Nocedal & Wright 2006, eqs. 3.7a and 3.7b
BRACKET = 1e-9  # in weights; torch's line search has its own tolerance, not `tolerance_change`


class LBFGS(Chosen, torch.optim.LBFGS):
    """`torch.optim.LBFGS` with less work around the loss: same arguments, same path bit for bit, same state dict.

    For smooth, deterministic losses; with minibatches use Adam. Always give `line_search_fn="strong_wolfe"` unless
    you know a good `lr`: without it there is no safeguard at all.

    torch computes the search's scalars as tensors without dimension, and reads each from the device to use it. Here
    they are numbers, rounded as torch rounds them; the vectors are touched by torch's own functions in torch's order.
    Beyond torch: gradients that are not contiguous, deepcopy and pickle work.

    Args:
        params, lr, max_iter, max_eval, tolerance_grad, tolerance_change, history_size, line_search_fn: as in torch;
            one parameter group.
        foreach, fused: `True` is another spelling of `implementation="foreach"`, `"fused"`.
        implementation: `"auto"` (default), `"foreach"`, `"fused"`: the above where the flat gradient is float32 or
            float64, else torch's step; `"reference"`: torch's step. `repr` says which ran.
        options: `implementation` alone. Clipped gradients, or weights and states rounded on their own, would not belong
            to the losses of the line search.

    Raises:
        MethodError: another one of `StepOptions` was given.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = hybridopt.optim.LBFGS([x], max_iter=50, line_search_fn="strong_wolfe")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item().__round__(1)  # the loss at the start, as torch returns
        24.2
        >>> abs(x.detach() - 1).max().item() < 1e-3
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.LBFGS.__init__(
            self,
            params,
            lr,
            max_iter,
            max_eval,
            tolerance_grad,
            tolerance_change,
            history_size,
            line_search_fn,
        )
        rest: dict[str, Any] = dict(options)
        self._choose(rest.pop("implementation", "auto"), foreach, fused)
        refused = Extras.of("LBFGS", rest).given()
        if refused:
            raise MethodError(
                f"LBFGS: {', '.join(refused)} cannot be had, because its line search compares losses with gradients "
                "and steps as they are; leave it out, and make the weights float32 or float64"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._params = self.param_groups[0]["params"]  # torch forgets these two in a pickle
        self._numel_cache = None

    @outside_graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        """Do up to `max_iter` iterations.

        Args:
            closure: clears the gradients, evaluates the loss, runs backward, and returns the loss.

        Returns:
            What the first call of the closure returned.

        Raises:
            MethodError: a second parameter group was added.
        """
        if len(self.param_groups) != 1:
            raise MethodError(
                f"LBFGS: expected one parameter group, got {len(self.param_groups)}; it knows one step length for all"
            )
        why = self._not_ours()
        if why:
            self._say(why)
            return inspect.unwrap(torch.optim.LBFGS.step)(self, closure)  # hooks have run around us
        self._say("scalars as numbers")
        outside = np.geterr()

        def evaluate() -> Any:
            with torch.enable_grad(), np.errstate(**outside):
                return closure()

        with np.errstate(all="ignore"):  # inf and nan pass through the search silently, as in torch
            return self._iterate(evaluate)

    def _not_ours(self) -> str:
        """Why torch's own step must run; empty if ours can."""
        if self._implementation == "reference":
            return "torch's own code"
        dtypes = {p.real.dtype if p.is_complex() else p.dtype for p in self._params}
        lr = self.param_groups[0]["lr"]
        if isinstance(lr, Tensor):
            dtypes.add(lr.dtype)
        if dtypes <= _NUMBERS.keys():
            return ""
        return f"torch's own code: a weight or lr is {', '.join(sorted(map(str, dtypes - _NUMBERS.keys())))}"

    def _iterate(self, evaluate: Callable[[], Any]) -> Any:
        (group,) = self.param_groups
        lr = (
            group["lr"].detach().squeeze().cpu().numpy()[()]
            if isinstance(group["lr"], Tensor)
            else group["lr"]
        )
        max_iter, max_eval = group["max_iter"], group["max_eval"]
        tolerance_grad, tolerance_change = group["tolerance_grad"], group["tolerance_change"]
        search = group["line_search_fn"]
        state = self.state[self._params[0]]
        state.setdefault("func_evals", 0)
        state.setdefault("n_iter", 0)

        first = evaluate()
        loss = float(first)
        evaluations = 1
        state["func_evals"] += 1
        grad = self._gather_flat_grad()
        number = _NUMBERS[grad.dtype]
        if number(grad.abs().max().item()) <= tolerance_grad:
            return first

        d, t = state.get("d"), state.get("t")
        history = _History(state, group["history_size"], number)
        previous, previous_loss = state.get("prev_flat_grad"), state.get("prev_loss")
        iteration = 0
        while iteration < max_iter:
            iteration += 1
            state["n_iter"] += 1
            if state["n_iter"] == 1:
                d = grad.neg()
                t = min(1.0, 1.0 / number(grad.abs().sum().item())) * lr
            else:
                history.append(grad.sub(previous), d.mul(float(t)))
                d = history.direction(grad)
                t = lr
            previous, previous_loss = grad, loss
            slope = number(grad.dot(d).item())
            if slope > -tolerance_change:
                break
            longest = number(d.abs().max().item())
            stationary = False
            calls = 0
            line = _Line(self, evaluate, d, number)
            if search is not None:
                if search != "strong_wolfe":
                    raise RuntimeError("only 'strong_wolfe' is supported")
                start = _Trial(0, loss, grad, slope)
                found, calls = _strong_wolfe(line, start, t, longest, max_eval - evaluations)
                t, loss, grad, _ = found
                line.go(t)
                stationary = number(grad.abs().max().item()) <= tolerance_grad
            else:
                line.go(t)
                # the last point is not evaluated: with a stochastic loss that is no use
                if iteration != max_iter:
                    loss = float(evaluate())
                    grad = self._gather_flat_grad()
                    stationary = number(grad.abs().max().item()) <= tolerance_grad
                    calls = 1
            evaluations += calls
            state["func_evals"] += calls
            if (
                iteration == max_iter
                or evaluations >= max_eval
                or stationary
                or longest * abs(t) <= tolerance_change
                or abs(loss - previous_loss) < tolerance_change
            ):
                break

        if isinstance(t, np.floating):
            t = torch.as_tensor(np.asarray(t), device=grad.device)
        state.update(d=d, t=t, prev_flat_grad=previous, prev_loss=previous_loss, **history.state())
        return first

    def _gather_flat_grad(self) -> Tensor:
        """All gradients as one new vector, real and imaginary parts in turn; zeros where there is none."""
        parts = []
        for p in self._params:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            grad = grad.to_dense() if grad.is_sparse else grad
            parts.append((torch.view_as_real(grad) if grad.is_complex() else grad).reshape(-1))
        return torch.cat(parts)


class _History:
    """The last changes of the gradient and the steps that caused them; state as torch keeps it."""

    def __init__(self, state: dict[str, Any], size: int, number: Any) -> None:
        self.changes: list[Tensor] = state.get("old_dirs") or []
        self.steps: list[Tensor] = state.get("old_stps") or []
        self.ro: list[Tensor] = state.get("ro") or []  # 1 / (y . s)
        self.rho: list[float] = torch.stack(self.ro).tolist() if self.ro else []  # the same, as numbers
        self.scale: Tensor | int = state.get("H_diag", 1)
        self.size = size
        self.number = number

    def append(self, change: Tensor, step: Tensor) -> None:
        """Remember a pair if the curvature along it is positive; forget the oldest when full."""
        curvature = change.dot(step)
        if not self.number(curvature.item()) > 1e-10:
            return
        if len(self.changes) == self.size:
            for old in (self.changes, self.steps, self.ro, self.rho):
                del old[0]
        self.changes.append(change)
        self.steps.append(step)
        self.ro.append(curvature.reciprocal())
        self.rho.append(self.ro[-1].item())
        self.scale = curvature / change.dot(change)  # Nocedal & Wright 2006, eq. 7.20

    def direction(self, grad: Tensor) -> Tensor:
        """Minus the inverse Hessian's approximation times the gradient (Nocedal & Wright 2006, algorithm 7.4)."""
        single = (
            self.number is np.float32
        )  # products of two are exact in double: rounding once is what float32 does
        d = grad.neg()
        alphas = []
        for change, step, rho in zip(self.changes[::-1], self.steps[::-1], self.rho[::-1], strict=True):
            alpha = step.dot(d).item() * rho
            alpha = float(np.float32(alpha)) if single else alpha
            alphas.append(alpha)
            d.add_(change, alpha=-alpha)
        d = torch.mul(d, self.scale)
        for change, step, rho, alpha in zip(self.changes, self.steps, self.rho, alphas[::-1], strict=True):
            beta = change.dot(d).item() * rho
            d.add_(step, alpha=alpha - (float(np.float32(beta)) if single else beta))
        return d

    def state(self) -> dict[str, Any]:
        """Under torch's keys; `al` is torch's scratch."""
        return {"old_dirs": self.changes, "old_stps": self.steps, "ro": self.ro, "H_diag": self.scale}


class _Trial(NamedTuple):
    """A point of a line search."""

    t: Any
    loss: float
    grad: Tensor
    slope: Any


class _Line:
    """The weights along one direction."""

    def __init__(self, optimizer: LBFGS, evaluate: Callable[[], Any], d: Tensor, number: Any) -> None:
        self.optimizer, self.evaluate, self.d, self.number = optimizer, evaluate, d, number
        self.weights = [torch.view_as_real(p) if p.is_complex() else p for p in optimizer._params]
        parts = torch.split(d, [w.numel() for w in self.weights])
        self.parts = [part.view_as(w) for part, w in zip(parts, self.weights, strict=True)]
        self.origin: list[Tensor] | None = None

    def go(self, t: Any) -> None:
        """Move the weights by `t` along the direction."""
        torch._foreach_add_(self.weights, self.parts, alpha=float(t))

    def at(self, t: Any) -> _Trial:
        """Evaluate there, and come back."""
        if self.origin is None:
            self.origin = [w.clone() for w in self.weights]
        self.go(t)
        loss = float(self.evaluate())
        grad = self.optimizer._gather_flat_grad()
        torch._foreach_copy_(self.weights, self.origin)
        return _Trial(t, loss, grad, self.number(grad.dot(self.d).item()))


def _strong_wolfe(line: _Line, start: _Trial, t: Any, longest: Any, limit: int) -> tuple[_Trial, int]:
    """A step that satisfies the strong Wolfe conditions, and the evaluations spent; torch's search (minFunc's).

    Nocedal & Wright 2006, algorithms 3.5 and 3.6, with cubic interpolation; `limit` evaluations after the first.
    """

    def too_high(trial: _Trial) -> Any:
        return trial.loss > start.loss + ARMIJO * trial.t * start.slope

    def flat(trial: _Trial) -> Any:
        return abs(trial.slope) <= -CURVATURE * start.slope

    # bracket: grow the step until a good one lies between the last two
    previous, new = start, line.at(t)
    rounds = 0
    while rounds < limit:
        if too_high(new) or (rounds > 1 and new.loss >= previous.loss):
            break
        if flat(new):
            return new, rounds + 1
        if new.slope >= 0:
            break
        t = _cubic_minimum(previous, new, (new.t + 0.01 * (new.t - previous.t), new.t * 10))
        previous, new = new, line.at(t)
        rounds += 1
    else:
        previous = start

    # zoom: shrink the bracket
    ends = [previous, new]
    low, high = (0, 1) if ends[0].loss <= ends[1].loss else (1, 0)
    crowded = False
    while rounds < limit and not abs(ends[1].t - ends[0].t) * longest < BRACKET:
        t = _cubic_minimum(ends[0], ends[1])
        left, right = min(ends[0].t, ends[1].t), max(ends[0].t, ends[1].t)
        margin = 0.1 * (right - left)
        if min(right - t, t - left) < margin:  # twice in a row, or on an end: step away from it
            if crowded or t >= right or t <= left:
                t = right - margin if abs(t - right) < abs(t - left) else left + margin
                crowded = False
            else:
                crowded = True
        else:
            crowded = False
        new = line.at(t)
        rounds += 1
        if too_high(new) or new.loss >= ends[low].loss:
            ends[high] = new
            low, high = (0, 1) if ends[0].loss <= ends[1].loss else (1, 0)
        else:
            if flat(new):
                return new, rounds + 1
            if new.slope * (ends[high].t - ends[low].t) >= 0:
                ends[high] = ends[low]
            ends[low] = new
    return ends[low], rounds + 1


def _cubic_minimum(a: _Trial, b: _Trial, limits: tuple[Any, Any] | None = None) -> Any:
    """Where the cubic through two trials is least, within `limits` (Nocedal & Wright 2006, eq. 3.59)."""
    if not a.t <= b.t:
        a, b = b, a
    low, high = limits or (a.t, b.t)
    width = a.t - b.t
    drop = 3 * (a.loss - b.loss)
    # torch divides a float by a tensor as a product with the reciprocal
    secant = 1 / width * drop if isinstance(width, np.floating) else drop / width
    d1 = a.slope + b.slope - secant
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0:
        return (low + high) / 2.0
    # by torch, whose square root is not NumPy's in the last bit (it takes MKL's where that is there)
    d2 = type(square)(torch.tensor(square, device=a.grad.device).sqrt().item())
    least = b.t - (b.t - a.t) * ((b.slope + d2 - d1) / (b.slope - a.slope + 2 * d2))
    return min(max(least, low), high)
