"""What every optimizer with a compiled step shares: the choice of what runs, and torch's contracts around it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import optimizer as torch_optimizer

from hybridopt.errors import MethodError
from hybridopt.optim._aside import Aside
from hybridopt.optim._extended import Extended
from hybridopt.optim._extras import StepOptions
from hybridopt.optim._flat import Layout, NotFlat, flatten, own_memory
from hybridopt.optim._guard import guarded_step
from hybridopt.optim._kind import Broken, FirstStep, Ineligible
from hybridopt.optim._plan import Part, Plan, parts_of
from hybridopt.optim._shards import Shards, sharded
from hybridopt.optim._watch import END, Contents, Versions
from hybridopt.rules import Rule

# Private names of torch, and why: profiler_enabled keeps `Optimizer.step#...` in profiles without paying for the range
# when nobody looks; _disable_dynamo is torch.compiler.disable without loading the compiler (0.6 s) at import.
_profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled
_is_compiling = torch.compiler.is_compiling
_SHELF = 16  # sets of plans that are kept


class FusedStep(Extended):
    """A torch optimizer whose `step` runs as one compiled loop wherever that gives torch's result.

    Mixed in before torch's own class: constructor checks, state keys, state dicts, schedulers, hooks and everything
    that no engine covers (`differentiable`, `capturable` on the CPU, devices other than CPU and CUDA, the very first
    step, which creates the state) stay torch's own code; 16-bit weights then run on float32 copies. So do single
    weights that no engine can step (sparse gradients, gaps, subclasses), ahead of the compiled step of the others.
    """

    rule: ClassVar[Rule]
    _plans: list[Part] | None = None
    _states: Mapping[Tensor, Any] | None = None
    _structure = _options = Contents(())
    _layout: Layout | None = None
    _versions = Versions()
    _takes_complex: ClassVar[bool] = True  # real and imaginary parts are stepped as numbers of their own
    _live = False  # an option may change without being replaced
    _unscaling = False
    _shards: Shards | None = None
    _shelf: Mapping[tuple[Any, ...], list[Part]] = MappingProxyType({})
    _step_supports_amp_scaling = True  # torch's GradScaler then leaves unscaling and skipping to the step
    _flattens = True

    # -- what a subclass says ---------------------------------------------------------------------------------------

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """Values of `rule.hyper` for a parameter group."""
        raise NotImplementedError

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        """Values of `rule.flags` for a parameter group."""
        raise NotImplementedError

    def _flags_by_name(self, group: Mapping[str, Any]) -> dict[str, bool]:
        return dict(zip(self.rule.flags, map(bool, self._flags(group)), strict=True))

    def _active(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the elementwise states of a group."""
        return self.rule.active(self._flags_by_name(group))

    def _numbers(self) -> tuple[str, ...]:
        return self.rule.scalar_state

    def _counts(self) -> bool:
        return self.rule.counts

    def _configure(
        self, options: StepOptions, foreach: bool | None = None, fused: bool | None = None
    ) -> None:
        super()._configure(options, foreach, fused)
        if self._extras.flatten and self._implementation in ("reference", "foreach"):
            raise MethodError(
                f"{type(self).__name__}: flatten is for the compiled step, but {self._implementation} was asked for; "
                "leave one of them out"
            )

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
        options, plans = self.__dict__, self._plans
        scaler = "grad_scale" in options or "found_inf" in options  # set by a GradScaler for this step
        if scaler or plans is None or self._unscaling or self._guarded or not self._current(plans):
            self._careful_update(scaler)
        else:
            for plan in plans:
                plan.run()
        return loss

    def _careful_update(self, scaler: bool) -> None:
        """A step that is not simply the next one of its plans."""
        plans = self._plans
        if plans is None and sharded(self):
            if self._shards is None or not self._shards.fits(self):
                self._shards = Shards(self)
            self._shards.step(self)
            return
        unscaling = scaler and self.__dict__.get("grad_scale") is not None
        if unscaling is not self._unscaling:
            self._unscaling, plans = unscaling, None
        if plans is None or not self._current(plans):
            plans = self._shelved() or self._prepare()
        if scaler or self._guarded:
            guarded_step(self, plans)
        elif plans is None:
            self._elsewhere(None)
        else:
            for plan in plans:
                plan.run()
        for plan in plans or ():
            if isinstance(plan, Aside):
                self._warn(f"{self._asked}{plan.reason}; {self._otherwise()} runs for {plan.which}")

    def _current(self, plans: list[Part]) -> bool:
        """Whether the plans still describe groups, weights and states; takes over new gradients and options."""
        if (self.state is not self._states or self.param_groups is not self._groups) or (
            (self._live or not self._versions.same()) and not self._take_options(plans)
        ):
            return False
        for plan in plans:  # noqa: SIM110 - all() over a generator would take half a microsecond more
            if not plan.refresh():
                return False
        return True

    def _take_options(self, plans: list[Part]) -> bool:
        """Compare objects one by one, where something may have changed; False if more than options has."""
        written = self._versions.same_but(len(self.param_groups))  # as schedules do
        if not written and not self._structure.same():
            return False
        if self._live or not self._options.same():
            if not all(plan.read_options(self, self.param_groups[plan.index]) for plan in plans):
                self._versions = Versions()  # asked once more, the answer is the same
                return False
            self._note_options(plans)
        if not written:
            self._versions = Versions(
                [self.param_groups, *(group["params"] for group in self.param_groups)],
                [*self.param_groups, self.state, *self.state.values()],
            )
        return True

    def _note_structure(self) -> None:
        """What plans are made for, but for options, gradients and memory."""
        self._states, self._groups = self.state, self.param_groups
        self._versions = Versions()  # of what was there before, which would never change again
        lists = chain.from_iterable((group["params"], END) for group in self.param_groups)
        entries = [entry.values() for entry in self.state.values()]
        self._structure = Contents([*lists, self.state.values(), *entries])

    def _note_options(self, plans: list[Part]) -> None:
        self._live = any(plan.live for plan in plans)
        self._options = Contents([self.param_groups, *(group.values() for group in self.param_groups)])

    def _shelved(self) -> list[Part] | None:
        """Plans made before for the weights that have a gradient now: layers and experts may be left out in turn."""
        plans = self._shelf.get(self._pattern()) if self._unreplaced() else None
        if plans is None or not all(plan.read_options(self, self.param_groups[plan.index]) for plan in plans):
            return None
        self._note_options(plans)
        return self._adopted(plans) if self._current(plans) else None

    def _unreplaced(self) -> bool:
        """Whether groups, weights and states are those that plans were made for last."""
        return self.state is self._states and self.param_groups is self._groups and self._structure.same()

    def _pattern(self) -> tuple[Any, ...]:
        """What plans differ in when nothing is replaced."""
        grads = (p.grad for group in self.param_groups for p in group["params"])
        return self._unscaling, *(None if g is None else g.layout for g in grads)

    def _prepare(self) -> list[Part] | None:
        """Plans for all groups; None, with the reason in `repr`, if this step is not compiled."""
        self._plans = None
        if self._implementation in ("reference", "foreach"):
            self._say(self._otherwise())
            return None
        shelf = dict(self._shelf) if self._unreplaced() and len(self._shelf) < _SHELF else {}
        self._shelf = {}
        self._note_structure()
        try:
            plans = self._make_plans()
            self._note_options(plans)
            if not self._current(plans):
                raise Ineligible("a gradient's address cannot be read")
        except Ineligible as reason:
            self._say(f"{self._otherwise()}: {reason}")
            if isinstance(reason, Broken):
                self._warn(f"{reason}; {self._otherwise()} runs instead")
            elif self._asked and not isinstance(reason, FirstStep):
                self._warn(f"{self._asked}{reason}; {self._otherwise()} runs instead")
            return None
        if not self._extras.flatten:
            self._shelf = shelf | {self._pattern(): plans}
        return self._adopted(plans)

    def _adopted(self, plans: list[Part]) -> list[Part]:
        self._plans = plans
        aside = [plan for plan in plans if isinstance(plan, Aside)]
        compiled = [plan for plan in plans if isinstance(plan, Plan) and (plan.size or not aside)]
        used = [f"fused ({', '.join(sorted({plan.engine for plan in compiled}))})"] if compiled else []
        if aside:
            used.append(f"{self._otherwise()}: {aside[0].reason}")
        self._say(", ".join(used))
        return plans

    def _make_plans(self) -> list[Part]:
        """Plans for all groups, of weights that were moved together first if that was asked for."""
        parts = self._parts()
        if not self._extras.flatten:
            return parts
        try:
            self._layout = flatten(self, [part for part in parts if isinstance(part, Plan)])
        except NotFlat as reason:
            self._layout = None
            self._warn(f"flatten was asked for, but {reason}; weights stay where they are")
        return self._parts()

    def _parts(self) -> list[Part]:
        """Those in Python first: where torch's code refuses a weight, no plan has stepped its own."""
        parts = [part for index in range(len(self.param_groups)) for part in parts_of(self, index)]
        return sorted(parts, key=lambda part: not isinstance(part, Aside))

    @property
    def _asked(self) -> str:
        """What was asked for that only the compiled loop does, as the beginning of a warning."""
        asked = "fused" if self._implementation == "fused" else "flatten" if self._extras.flatten else ""
        return asked and f"{asked} was asked for, but "

    # -- what makes plans stale ---------------------------------------------------------------------------------------

    def _settle(self) -> None:
        super()._settle()
        self._plans = self._shards = None
        self._shelf = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        self._settle()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = self._shards = None
        self._shelf = {}

    def state_dict(self) -> dict[str, Any]:
        """As torch's; what `flatten` has moved into one buffer is copied out of it."""
        told: dict[str, Any] = super().state_dict()
        return {**told, "state": self._alone(told["state"])} if self._extras.flatten else told

    def _alone(self, states: Mapping[Any, Any]) -> dict[Any, Any]:
        return {
            key: {name: own_memory(x) if isinstance(x, Tensor) else x for name, x in entry.items()}
            for key, entry in states.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, with what was asked for."""
        told = super().__getstate__()
        if self._extras.flatten:
            told["state"] = defaultdict(dict, self._alone(told["state"]))
        return told


_outside_the_graph: Callable[..., Any] = _disable_dynamo(FusedStep.step)
_hooked_update = torch.optim.Optimizer.profile_hook_step(FusedStep._update)
