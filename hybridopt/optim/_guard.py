"""A step that first looks at all gradients: their norm, whether they are finite, and a GradScaler's verdict."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridopt.errors import NonFiniteLoss
from hybridopt.optim._aside import square_sum
from hybridopt.optim._plan import Number, Part, Plan
from hybridopt.optim._shards import local, spread_square_sum

if TYPE_CHECKING:
    from hybridopt.optim._extended import Extended


def guarded_step(optimizer: Extended, plans: list[Part] | None) -> None:
    """Do the step, unless gradients that are not finite forbid it.

    Args:
        optimizer: whose gradients they are; a GradScaler has set `grad_scale` and `found_inf` on it for this step.
        plans: its compiled steps; None = it has none now.

    Raises:
        NonFiniteLoss: under `nonfinite="raise"`; nothing was changed.
    """
    lent: dict[str, Any] = {
        name: optimizer.__dict__.pop(name)
        for name in ("grad_scale", "found_inf")
        if name in optimizer.__dict__
    }
    try:  # torch's own fused code would read them a second time
        _step(optimizer, plans, lent.get("grad_scale"), lent.get("found_inf"))
    finally:
        optimizer.__dict__.update(lent)


@torch.no_grad()
def _step(
    optimizer: Extended, plans: list[Part] | None, scale: Tensor | None, found_inf: Tensor | None
) -> None:
    extras = optimizer._extras
    known = [plan for plan in plans or () if isinstance(plan, Plan) and plan.engine == "triton"]
    if plans and len(known) == len(plans) and len({plan.kind.device for plan in known}) == 1:
        _step_on_device(optimizer, known, scale, found_inf)
        return
    if found_inf is not None and float(found_inf):
        return
    divisor = 1.0 if scale is None else scale.item()
    factor = None
    if extras.measured:
        norm = math.sqrt(_square_sum(optimizer, plans)) / abs(divisor)
        if not math.isfinite(norm) and extras.nonfinite == "raise":
            raise _refused(optimizer)
        if not math.isfinite(norm) and extras.nonfinite == "skip":
            optimizer._skipped += 1
            return
        if extras.max_grad_norm is not None:
            factor = extras.max_grad_norm / (norm + 1e-6)  # torch.nn.utils.clip_grad_norm_'s
            factor = 1.0 if factor > 1 else factor  # nan stays
    if plans is None:
        if scale is not None:
            for g in _gradients(optimizer):
                g.div_(divisor)
        optimizer._elsewhere(factor)
    else:
        numbers = {"divisor": divisor, "factor": 1.0 if factor is None else factor}
        for plan in plans:
            plan.run(numbers)


def _step_on_device(
    optimizer: Extended, plans: list[Plan], scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """The same without waiting for the device, so that a graph can record it (but for `nonfinite="raise"`)."""
    extras = optimizer._extras
    numbers: dict[str, Number] = {"divisor": 1.0 if scale is None else scale, "factor": 1.0}
    skip = None if found_inf is None else torch.as_tensor(found_inf).reshape(1).float()
    if extras.measured:
        told = [torch.as_tensor(plan.square_sum()) for plan in plans] if not optimizer._spread else []
        norm = (torch.stack(told).sum() if told else spread_square_sum(optimizer._spread)).sqrt()
        if scale is not None:
            norm = norm / scale.abs()
        bad = (~norm.isfinite()).reshape(1)
        if skip is not None:  # a step that a GradScaler leaves out is neither refused nor counted here
            bad = bad & (skip == 0)
        if extras.nonfinite == "raise" and bool(bad):
            raise _refused(optimizer)
        if extras.nonfinite == "skip":
            skip = bad.float() if skip is None else torch.maximum(skip, bad.float())
            if not isinstance(optimizer._skipped, Tensor):
                optimizer._skipped = torch.full((1,), optimizer._skipped, device=bad.device)
            optimizer._skipped.add_(bad)
        if extras.max_grad_norm is not None:
            numbers["factor"] = (extras.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for plan in plans:
        plan.run(numbers, skip)


def _refused(optimizer: Extended) -> NonFiniteLoss:
    return NonFiniteLoss(
        f'{type(optimizer).__name__}: {_first_bad(optimizer)} (nonfinite="raise"); weights and states are as before'
    )


def _gradients(optimizer: Extended) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _square_sum(optimizer: Extended, plans: list[Part] | None) -> float:
    if optimizer._spread:
        return spread_square_sum(optimizer._spread).item()
    if plans is not None:
        return sum(float(plan.square_sum()) for plan in plans)
    return square_sum(_gradients(optimizer))


def _first_bad(optimizer: Extended) -> str:
    for i, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for j, p in enumerate(group["params"]):
            if p.grad is not None and not bool(local(p.grad).to_dense().isfinite().all()):
                which = repr(names[j]) if names else f"number {j} of group {i}"
                return f"expected finite gradients, that of weight {which} (shape {tuple(p.shape)}) is not"
    elsewhere = ", or a gradient on another process is not finite" if optimizer._spread else ""
    return f"expected a finite norm of all gradients, it overflows{elsewhere}"
