"""Steps over whole matrices: a parameter group at a time, its weights batched by shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridopt.optim._extended import Extended
from hybridopt.optim._implementation import outside_graphs

BATCHED = "batched by shape"


class GroupStep(Extended):
    """torch's step, but each parameter group is given to `_step_group`."""

    def _step_group(self, group: dict[str, Any]) -> str:
        """Update the weights of a group; returns what ran, `BATCHED` or `_torchs(why)`."""
        raise NotImplementedError

    @torch.no_grad()
    def _torch_step(self) -> None:
        ran = [self._step_group(group) for group in self.param_groups]
        self._say(next((used for used in ran if used != BATCHED), BATCHED))

    def _torchs(self, why: str) -> str:
        return f"{self._otherwise()}: {why}" if why else self._otherwise()

    @outside_graphs  # grouping by shape and reading norms is not for torch.compile to trace
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one update.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._guarded_step()
        if self._implementation == "fused":
            self._warn(
                "fused was asked for, but a step over whole matrices has no fused kernel; "
                f"{self._used} runs instead"
            )
        return loss


def same_shaped(params: Sequence[Tensor], limit: int) -> Iterator[list[int]]:
    """Indices of weights alike in shape, dtype and device, at most `limit` elements (or one weight) at a time."""
    alike: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        alike[p.shape, p.dtype, p.device].append(i)
    for members in alike.values():
        size = max(1, limit // max(1, params[members[0]].numel()))
        for start in range(0, len(members), size):
            yield members[start : start + size]
