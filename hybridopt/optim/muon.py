"""Muon: steps along orthogonalised momentum, for the matrices of a network."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim import _muon as torch_muon
from torch.optim.optimizer import ParamsT

from hybridopt.optim._extras import StepOptions
from hybridopt.optim._groups import BATCHED, GroupStep, same_shaped

# Elements orthogonalised at a time, or one matrix: bounds the temporaries (16 MiB each in float32).
CHUNK = 1 << 22
LONE_BELOW = 8_000  # multiplications of a product; below, a matrix that is alone is for torch's for-loop
NATIVE_BELOW = 2_000  # multiplications of a product; below, bfloat16 costs less than the roundings of float32
_OPTIONS = (
    "lr",
    "weight_decay",
    "momentum",
    "nesterov",
    "ns_coefficients",
    "eps",
    "ns_steps",
    "adjust_lr_fn",
)
_PLAIN = (Tensor, torch.nn.Parameter)


class Muon(GroupStep, torch.optim.Muon):
    """`torch.optim.Muon` with same-shaped matrices batched: same arguments, same state dict, many times faster.

    For the hidden layers of a network; give biases, embeddings and whatever is not a matrix to `AdamW`.

    Momentum and weight decay are torch's to the last bit. The Newton-Schulz iteration keeps torch's rounding of every
    product to bfloat16. Where the processor multiplies bfloat16 (and for matrices of a few weights) the products are
    torch's; elsewhere they are made in float32 and then rounded. torch sums in float32 as well, but in another order,
    so that an entry of the step may differ from torch's in the last bits of bfloat16 (of the iteration, which is
    itself that far from its exact value), as it does between two processors that run torch.

    Args:
        params, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in torch.
        foreach: `True` is `implementation="foreach"`.
        fused: `True` is `implementation="fused"`.
        implementation: `"auto"` (default): batched on the CPU, and where `lr` is a tensor on a GPU (which a CUDA graph
            then reads anew), torch's for-loop elsewhere; `"foreach"`: batched on any device; `"fused"`: no such kernel:
            one warning, then as auto; `"reference"`: torch's for-loop.
        options: `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`, `seed`, by keyword;
            see `StepOptions`. They, and 16-bit weights, take the time of float32 copies.

    Notes:
        Weights that are DTensors are stepped by torch's for-loop, which sends what its products need.
        Memory beyond the state: some six copies of the weights of one shape, or of 4 million of them at a time.
        16-bit weights are stepped as float32 (torch: in their own dtype, and without Nesterov momentum torch normalises
        the momentum of bfloat16 weights in place).

    Source:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; `match_rms_adamw`: Liu et al. 2025,
        arXiv:2502.16982.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.eye(2, requires_grad=True)
        >>> optimizer = hybridopt.optim.Muon([x], lr=0.1)
        >>> for _ in range(10):
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
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.Muon.__init__(
            self, params, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn
        )
        self._configure(options, foreach, fused)

    def _active(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def _counts(self) -> bool:
        return False

    def _otherwise(self) -> str:
        return "torch's for-loop"

    def _step_group(self, group: dict[str, Any]) -> str:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor] = []
        torchs: Any = (
            self  # checks of weights and gradients, and creation of the state, are torch's own: untyped
        )
        torchs._init_group(group, params, grads, buffers)
        options = {name: group[name] for name in _OPTIONS}
        why = self._not_batched(params, grads, options)
        if why or self._implementation == "reference":
            torch_muon.muon(params, grads, buffers, has_complex=False, **options)
            return self._torchs(why)
        rest: list[int] = []  # torch's for-loop is the fastest where there is nothing to batch
        lists = (params, grads, buffers)
        for batch in same_shaped(params, CHUNK):
            p = params[batch[0]]
            if len(batch) == 1 and p.numel() * min(p.shape) < LONE_BELOW and not _live(group["lr"]):
                rest += batch
            else:
                _update(*[[column[i] for i in batch] for column in lists], **options)
        if rest:
            torch_muon.muon(*[[column[i] for i in rest] for column in lists], has_complex=False, **options)
        return self._torchs("nothing to batch") if params and len(rest) == len(params) else BATCHED

    def _not_batched(self, params: list[Tensor], grads: list[Tensor], options: dict[str, Any]) -> str:
        """Why torch's own code must do this group, or says what is wrong with it."""
        for t in (*params, *grads):
            if type(t) not in _PLAIN or t.layout is not torch.strided or t.ndim != 2:
                return f"a weight or gradient is a {t.ndim}-dimensional {type(t).__name__} with layout {t.layout}"
            if t.device.type != "cpu" and self._implementation != "foreach" and not _live(options["lr"]):
                return f"a weight is on {t.device}"
        if options["ns_steps"] >= 100 or len(options["ns_coefficients"]) != 3:
            return "wrong ns_steps or ns_coefficients"
        return ""


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: Any,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    eps: float,
    ns_steps: int,
    adjust_lr_fn: str | None,
) -> None:
    """One step of same-shaped matrices, in place; letters as in torch's documentation."""
    torch._foreach_lerp_(buffers, grads, 1 - momentum)  # B
    directions = torch._foreach_lerp(grads, buffers, momentum) if nesterov else buffers
    rows, columns = params[0].shape
    stack = torch.empty(len(params), rows, columns, dtype=torch.bfloat16, device=params[0].device)
    torch._foreach_copy_(list(stack.unbind()), list(directions))
    del directions
    tall = rows > columns
    steps = orthogonalised(stack.mT if tall else stack, ns_coefficients, ns_steps, eps)
    lr = lr.squeeze() if isinstance(lr, Tensor) else lr  # a tensor computes in its own precision, as in torch
    if adjust_lr_fn == "match_rms_adamw":
        adjusted = lr * (0.2 * math.sqrt(max(rows, columns)))
    else:
        adjusted = lr * math.sqrt(max(1, rows / columns))
    decay, alpha = 1 - lr * weight_decay, -adjusted
    if _live(lr):
        steps, alpha = steps.to(params[0].dtype) * alpha, 1.0
    else:
        decay, alpha = float(decay), float(alpha)
    torch._foreach_mul_(params, decay)
    torch._foreach_add_(params, list((steps.mT if tall else steps).unbind()), alpha=alpha)


