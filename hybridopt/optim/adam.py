"""Adam, AMSGrad and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._base import FusedStep
from hybridopt.optim._extras import StepOptions
from hybridopt.rules.adam import RULE


class _Adam(FusedStep):
    rule = RULE

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        return group["lr"], beta1, beta2, group["eps"], group["weight_decay"]

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return (
            group["amsgrad"],
            group["maximize"],
            group["weight_decay"] != 0,
            group["decoupled_weight_decay"],
        )


class Adam(_Adam, torch.optim.Adam):
    """`torch.optim.Adam` with a compiled step: same arguments, same results, same state dict.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused,
            decoupled_weight_decay: as in torch.
        options: `implementation`, `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`,
            `seed`, `flatten`, all by keyword; see `StepOptions`.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> optimizer = hybridopt.optim.Adam([x], lr=0.1)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     (x**2).sum().backward()
        ...     optimizer.step()
        >>> x.detach().round(decimals=3)
        tensor([ 0.8000, -1.8000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._configure(options, foreach, fused)


class AMSGrad(Adam):
    """`Adam(amsgrad=True)` under its own name: divides by the largest second moment so far, so steps never grow again.

    Reddi et al. 2018, "On the Convergence of Adam and Beyond", with torch's bias correction (the paper has none). The
    state dict is that of `torch.optim.Adam(amsgrad=True)`, one state more than Adam's.

    Args:
        params, lr, betas, eps, weight_decay, foreach, maximize, capturable, differentiable, fused,
            decoupled_weight_decay: as in `torch.optim.Adam`.
        options: `implementation`, `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`,
            `seed`, `flatten`, all by keyword; see `StepOptions`.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> optimizer = hybridopt.optim.AMSGrad([x], lr=0.1)
        >>> for gradient in (100.0, 1.0):
        ...     x.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> x.detach().round(decimals=3), sorted(optimizer.state[x])
        (tensor([0.8320]), ['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'step'])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            True,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            **options,
        )


class AdamW(_Adam, torch.optim.AdamW):
    """`torch.optim.AdamW` with a compiled step: same arguments, same results, same state dict.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable,
            fused: as in torch.
        options: `implementation`, `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`,
            `seed`, `flatten`, all by keyword; see `StepOptions`.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> x.grad = torch.tensor([1.0])
        >>> hybridopt.optim.AdamW([x], lr=0.1).step()
        >>> x.detach()
        tensor([0.8990])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.AdamW.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._configure(options, foreach, fused)
