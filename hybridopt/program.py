"""A loss at many points in one forward, as a function of a matrix: split into weights, vmapped, on demand compiled."""

from __future__ import annotations

import types
from collections.abc import Callable, Set
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hybridopt.errors import ObjectiveError
from hybridopt.forms import Loss, as_scalar
from hybridopt.vector import ParameterVector

Noise: TypeAlias = Literal["same", "different", "error"]
Program: TypeAlias = Callable[[Tensor], Any]


def program(loss: Loss, vector: ParameterVector, gradients: bool, noise: Noise) -> Program:
    """The loss at every row of a float64 matrix of shape (rows, n), whose memory it may use.

    Args:
        loss: that has a functional form.
        vector: whose weights the columns are; each is rounded to its own dtype as when it is written.
        gradients: whether gradients are computed beside the losses.
        noise: whether random numbers are drawn once for all rows, for each row, or drawing them is an error.

    Returns:
        A function that returns the losses, shape (rows,); or with `gradients` those by each weight, shape
        (rows, *shape), and the losses.
    """
    at_one = _of_weights(loss, vector.names)
    if gradients:
        at_one = torch.func.grad_and_value(at_one, argnums=tuple(range(len(vector.names))))
    at_all = torch.func.vmap(at_one, randomness=noise)
    sizes = list(vector.sizes)
    shapes = [tensor.shape for tensor in vector.tensors]
    kinds = [(tensor.device, tensor.dtype) for tensor in vector.tensors]
    alike = len(set(kinds)) == 1

    def at_rows(flat: Tensor) -> Any:
        if alike:
            flat = flat.to(*kinds[0])  # one transfer for all
        parts = torch.split(flat, sizes, dim=1)
        if not alike:
            parts = tuple(part.to(*kind) for part, kind in zip(parts, kinds, strict=True))
        return at_all(*(part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)))

    return at_rows


def compiled(at_rows: Program, devices: Set[torch.device]) -> Program:
    """The same, compiled by `torch.compile` at its first call, for the number of rows that it has there.

    Random numbers are those of eager mode (`fallback_random`), so that a batch draws what a loop draws. Shapes stay
    constants (`dynamic=False`), also those of data that change: else the bits would depend on the sizes seen before.
    On a GPU the program is replayed as a CUDA graph.

    What was compiled is called through `torch._dynamo.run`, under the same guards: a call costs 44 instead of 57 µs,
    of which what is computed takes 20 (100 rows of ten weights, one CPU core), since the compiler need not be made
    ready. Where the guards find nothing that was compiled for a call, the compiler is called.

    Args:
        at_rows: see `program`.
        devices: of the weights. If there is one, points are sent there first: wherever they were drawn, it is the same
            program.
    """
    known = False  # whether what was compiled is to be called, or else to raise

    def forward(flat: Tensor) -> Any:
        if not torch.compiler.is_compiling() and known:
            raise _Unseen
        return at_rows(flat)

    # torch keeps at most 8 programs for one code object: each batch gets a code object of its own
    own = types.FunctionType(forward.__code__.replace(), globals(), "forward", closure=forward.__closure__)
    from hybridopt.products import ShortProducts  # loads the compiler: 3 s

    options: dict[str, Any] = {
        "fallback_random": True,
        "triton.cudagraphs": any(device.type == "cuda" for device in devices),
        "post_grad_custom_pre_pass": ShortProducts(),
    }
    compiling: Program = torch.compile(own, fullgraph=True, dynamic=False, options=options)
    replaying: Program = torch._dynamo.run(own)
    home = next(iter(devices)) if len(devices) == 1 else None

    def called(flat: Tensor) -> Any:
        nonlocal known
        if home is not None:
            flat = flat.to(home)
        known = True
        try:
            return replaying(flat)
        except _Unseen:
            pass
        finally:
            known = False
        return compiling(flat)

    return called


class _Unseen(Exception):
    """Nothing compiled so far is for this call."""


def _of_weights(loss: Loss, names: list[str] | tuple[str, ...]) -> Callable[..., Any]:
    """The loss as a function of one tensor per weight that returns a tensor without dimensions."""

    def function(*weights: Tensor) -> Tensor:
        assert loss.functional is not None
        value = as_scalar(loss.functional(dict(zip(names, weights, strict=True))))
        if not torch.compiler.is_compiling() and torch.func.debug_unwrap(value) is value:
            raise ObjectiveError("the loss does not depend on the weights that it is given")
        return value

    return function