def _live(lr: Any) -> bool:
    """Whether the learning rate is a tensor on a device: nobody waits for it, and a graph that is replayed reads it."""
    return isinstance(lr, Tensor) and not lr.is_cpu


def orthogonalised(
    stack: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float
) -> Tensor:
    """U V^T of every matrix U S V^T, nearly: its singular values are brought to about 0.5 ... 1.5 (Jordan et al. 2024).

    Args:
        stack: shape (k, n, m), n <= m, bfloat16; overwritten.
        coefficients: a, b, c of X <- a X + (b A + c A^2) X, A = X X^T.
        iterations: of that polynomial.
        eps: least norm a matrix is divided by.

    Returns:
        Shape (k, n, m), values rounded to bfloat16, in the dtype the products were made in.
    """
    a, b, c = coefficients
    stack.div_(torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True).clamp_(min=eps))
    native = _bfloat16_products(stack)
    X = stack if native else stack.float()
    for _ in range(iterations):
        A = _rounded(torch.bmm(X, X.mT))
        B = _rounded(torch.baddbmm(A, A, A, beta=b, alpha=c))
        X = _rounded(torch.baddbmm(X, B, X, beta=a))
    return X


def _rounded(product: Tensor) -> Tensor:
    """In place to the values bfloat16 has."""
    return product if product.dtype is torch.bfloat16 else product.copy_(product.bfloat16())


def _bfloat16_products(stack: Tensor) -> bool:
    """Whether to multiply in bfloat16, or in float32 with results rounded: the same up to the order of float32 sums.

    Without bfloat16 units torch multiplies bfloat16 in a plain loop: a step of 20 matrices of 256 x 256 takes 5.5 s, in
    float32 0.18 s; of 25 of 64 x 64 70 and 6.3 ms; the iteration of one of 8 x 8 0.11 and 0.13 ms (AMD EPYC without
    AVX-512, one thread, 2026-11).
    """
    k, n, m = stack.shape
    return stack.device.type != "cpu" or _cpu_multiplies_bfloat16() or k * n * n * m < NATIVE_BELOW


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    # what torch itself asks before it gives a bfloat16 product to oneDNN; there is no public name for it
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-untyped-call,no-any-return]
