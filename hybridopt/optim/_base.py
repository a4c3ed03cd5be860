"""What every optimizer with a compiled step shares: when it may run, its table of addresses, torch's contracts."""

from __future__ import annotations

import itertools
import logging
import warnings
from array import array
from collections.abc import Callable, Mapping
from operator import is_, itemgetter
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from hybridopt.engines import cpu
from hybridopt.errors import MethodError
from hybridopt.rules import Rule

Implementation: TypeAlias = Literal["auto", "reference", "foreach", "fused"]
_profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled
log = logging.getLogger("hybridopt.optim")
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
PARALLEL_FROM = 1 << 18  # elements a step; below, waking a thread costs more than it saves
CHUNK = 1 << 16  # elements a piece of a parallel step


class Ineligible(Exception):
    """Why a step cannot be compiled now (said in `repr`, and by a warning if `fused` was asked for)."""


class FusedStep(torch.optim.Optimizer):
    """A torch optimizer whose `step` runs as one compiled loop wherever that gives torch's result.

    Mixed in before torch's own class: constructor checks, state keys, state dicts, schedulers, hooks and everything
    that the compiled loop does not cover (complex or sparse weights, `differentiable`, `capturable`, other devices
    and dtypes, the very first step, which creates the state) stay torch's own code.
    """

    rule: ClassVar[Rule]
    _plans: list[_Plan] | None = None
    _implementation: Implementation = "auto"
    _used = "not stepped yet"
    _warned = False

    # -- what a subclass says ---------------------------------------------------------------------------------------

    def _hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Values of `rule.hyper` for a parameter group."""
        raise NotImplementedError

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        """Values of `rule.flags` for a parameter group."""
        raise NotImplementedError

    # -- implementation -----------------------------------------------------------------------------------------------

    @property
    def implementation(self) -> Implementation:
        """What was asked for: auto, reference, foreach or fused."""
        return self._implementation

    def _choose(self, implementation: str, foreach: bool | None, fused: bool | None) -> None:
        """Settle `implementation=` with torch's own `foreach=` and `fused=`; called at the end of `__init__`."""
        if implementation not in get_args(Implementation):
            raise MethodError(
                f"implementation: expected one of {', '.join(get_args(Implementation))}, got {implementation!r}"
            )
        if foreach and fused:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        asked = "fused" if fused else "foreach" if foreach else None
        if asked is not None and implementation not in ("auto", asked):
            raise MethodError(f"implementation={implementation!r} contradicts {asked}=True; give one of them")
        chosen: str = asked or implementation
        if chosen == "auto" and foreach is False and fused is False:
            chosen = "reference"
        if chosen in ("reference", "foreach"):
            for group in self.param_groups:
                group["foreach"] = chosen == "foreach"
                if "fused" in group:
                    group["fused"] = False
        self._implementation = chosen  # type: ignore[assignment]

    def _otherwise(self) -> str:
        """What runs when no compiled step does, in words."""
        names = {"reference": "torch's for-loop", "foreach": "torch's foreach"}
        return names.get(self._implementation, "torch's own code")

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
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or _profiler_enabled()
        ):
            return _hooked_update(self, closure)
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
        if plans is None or len(self.state) != self._states_seen:
            plans = self._prepare()
        if plans is not None and not all(plan.refresh() for plan in plans):
            plans = self._prepare()
            if plans is not None and not all(plan.refresh() for plan in plans):
                plans = None
        if plans is None:
            self._torch_step()
        else:
            for plan in plans:
                plan.run()
        return loss

    def _prepare(self) -> list[_Plan] | None:
        """Plans for all groups; None, with the reason in `repr`, if torch must do this step."""
        self._plans = None
        self._states_seen = len(self.state)
        if self._implementation in ("reference", "foreach"):
            self._say(self._otherwise())
            return None
        try:
            plans = [_Plan(self, group) for group in self.param_groups]
        except Ineligible as reason:
            self._say(f"{self._otherwise()}: {reason}")
            permanent = not str(reason).startswith("first step")
            if permanent and self._implementation == "fused" and not self._warned:
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

    def _say(self, used: str) -> None:
        if used != self._used:
            self._used = used
            log.debug("%s: %s", type(self).__name__, used)

    def __repr__(self) -> str:
        text: str = super().__repr__()
        return f"{text[:-1]}\nimplementation: {self._implementation} -> {self._used}\n)"

    # -- what makes plans stale ---------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's, but floating state keeps the dtype that was saved (torch casts it to its weight's)."""
        super().load_state_dict(state_dict)
        self._plans = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        self._plans = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = None

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, with what was asked for."""
        return {**super().__getstate__(), "_implementation": self._implementation}


_hooked_update = torch.optim.Optimizer.profile_hook_step(FusedStep._update)
_NOTHING: dict[str, Any] = {}


class _Plan:
    """One parameter group's compiled step: addresses of weights, gradients and states, checked before every use."""

    def __init__(self, optimizer: FusedStep, group: dict[str, Any]) -> None:
        rule = optimizer.rule
        self.optimizer = optimizer
        self.group = group
        self.flags = optimizer._flags(group)
        flags = dict(zip(rule.flags, self.flags, strict=True))
        self.names = (*(("step",) if rule.counts else ()), *rule.scalar_state, *rule.active(flags))
        self.scalar_names = self.names[: len(self.names) - len(rule.active(flags))]
        self.params: list[Tensor] = []
        self.absent: list[Tensor] = []
        self.keys: list[tuple[dict[str, Any], str]] = []
        _check_group(optimizer, group)
        table = array("q")
        scalar = torch.float32
        for p in group["params"]:
            if p.grad is None:
                self.absent.append(p)
                continue
            entry = optimizer.state.get(p, _NOTHING)
            scalar = self._check_weight(p, entry)
            ends = [entry[name].data_ptr() for name in self.names]
            split = len(self.scalar_names)
            table.extend([p.numel(), *ends[:split], p.data_ptr(), *ends[split:]])
            self.params.append(p)
            self.keys.extend((entry, name) for name in self.names)
        self.params_seen = len(group["params"])
        keys = [key for key in group if key not in ("params", "param_names")]
        self.read_options: Callable[[Any], tuple[Any, ...]] = itemgetter(*keys)
        self.options: tuple[Any, ...] = ()
        self.live_tensors = False
        self.size = len(self.params)
        self.contiguous = [p.is_contiguous() for p in self.params]
        self.weights = [p.data_ptr() for p in self.params]
        self.tensors = [entry[name] for entry, name in self.keys]
        self.grads: list[Tensor | None] = [None] * self.size
        self.grad_addresses: list[int] = []
        self.table, self.gradients = table, array("q", [0] * self.size)
        self.hyper = array("d", [0.0] * max(1, len(rule.hyper)))
        self.scratch = array("d", [0.0] * max(1, self.size * len(rule.coefficients)))
        self.module: Any = None
        if self.size:
            try:
                self.module = cpu.compiled(
                    rule, tuple(flags.items()), _DTYPES[self.params[0].dtype], _DTYPES[scalar]
                )
            except cpu.Untranslatable as error:
                raise Ineligible(str(error)) from error
        self.addresses = (
            self.table.buffer_info()[0],
            self.gradients.buffer_info()[0],
            self.size,
            self.hyper.buffer_info()[0],
            self.scratch.buffer_info()[0],
        )
        self.chunks = self._cut() if sum(p.numel() for p in self.params) >= PARALLEL_FROM else None

    def _check_weight(self, p: Tensor, entry: Mapping[str, Any]) -> torch.dtype:
        g = p.grad
        assert g is not None
        if (
            type(p) not in (Tensor, torch.nn.Parameter)
            or p.device.type != "cpu"
            or p.layout is not torch.strided
        ):
            raise Ineligible(f"a weight is a {type(p).__name__} with layout {p.layout} on {p.device}")
        if p.dtype not in _DTYPES or g.dtype != p.dtype:
            raise Ineligible(f"a weight is {p.dtype} and its gradient {g.dtype}")
        if g.layout is not torch.strided or g.stride() != p.stride() or not _dense(p):
            raise Ineligible("a gradient is sparse, or laid out unlike its weight")
        if self.params and p.dtype != self.params[0].dtype:
            raise Ineligible("the weights of a group have different dtypes")
        scalar = torch.float32
        for name in self.names:
            tensor = entry.get(name)
            if not isinstance(tensor, Tensor):
                raise Ineligible("first step: torch creates the state")
            if name in self.scalar_names:
                scalar = tensor.dtype
                if tensor.device.type != "cpu" or tensor.numel() != 1 or scalar not in _DTYPES:
                    raise Ineligible(f"the state {name!r} is not one number on the CPU")
            elif tensor.dtype != p.dtype or tensor.stride() != p.stride() or tensor.shape != p.shape:
                raise Ineligible(f"the state {name!r} is {tensor.dtype} or laid out unlike its weight")
        return scalar

    def _cut(self) -> tuple[array[int], int]:
        """Pieces of (tensor, start, count) for several threads; a tensor without elements needs none."""
        pieces = array("q")
        for t, p in enumerate(self.params):
            for start in range(0, p.numel(), CHUNK):
                pieces.extend((t, start, min(CHUNK, p.numel() - start)))
        return pieces, len(pieces) // 3

    # -- every step -----------------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Read what may have moved; False if anything else has changed and the plan must be rebuilt."""
        group = self.group
        try:
            options = self.read_options(group)
        except KeyError:
            return False
        if (options != self.options or self.live_tensors) and not self._read_hyper(options):
            return False
        if len(group["params"]) != self.params_seen:
            return False
        grads = [p.grad for p in self.params]
        try:
            addresses = [g.data_ptr() for g in grads]  # type: ignore[union-attr]
            tensors = [entry[name] for entry, name in self.keys]
        except (AttributeError, RuntimeError, KeyError):  # None; sparse; a state was removed
            return False
        if not all(map(is_, grads, self.grads)):
            for g, p, contiguous in zip(grads, self.params, self.contiguous, strict=True):
                assert g is not None
                if g.dtype is not p.dtype or not (
                    g.is_contiguous() if contiguous else g.stride() == p.stride()
                ):
                    return False
            self.grads = grads
        if addresses != self.grad_addresses:
            self.gradients[:] = array("q", addresses)
            self.grad_addresses = addresses
        if [p.data_ptr() for p in self.params] != self.weights or not all(map(is_, tensors, self.tensors)):
            return False
        return not (self.absent and any(p.grad is not None for p in self.absent))

    def _read_hyper(self, options: tuple[Any, ...]) -> bool:
        """Take over changed hyperparameters; False if one is not a number in the compiled variant."""
        optimizer, group = self.optimizer, self.group
        if self.flags != optimizer._flags(group) or _group_ineligible(group):
            return False
        self.hyper[:] = array("d", optimizer._hyper(group) or (0.0,))
        self.options = options
        self.live_tensors = any(isinstance(value, Tensor) for value in options)
        return True

    def run(self) -> None:
        """Do the step."""
        if self.module is None:
            return
        threads = 1 if self.chunks is None else torch.get_num_threads()
        if threads == 1 or self.chunks is None:
            self.module.run(*self.addresses)
        else:
            self._run_parallel(*self.chunks, threads)
        torch._C._increment_version(self.params)

    def _run_parallel(self, chunks: array[int], count: int, threads: int) -> None:
        table, gradients, n, hyper, scratch = self.addresses
        self.module.begin(table, n, hyper, scratch)
        ends = [count * i // threads for i in range(threads + 1)]
        common = (table, gradients, n, scratch, chunks.buffer_info()[0])
        pool: Any = cpu.pool(threads - 1)
        others = [
            pool.submit(self.module.apply, *common, low, high) for low, high in itertools.pairwise(ends[1:])
        ]
        self.module.apply(*common, ends[0], ends[1])
        for other in others:
            other.result()


def _check_group(optimizer: FusedStep, group: Mapping[str, Any]) -> None:
    why = cpu.available()
    if why:
        raise Ineligible(why)
    why = _group_ineligible(group)
    if why:
        raise Ineligible(why)


def _group_ineligible(group: Mapping[str, Any]) -> str:
    """Which option of a group only torch's own code serves; empty if none."""
    for option in ("differentiable", "capturable"):
        if group.get(option):
            return f"{option}=True"
    for value in group.values():
        if isinstance(value, Tensor) and (value.requires_grad or value.device.type != "cpu"):
            return "a hyperparameter is a tensor on a device or requires a gradient"
    return ""


def _dense(p: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in some order of dimensions."""
    if p.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
