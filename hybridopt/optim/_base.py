"""What every optimizer with a compiled step shares: when it may run, its table of addresses, torch's contracts."""

from __future__ import annotations

import logging
import warnings
import weakref
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import wait
from itertools import chain, compress, pairwise, repeat
from operator import is_, itemgetter
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import optimizer as torch_optimizer

from hybridopt.engines import cpu
from hybridopt.errors import MethodError
from hybridopt.rules import Rule

Implementation: TypeAlias = Literal["auto", "reference", "foreach", "fused"]
# Private names of torch, and why: profiler_enabled keeps `Optimizer.step#...` in profiles without paying for the range
# when nobody looks; increment_version makes autograd notice a write that it did not do; _disable_dynamo is
# torch.compiler.disable without loading the compiler (0.6 s) at import.
_profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled
_increment_version: Callable[[Iterable[Tensor]], None] = torch._C._increment_version
_is_compiling = torch.compiler.is_compiling
_address = Tensor.data_ptr
log = logging.getLogger("hybridopt.optim")
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_PLAIN = (Tensor, torch.nn.Parameter)
PARALLEL_FROM = 1 << 18  # elements a step; below, waking a thread costs more than it saves
CHUNK = 1 << 16  # elements a piece of a parallel step


class Ineligible(Exception):
    """Why a step cannot be compiled now (said in `repr`, and by a warning if `fused` was asked for)."""


class FirstStep(Ineligible):
    """A state does not exist yet: this step is not compiled, the next one will be."""


