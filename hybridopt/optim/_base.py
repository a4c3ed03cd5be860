"""What every optimizer with a compiled step shares: the choice of what runs, and torch's contracts around it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import repeat
from operator import is_
from typing import Any, ClassVar

import torch
from torch._compile import _disable_dynamo
from torch.optim import optimizer as torch_optimizer

from hybridopt.engines import cpu
from hybridopt.optim._implementation import Chosen
from hybridopt.optim._plan import FirstStep, Ineligible, Plan
from hybridopt.rules import Rule

# Private names of torch, and why: profiler_enabled keeps `Optimizer.step#...` in profiles without paying for the range
# when nobody looks; _disable_dynamo is torch.compiler.disable without loading the compiler (0.6 s) at import.
_profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled
_is_compiling = torch.compiler.is_compiling


class FusedStep(Chosen):
    """A torch optimizer whose `step` runs as one compiled loop wherever that gives torch's result.

    Mixed in before torch's own class: constructor checks, state keys, state dicts, schedulers, hooks and everything
    that the compiled loop does not cover (complex or sparse weights, `differentiable`, `capturable`, other devices
    and dtypes, the very first step, which creates the state) stay torch's own code.
    """

    rule: ClassVar[Rule]
    _plans: list[Plan] | None = None
    _entries: tuple[dict[str, Any], ...] = ()

    # -- what a subclass says ---------------------------------------------------------------------------------------

    def _hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Values of `rule.hyper` for a parameter group."""
        raise NotImplementedError

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        """Values of `rule.flags` for a parameter group."""
        raise NotImplementedError

    def _torch_step(self) -> None:
        """One step by torch's own code, without its profiling wrapper (ours has run the hooks already)."""
        function: Any = super().step.__func__  # type: ignore[attr-defined]
        while getattr(function, "hooked", False):
            function = function.__wrapped__
        function(self)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one update.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.

        Returns:
            The closure's loss, or None.
        """
        if _is_compiling():  # nothing in here is for torch.compile to trace
            return _outside_the_graph(self, closure)
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or _profiler_enabled()
        ) and type(
            self
        ).step is FusedStep.step:  # torch has wrapped a subclass's own `step`: hooks have run there
            return _hooked_update(self) if closure is None else _hooked_update(self, closure)
        return self._update(closure)

    # torch wraps every step in a profiler range (5 µs and more) unless it finds it wrapped; `step` does that on demand
    step.hooked = True  # type: ignore[attr-defined]

    def _update(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if "grad_scale" in self.__dict__ or "found_inf" in self.__dict__:  # set by a GradScaler for this step
            self._torch_step()
            return loss
        plans = self._plans
        if plans is None or not self._current(plans):
            plans = self._prepare()
        if plans is None:
            self._torch_step()
        else:
            for plan in plans:
                plan.run()
        return loss

    def _current(self, plans: list[Plan]) -> bool:
        """Whether the plans still describe groups, weights and states; takes over new gradients and options."""
        states, entries, groups = self.state, self._entries, self.param_groups
        if (
            len(states) != len(entries)
            or not all(map(is_, states.values(), entries))
            or len(plans) != len(groups)
        ):
            return False
        return all(map(Plan.refresh, plans, repeat(self), groups))

    def _prepare(self) -> list[Plan] | None:
        """Plans for all groups; None, with the reason in `repr`, if torch must do this step."""
        self._plans = None
        if self._implementation in ("reference", "foreach"):
            self._say(self._otherwise())
            return None
        self._entries = tuple(self.state.values())
        try:
            why = cpu.available()
            if why:
                raise Ineligible(why)
            plans = [Plan(self, group) for group in self.param_groups]
            if not self._current(plans):
                raise Ineligible("a gradient's address cannot be read")
        except Ineligible as reason:
            self._say(f"{self._otherwise()}: {reason}")
            if self._implementation == "fused" and not self._warned and not isinstance(reason, FirstStep):
                self._warned = True
                warnings.warn(
                    f"{type(self).__name__}: fused was asked for, but {reason}; {self._otherwise()} runs instead",
                    RuntimeWarning,
                    stacklevel=4,
                )
            return None
        self._say("fused (numba)")
        self._plans = plans
        return plans

    # -- what makes plans stale ---------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's (floating state is cast to its weight's dtype), but the implementation stays the one chosen."""
        super().load_state_dict(state_dict)
        self._plans = None
        self._settle()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        self._plans = None
        self._settle()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = None


_outside_the_graph: Callable[..., Any] = _disable_dynamo(FusedStep.step)
_hooked_update = torch.optim.Optimizer.profile_hook_step(FusedStep._update)
