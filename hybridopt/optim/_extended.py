"""What every optimizer here takes beside torch's arguments (`StepOptions`), around a step in Python."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from hybridopt.errors import MethodError
from hybridopt.optim._extras import HALVES, Extras, StepOptions
from hybridopt.optim._guard import guarded_step
from hybridopt.optim._implementation import Chosen
from hybridopt.optim._shards import Spread, shards_known
from hybridopt.optim._wide import cast_states, keep_precision, wide_step


class Extended(Chosen):
    """A torch optimizer with `StepOptions`; mixed in before torch's own class.

    A subclass calls `_configure` at the end of its `__init__`, and `_guarded_step` for a step.
    """

    _guarded = False  # gradients are read before the step
    _skipped: int | Tensor = 0
    _spread: Spread = []  # noqa: RUF012 - replaced as a whole; of DTensors, while they are stepped
    _stream_numbers: Mapping[Tensor, int] = MappingProxyType({})  # where it is not the position
    _stand_for: Mapping[Tensor, Tensor] = MappingProxyType({})  # copy in a group now: weight
    _flattens: ClassVar[bool] = False

    def _active(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of a group's states that take the dtype of their weight, or `state_dtype`."""
        raise NotImplementedError

    def _numbers(self) -> tuple[str, ...]:
        """Names of the states that are one number a weight, besides `step`."""
        return ()

    def _counts(self) -> bool:
        """Whether there is a `step` for every weight."""
        return True

    def _torch_step(self) -> None:
        """One step in Python, without hooks; creates the state."""
        raise NotImplementedError

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient was not finite (`nonfinite="skip"`); on a GPU, reading it waits."""
        return int(self._skipped)

    def _streams(self, index: int) -> list[int]:
        """What makes the noise of each weight of a group its own: its position in the optimizer, and its shard's."""
        first = sum(len(group["params"]) for group in self.param_groups[:index])
        params = self.param_groups[index]["params"]
        return [self._stream_numbers.get(p, position) for position, p in enumerate(params, first)]

    def _configure(
        self, options: StepOptions, foreach: bool | None = None, fused: bool | None = None
    ) -> None:
        """Settle what every class here takes beside torch's arguments; called at the end of `__init__`."""
        rest: dict[str, Any] = dict(options)
        implementation = rest.pop("implementation", "auto")
        self._extras = Extras.of(type(self).__name__, rest)
        self._guarded = self._extras.measured
        if self._extras.flatten and not self._flattens:
            raise MethodError(
                f"{type(self).__name__}: flatten is for steps that are elementwise, and this one is not; leave it out"
            )
        cast_states(self)
        self._choose(implementation, foreach, fused)

    def _guarded_step(self) -> None:
        """The step in Python, with what was asked for around it."""
        with shards_known(self):
            if self._guarded:
                guarded_step(self, None)
            else:
                self._elsewhere(None)

    def _elsewhere(self, factor: float | None) -> None:
        """The step in Python on gradients times `factor`, on wider copies where numbers are stored in 16 bits."""
        extras, groups = self._extras, self.param_groups
        copies = factor is not None or extras.stored
        if any(group.get("differentiable") for group in groups):
            if copies:
                raise MethodError(
                    f"{type(self).__name__}: differentiable=True cannot be joined with max_grad_norm, state_dtype, "
                    "stochastic_rounding or kahan_sum, whose copies have no gradient; leave one of them out"
                )
            self._torch_step()
        elif copies or self._has_halves():
            wide_step(self, self._torch_step, factor)
        else:
            self._torch_step()

    def _has_halves(self) -> bool:
        """Whether something has to be widened."""
        return any(p.dtype in HALVES for group in self.param_groups for p in group["params"])

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's, but the implementation stays the one chosen, and no state loses precision.

        torch casts floating states to their weight's dtype. Here `state_dtype` decides, if it was given; otherwise
        a 16-bit weight keeps the wider states that were saved for it.
        """
        given: list[Any] = []

        def kept(*_: Any) -> None:
            keep_precision(self, given[-1])
            self._settle()

        handles = [  # behind the hooks of others before, ahead of those after
            self.register_load_state_dict_pre_hook(lambda _, told: given.append(told)),
            self.register_load_state_dict_post_hook(kept, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, with what was asked for."""
        return {
            **super().__getstate__(),
            "_extras": self._extras,
            "_guarded": self._guarded,
            "_skipped": self.skipped_steps,
        }
