"""What a step may do beside its rule: other precisions, rounding, clipping, a look for numbers that are not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, TypedDict

import torch

from hybridopt.errors import MethodError

Implementation: TypeAlias = Literal["auto", "reference", "foreach", "fused"]
HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, torch.float64, *HALVES)


class StepOptions(TypedDict, total=False):
    """Keyword options of every optimizer here, beside its own; never part of a state dict.

    `LBFGS` takes `implementation` alone; `flatten` is for elementwise steps (not Adafactor, LAMB, Muon, SparseAdam).

    16-bit weights are computed in float32, but under torch's `differentiable=True`, whose steps are torch's own in the
    dtype of the weights. All of this runs inside the fused loop; where that cannot be used,
    torch's own code runs on float32 copies (slower, same results up to rounding).

    Args:
        implementation: `"auto"` (default): the fastest that gives the right result; `"fused"`: one compiled loop, with
            one warning where that cannot be; `"foreach"`, `"reference"`: torch's own list functions, torch's own loop.
            Under the first two, single weights that cannot be compiled (a sparse gradient, a gradient laid out unlike
            its weight, gaps, a dtype without engine) are stepped by torch's own code beside the others, with one
            warning that names the reason; complex weights are compiled.
            Every class takes torch's spelling as well: `foreach=True` is `"foreach"`, `fused=True` is `"fused"`, both
            False are `"reference"`; one of them False leaves `"auto"` its choice.
        state_dtype: dtype of the elementwise states, kept by `load_state_dict`; None (default) = the weight's, as in
            torch. Those of complex weights stay as the weight is.
        stochastic_rounding: 16-bit weights and states are rounded up or down at random, right on average, so that
            updates smaller than half a digit are not lost. The bits depend on seed, step, tensor and element alone (of
            a DTensor: on its shard too), on any device. float16 has nothing between 0 and 6e-8, however it is rounded:
            second moments of gradients below some 0.02 want a `state_dtype` (torch.bfloat16, torch.float32) beside it.
            Default False.
        kahan_sum: what rounding takes from a 16-bit weight is kept in one more state, `kahan_comp` (2 bytes a weight),
            and added back at the next step. Default False.
        max_grad_norm: the rule sees gradients scaled down so that the 2-norm of all of them is at most this, as after
            `torch.nn.utils.clip_grad_norm_`; `.grad` itself stays as it is. One reading of the gradients more. Default
            None.
        nonfinite: if a gradient is nan or inf: step as torch does (`"ignore"`, default), leave weights and states alone
            and count it in `skipped_steps` (`"skip"`), or raise `NonFiniteLoss` before anything is changed (`"raise"`).
        seed: of stochastic rounding, 0 to 2**32 - 1. Default 0. Not in the state dict: give it again when you resume.
        flatten: weights, states and gradients of one device and dtype are moved into one buffer each, and stepped in
            one go; same bits. The tensor objects stay, as views (starting at multiples of 64 elements), but for
            `.grad`. Gradients remain in their buffer only under `zero_grad(set_to_none=False)`; others are read where
            they are. What others move out (`.to()`, `load_state_dict(assign=True)`) moves in again at the next step.
            Weights whose memory others see, too, stay where they are, with one warning. Costs one more copy of
            weights, states and gradients while moving. Whoever saves a weight saves the whole buffer:
            `torch.save(model.state_dict())` is as large as ever, but one weight of it is not (clone it); state dicts of
            the optimizer are safe. Default False.

    Example:
        >>> import torch, hybridopt
        >>> w = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        >>> optimizer = hybridopt.optim.AdamW([w], stochastic_rounding=True, max_grad_norm=1.0, nonfinite="skip")
        >>> w.grad = torch.full_like(w, torch.nan)
        >>> optimizer.step()
        >>> w.tolist(), optimizer.skipped_steps
        ([1.0, 1.0, 1.0], 1)
    """

    implementation: Implementation
    state_dtype: torch.dtype | None
    stochastic_rounding: bool
    kahan_sum: bool
    max_grad_norm: float | None
    nonfinite: Literal["ignore", "skip", "raise"]
    seed: int
    flatten: bool


@dataclass(frozen=True)
class Extras:
    """`StepOptions` as settled."""

    state_dtype: torch.dtype | None = None
    stochastic_rounding: bool = False
    kahan_sum: bool = False
    max_grad_norm: float | None = None
    nonfinite: str = "ignore"
    seed: int = 0
    flatten: bool = False

    @property
    def measured(self) -> bool:
        """Whether gradients are read before the step."""
        return self.max_grad_norm is not None or self.nonfinite != "ignore"

    def kahan_for(self, weight: torch.dtype) -> bool:
        """Whether a weight of this dtype has a `kahan_comp`."""
        return self.kahan_sum and weight in HALVES

    @property
    def stored(self) -> bool:
        """Whether something was said about how weights and states are stored."""
        return self.state_dtype is not None or self.stochastic_rounding or self.kahan_sum

    def given(self) -> list[str]:
        """Names of the options that are not as by default."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]

    @classmethod
    def of(cls, name: str, options: dict[str, Any]) -> Extras:
        """Check and settle; `name` is the optimizer's, for messages.

        Raises:
            MethodError: an option is unknown or has a value it cannot have.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise MethodError(
                f"{name}: unknown option {', '.join(unknown)}; beside its own it takes implementation, "
                f"{', '.join(sorted(known))}"
            )
        for option in ("stochastic_rounding", "kahan_sum", "flatten"):
            if not isinstance(options.get(option, False), bool):
                raise MethodError(f"{name}: expected {option} to be True or False, got {options[option]!r}")
        norm = options.get("max_grad_norm")
        if norm is not None:
            try:
                limit = math.nan if isinstance(norm, bool | str) else float(norm)
            except (TypeError, ValueError, RuntimeError):  # a list, a tensor of several numbers
                limit = math.nan
            if not 0 < limit < math.inf:
                raise MethodError(f"{name}: expected max_grad_norm > 0, got {norm!r}")
            options = {**options, "max_grad_norm": limit}
        extras = cls(**options)
        if extras.state_dtype is not None and extras.state_dtype not in _FLOATS:
            raise MethodError(
                f"{name}: expected state_dtype to be a torch float dtype, got {extras.state_dtype!r}"
            )
        if extras.nonfinite not in ("ignore", "skip", "raise"):
            raise MethodError(
                f"{name}: expected nonfinite to be ignore, skip or raise, got {extras.nonfinite!r}"
            )
        if isinstance(extras.seed, bool) or not isinstance(extras.seed, int):
            raise MethodError(f"{name}: expected seed to be a whole number, got {extras.seed!r}")
        if not 0 <= extras.seed < 1 << 32:
            raise MethodError(f"{name}: expected 0 <= seed < 2**32, got {extras.seed}")
        return extras