class FusedStep(torch.optim.Optimizer):
    """A torch optimizer whose `step` runs as one compiled loop wherever that gives torch's result.

    Mixed in before torch's own class: constructor checks, state keys, state dicts, schedulers, hooks and everything
    that the compiled loop does not cover (complex or sparse weights, `differentiable`, `capturable`, other devices
    and dtypes, the very first step, which creates the state) stay torch's own code.
    """

    rule: ClassVar[Rule]
    _plans: list[_Plan] | None = None
    _entries: tuple[dict[str, Any], ...] = ()
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

    def _otherwise(self) -> str:
        """What runs when the compiled loop does not, for `repr`."""
        names = {"reference": "torch's for-loop", "foreach": "torch's foreach"}
        return names.get(self._implementation, "torch's own code")

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
        self._implementation = chosen  # type: ignore[assignment]
        self._settle()

    def _settle(self) -> None:
        """Make torch's own step do what was asked for, in all groups and those to come."""
        if self._implementation in ("reference", "foreach"):
            for options in (self.defaults, *self.param_groups):
                if "foreach" in options:
                    options["foreach"] = self._implementation == "foreach"
                if "fused" in options:
                    options["fused"] = False

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

    def _current(self, plans: list[_Plan]) -> bool:
        """Whether the plans still describe groups, weights and states; takes over new gradients and options."""
        states, entries, groups = self.state, self._entries, self.param_groups
        if (
            len(states) != len(entries)
            or not all(map(is_, states.values(), entries))
            or len(plans) != len(groups)
        ):
            return False
        return all(map(_refresh, plans, repeat(self), groups))

    def _prepare(self) -> list[_Plan] | None:
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
            plans = [_Plan(self, group) for group in self.param_groups]
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

    def _say(self, used: str) -> None:
        if used != self._used:
            self._used = used
            log.debug("%s: %s", type(self).__name__, used)

    def __repr__(self) -> str:
        text: str = super().__repr__()
        return f"{text[:-1]}\nimplementation: {self._implementation} -> {self._used}\n)"

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

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, with what was asked for."""
        return {**super().__getstate__(), "_implementation": self._implementation}


_outside_the_graph: Callable[..., Any] = _disable_dynamo(FusedStep.step)
_hooked_update = torch.optim.Optimizer.profile_hook_step(FusedStep._update)
_NOTHING: dict[str, Any] = {}


class _Plan:
    """One parameter group's compiled step: addresses of weights, states and gradients, compared before every use.

    Whatever can move is read from the group and the states anew at each step (44 ns an address; AMD EPYC, 2026-11):
    a tensor may be replaced, or given other memory (`p.data = ...`, `share_memory_()`), without a word to us.
    Gradients are not kept alive.
    """

    def __init__(self, optimizer: FusedStep, group: dict[str, Any]) -> None:
        rule = optimizer.rule
        why = _group_ineligible(group)
        if why:
            raise Ineligible(why)
        flags = dict(zip(rule.flags, map(bool, optimizer._flags(group)), strict=True))
        active = rule.active(flags)
        self.flags = tuple(flags.values())
        self.scalar_names = (*(("step",) if rule.counts else ()), *rule.scalar_state)
        self.names = (*self.scalar_names, *active)
        members: list[Tensor] = group["params"]
        self.has_grad = [p.grad is not None for p in members]
        self.absent = [not present for present in self.has_grad] if not all(self.has_grad) else None
        self.params = list(compress(members, self.has_grad))
        self.entries = [optimizer.state.get(p, _NOTHING) for p in self.params] if self.names else []
        scalars: set[torch.dtype] = set()
        for i, p in enumerate(self.params):
            scalars |= self._check_weight(p, self.entries[i] if self.names else _NOTHING)
        if len({p.dtype for p in self.params}) > 1 or len(scalars) > 1:
            raise Ineligible("the weights of a group, or their counters, have different dtypes")
        self.get_states: Callable[[Mapping[str, Any]], Any] = itemgetter(*self.names) if self.names else len
        self.numels = [p.numel() for p in self.params]
        self.strides = [None if p.is_contiguous() else p.stride() for p in self.params]
        self.dtype = self.params[0].dtype if self.params else torch.float32
        self.options: tuple[Any, ...] = ()
        self.live = False
        self.size = len(self.params)
        self.split = self.size * (1 + len(self.names))
        self.addresses: list[int] = [*map(_address, self.params), *map(_address, self._states())]
        self.gradients = array("q", [0] * self.size)
        self.references: list[weakref.ref[Tensor]] = []
        self.table = self._table()
        self.hyper = array("d", [0.0] * max(1, len(rule.hyper)))
        self.scratch = array("d", [0.0] * max(1, self.size * len(rule.coefficients)))
        arrays = (self.table, self.gradients, self.hyper, self.scratch)
        self.block = array("q", [self.size, *(a.buffer_info()[0] for a in arrays), 0, 0, 0, 0])
        self.block_address = self.block.buffer_info()[0]
        self.chunks = self._cut() if sum(self.numels) >= PARALLEL_FROM else None
        self.module: Any = None
        if self.size:
            scalar = scalars.pop() if scalars else torch.float32
            try:
                self.module = cpu.compiled(rule, tuple(flags.items()), _DTYPES[self.dtype], _DTYPES[scalar])
            except cpu.Untranslatable as error:
                raise Ineligible(str(error)) from error

    def _check_weight(self, p: Tensor, entry: Mapping[str, Any]) -> set[torch.dtype]:
        """The dtypes of its per-tensor numbers; Ineligible if anything about it is not plain."""
        if type(p) not in _PLAIN or p.device.type != "cpu" or p.layout is not torch.strided:
            raise Ineligible(f"a weight is a {type(p).__name__} with layout {p.layout} on {p.device}")
        g = p.grad
        assert g is not None
        if p.dtype not in _DTYPES or g.dtype != p.dtype:
            raise Ineligible(f"a weight is {p.dtype} and its gradient {g.dtype}")
        if type(g) not in _PLAIN or g.device != p.device or g.layout is not torch.strided or g.is_neg():
            raise Ineligible(
                f"a gradient is a {type(g).__name__} with layout {g.layout} on {g.device}, or a view"
            )
        if p.is_neg() or not _dense(p) or not _alike(g, p):
            raise Ineligible("a gradient is laid out unlike its weight, or the weight has gaps")
        scalars: set[torch.dtype] = set()
        for name in self.names:
            tensor = entry.get(name)
            if tensor is None:
                raise FirstStep("first step, which creates the state")
            if (
                type(tensor) not in _PLAIN
                or tensor.device.type != "cpu"
                or tensor.layout is not torch.strided
            ):
                raise Ineligible(f"the state {name!r} is not a plain tensor on the CPU")
            if name in self.scalar_names:
                if tensor.numel() != 1 or tensor.dtype not in _DTYPES:
                    raise Ineligible(f"the state {name!r} is not one real number")
                scalars.add(tensor.dtype)
            elif tensor.dtype != p.dtype or tensor.is_neg() or not _alike(tensor, p):
                raise Ineligible(f"the state {name!r} is {tensor.dtype} or laid out unlike its weight")
        return scalars

    def _states(self) -> Iterable[Tensor]:
        found = map(self.get_states, self.entries)
        return chain.from_iterable(found) if len(self.names) > 1 else found

    def _table(self) -> array[int]:
        """Rows (elements, scalar states, weight, states) for the compiled loop."""
        table, width, split = array("q"), len(self.names), len(self.scalar_names)
        for t in range(self.size):
            states = self.addresses[self.size + t * width : self.size + (t + 1) * width]
            table.extend([self.numels[t], *states[:split], self.addresses[t], *states[split:]])
        return table

    def _cut(self) -> tuple[array[int], int]:
        """Pieces of (tensor, start, count) for several threads; a tensor without elements needs none."""
        pieces = array("q")
        for t, numel in enumerate(self.numels):
            for start in range(0, numel, CHUNK):
                pieces.extend((t, start, min(CHUNK, numel - start)))
        return pieces, len(pieces) // 3

    # -- every step -----------------------------------------------------------------------------------------------

    def refresh(self, optimizer: FusedStep, group: dict[str, Any]) -> bool:
        """Read what may have moved; False if anything but gradients and numbers has, and the plan must be rebuilt."""
        options = group.values()
        if self.live or len(options) != len(self.options) or not all(map(is_, options, self.options)):
            if not self._read_hyper(optimizer, group):
                return False
        params = group["params"]
        grads = [p.grad for p in params]
        if self.absent is not None:
            if len(grads) != len(self.absent) or any(g is not None for g in compress(grads, self.absent)):
                return False
            params, grads = list(compress(params, self.has_grad)), list(compress(grads, self.has_grad))
        try:
            addresses = [*map(_address, params), *map(_address, self._states()), *map(_address, grads)]
        except (
            KeyError,
            TypeError,
            RuntimeError,
        ):  # a state is gone or no tensor; None or sparse; no memory at all
            return False
        moved = addresses != self.addresses
        if moved and (len(grads) != self.size or addresses[: self.split] != self.addresses[: self.split]):
            return False
        if moved or not all(map(is_, grads, [reference() for reference in self.references])):
            if not self._alike(grads):
                return False
            self.references = [weakref.ref(g) for g in grads]
            self.gradients[:] = array("q", addresses[self.split :])
            self.addresses = addresses
        return True

    def _alike(self, grads: Sequence[Tensor]) -> bool:
        """Whether gradients lie in memory as their weights do."""
        dtype = self.dtype
        for g, numel, stride in zip(grads, self.numels, self.strides, strict=True):
            if (
                g.dtype is not dtype
                or g.numel() != numel
                or not (g.is_contiguous() if stride is None else g.stride() == stride)
                or type(g) not in _PLAIN
                or g.is_neg()
            ):
                return False
        return True

    def _read_hyper(self, optimizer: FusedStep, group: dict[str, Any]) -> bool:
        """Take over changed hyperparameters; False if one is not a number in the compiled variant."""
        if self.flags != tuple(map(bool, optimizer._flags(group))) or _group_ineligible(group):
            return False
        self.hyper[:] = array("d", map(float, optimizer._hyper(group) or (0.0,)))
        self.options = tuple(group.values())
        self.live = any(
            _mutable(value) for key, value in group.items() if key not in ("params", "param_names")
        )
        return True

    def run(self) -> None:
        """Do the step."""
        if self.module is None:
            return
        threads = 1 if self.chunks is None else torch.get_num_threads()
        if threads == 1 or self.chunks is None:
            self.module.run(self.block_address)
        else:
            self._run_parallel(*self.chunks, threads)
        _increment_version(self.params)

    def _run_parallel(self, chunks: array[int], count: int, threads: int) -> None:
        shared = list(self.block[:5])
        begin = array("q", [*shared, 1, 0, 0, 0])
        self.module.run(begin.buffer_info()[0])
        ends = [count * i // threads for i in range(threads + 1)]
        blocks = [array("q", [*shared, 2, chunks.buffer_info()[0], *ends]) for ends in pairwise(ends)]
        pool: Any = cpu.pool(threads - 1)
        others = [pool.submit(self.module.run, block.buffer_info()[0]) for block in blocks[1:]]
        try:
            self.module.run(blocks[0].buffer_info()[0])
        finally:  # nobody may free this memory while a thread writes to it
            wait(others)


_refresh = _Plan.refresh


def _group_ineligible(group: Mapping[str, Any]) -> str:
    """Which option of a group only torch's own code serves; empty if none."""
    for option in ("differentiable", "capturable"):
        if group.get(option):
            return f"{option}=True"
    for key, value in group.items():
        if key not in ("params", "param_names"):
            if isinstance(value, Tensor) and (value.requires_grad or value.device.type != "cpu"):
                return f"{key} is a tensor on a device or requires a gradient"
            if isinstance(value, Tensor) and any(
                p.dtype.itemsize > value.dtype.itemsize for p in group["params"]
            ):
                return f"{key} is a tensor of less precision than a weight (torch then computes with that)"
            if isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
                return f"{key} holds a tensor (torch then corrects biases in that tensor's precision)"
    return ""


def _mutable(value: Any) -> bool:
    """Whether an option may change without being replaced."""
    if isinstance(value, tuple):
        return any(_mutable(part) for part in value)
    return not (value is None or isinstance(value, float | int | str))


def _alike(a: Tensor, p: Tensor) -> bool:
    """Whether element i in memory is the same element of both."""
    return a.shape == p.shape and (a.stride() == p.stride() or (a.is_contiguous() and p.is_contiguous()))


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
