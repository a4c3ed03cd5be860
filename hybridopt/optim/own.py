"""Optimizers from a rule alone: those that torch lacks, and users' own."""

from __future__ import annotations

import inspect
import keyword
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.engines.foreach import TensorList
from hybridopt.errors import MethodError
from hybridopt.optim._base import FusedStep
from hybridopt.optim._extras import StepOptions
from hybridopt.rules import Rule, State


class RuleOptimizer(FusedStep):
    """A torch optimizer whose only content is a rule; states start at zero, in the dtype of their weight.

    Subclasses set `rule`, pass their hyperparameters to `__init__`, and may map a group to the rule's hyperparameters
    and flags; by default both are read from the group by name. The rule runs compiled on the CPU where it can, else
    over tensor lists, else tensor by tensor (`implementation=`). Complex and sparse weights are not supported.
    """

    rule: ClassVar[Rule]
    _takes_complex = False

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.Optimizer.__init__(self, params, defaults)
        self._configure(options, foreach, fused)

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(group[name] for name in self.rule.hyper)

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return tuple(bool(group[name]) for name in self.rule.flags)

    _single = False
    """Whether the rule was seen to need tensors, not lists of them (it calls torch's functions, say)."""

    def _otherwise(self) -> str:
        single = self._single or self._implementation == "reference"
        return "the rule, tensor by tensor" if single else "the rule over lists of tensors"

    @torch.no_grad()
    def _torch_step(self) -> None:
        """The rule as Python runs it, on tensor lists or on single tensors; creates the state."""
        rule = self.rule
        for group in self.param_groups:
            flags = dict(zip(rule.flags, self._flags(group), strict=True))
            hyper = tuple(map(float, self._hyper(group)))
            names = rule.active(flags)
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self._begin(p, names)
            kinds = {(p.device, p.dtype) for p in params}
            if self._single or self._implementation == "reference" or len(kinds) > 1:
                batches = [[p] for p in params]
            else:
                batches = _by_step(params, self.state)
            for batch in batches:
                try:
                    self._run(batch, names, flags, hyper)
                except (TypeError, AttributeError) as error:  # of what a list of tensors cannot do
                    if len(batch) == 1:
                        raise
                    self._single = True
                    if self._implementation == "foreach":
                        self._warn(
                            f"the rule cannot run over lists of tensors ({error}); {self._otherwise()} runs instead"
                        )
                    for p in batch:
                        self._run([p], names, flags, hyper)

    def _begin(self, p: Tensor, names: Sequence[str]) -> None:
        """Check a weight and its gradient; create its state if it has none."""
        grad = p.grad
        assert grad is not None
        if p.is_complex() or grad.layout is not torch.strided:
            raise MethodError(
                f"{type(self).__name__}: expected real weights with dense gradients, got {p.dtype} with layout "
                f"{grad.layout}; use a torch optimizer that supports them"
            )
        state = self.state[p]
        if self.rule.counts and "step" not in state:
            state["step"] = torch.tensor(0.0)
        for name in self.rule.scalar_state:
            state.setdefault(name, torch.tensor(0.0))
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _run(
        self, batch: list[Tensor], names: Sequence[str], flags: dict[str, bool], hyper: tuple[float, ...]
    ) -> None:
        """One batch whose members have done equally many steps."""
        rule, first = self.rule, self.state[batch[0]]
        step = first["step"].item() + 1 if rule.counts else 0.0
        scalars = [first[name].item() for name in rule.scalar_state]
        out = rule.coefficients_at(step, scalars, hyper)
        split = len(out) - len(scalars)
        single = len(batch) == 1

        def pack(tensors: list[Tensor]) -> Any:
            return tensors[0] if single else TensorList(tensors)

        states = [
            pack([self.state[p][s.name] for p in batch]) if s.name in names else 0.0 for s in rule.state
        ]
        grads = [p.grad for p in batch if p.grad is not None]
        results = rule.update(pack(batch), pack(grads), *states, *out[:split], **flags)
        if not isinstance(results, tuple) or len(results) != 1 + len(rule.state):
            wanted = ", ".join(["p", *(s.name for s in rule.state)]) + ("" if rule.state else ",")
            raise MethodError(
                f"{type(self).__name__}: expected its update to return the tuple ({wanted}), got "
                f"{f'{len(results)} values' if isinstance(results, tuple) else type(results).__name__}"
            )
        targets = [batch, *([self.state[p][s.name] for p in batch] for s in rule.state if s.name in names)]
        kept = [results[0], *(r for r, s in zip(results[1:], rule.state, strict=True) if s.name in names)]
        for target, result in zip(targets, kept, strict=True):
            if single:
                target[0].copy_(result)
            else:
                result.write(target)
        for p in batch:
            if rule.counts:
                self.state[p]["step"] += 1
            for name, value in zip(rule.scalar_state, out[split:], strict=True):
                self.state[p][name].fill_(value)


def _by_step(params: list[Tensor], state: Mapping[Tensor, Mapping[str, Any]]) -> list[list[Tensor]]:
    """Weights that have done equally many steps together: they share their coefficients."""
    batches: dict[float, list[Tensor]] = {}
    for p in params:
        step = state[p].get("step")
        batches.setdefault(0.0 if step is None else step.item(), []).append(p)
    return list(batches.values())


def from_rule(
    update: Callable[..., tuple[Any, ...]],
    state: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    *,
    scalars: Callable[..., tuple[float, ...]] | None = None,
    name: str | None = None,
) -> type[RuleOptimizer]:
    """An optimizer class from one elementwise update equation, with every implementation the built-in ones have.

    Made for `defaults={"lr": 0.01, "beta": 0.9}` it is called as `Signum(params, lr=0.01, beta=0.9)`, by name or in
    that order; flags, `foreach`, `fused` (`True` is another spelling of `implementation="foreach"`, `"fused"`) and
    `StepOptions` by keyword.

    Args:
        update: `update(p, g, *state, *hyper) -> (p, *state)` on weight, gradient, states and hyperparameters, all
            elementwise; see `hybridopt.rules.Rule` for what it may use (`from hybridopt.rules import xp`). Keyword-only
            arguments are flags: `True`/`False` in `defaults`, usable in `if`.
        state: names of its states, in order; each starts at zero.
        defaults: hyperparameters in the order `update` takes them, with their default values.
        scalars: `scalars(step, *hyper) -> coefficients`, computed once per step (bias corrections, schedules); the
            coefficients are then what `update` takes in place of the hyperparameters. `step` counts from 1. It is
            compiled with the rule, so the same holds for it: `xp.minimum`, not `min`; else the whole step runs as
            Python does it (`repr` says so).
        name: of the class; default `update`'s name. Give the name that the class is bound to, in the module that calls
            `from_rule`: pickle looks for it there. (Deep copies and state dicts do not ask.)

    Raises:
        MethodError: the arguments of `update` do not fit `state` and `defaults`, or a hyperparameter has the name of an
            option.

    Example:
        >>> import torch, hybridopt
        >>> from hybridopt.rules import xp
        >>> def signum(p, g, momentum, lr, beta):
        ...     momentum = momentum * beta + g * (1 - beta)
        ...     return p - xp.sign(momentum) * lr, momentum
        >>> defaults = {"lr": 0.01, "beta": 0.9}
        >>> Signum = hybridopt.optim.from_rule(signum, state=["momentum"], defaults=defaults, name="Signum")
        >>> x = torch.tensor([1.0, -1.0], requires_grad=True)
        >>> optimizer = Signum([x], lr=0.5)
        >>> (x**2).sum().backward()
        >>> optimizer.step()
        >>> x.detach()
        tensor([ 0.5000, -0.5000])
    """
    values = dict(defaults or {})
    parameters = list(inspect.signature(update).parameters.values())
    flags = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    hyper = tuple(key for key in values if key not in flags)
    rule = Rule(update, scalars, tuple(State(s) for s in state), hyper)
    missing = [flag for flag in flags if not isinstance(values.get(flag), bool)]
    wanted = (*state, *hyper) if scalars is None else tuple(state)
    got = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)[2:]
    if missing or got[: len(wanted)] != wanted or (scalars is None and len(got) != len(wanted)):
        raise MethodError(
            f"from_rule: expected update(p, g, {', '.join(wanted)}{', ...' if scalars else ''}) with a True/False "
            f"default for each keyword-only flag, got update{inspect.signature(update)} with state={list(state)} and "
            f"defaults={values}"
        )

    signature = _signature(values, flags)

    class Own(RuleOptimizer):
        __doc__ = update.__doc__ or f"Made by `from_rule` from `{update.__name__}`; hyperparameters {values}."

        def __init__(self, /, *args: Any, **options: Any) -> None:
            try:
                given = signature.bind(self, *args, **options)
            except TypeError as error:
                raise TypeError(f"{type(self).__name__}: {error}") from None
            given.apply_defaults()
            told = given.arguments
            unknown = set(told["options"]) - set(StepOptions.__annotations__)
            if unknown:
                raise MethodError(
                    f"{type(self).__name__}: unknown option {sorted(unknown)}; known: {sorted(values)} and "
                    f"{sorted(_OPTIONS)}"
                )
            super().__init__(
                told["params"],
                {key: told[key] for key in values},
                foreach=told["foreach"],
                fused=told["fused"],
                **told["options"],
            )

    Own.__init__.__signature__ = signature  # type: ignore[attr-defined]
    Own.rule = rule
    Own.__name__ = Own.__qualname__ = name or update.__name__
    Own.__module__ = sys._getframe(1).f_globals.get("__name__", update.__module__)  # as namedtuple does
    return Own


_OPTIONS = ("foreach", "fused", *StepOptions.__annotations__)


def _signature(values: Mapping[str, Any], flags: Sequence[str]) -> inspect.Signature:
    """Of `__init__` of a class made by `from_rule`: hyperparameters by name or in order, the rest by name."""
    taken = {"self", "params", "options", *_OPTIONS}
    wrong = [key for key in values if key in taken or not key.isidentifier() or keyword.iskeyword(key)]
    if wrong:
        raise MethodError(
            "from_rule: expected hyperparameters with names that Python can take and that no option of optimizers "
            f"has, got {', '.join(wrong)}; choose another name"
        )
    Parameter = inspect.Parameter
    by_name = {**{flag: values[flag] for flag in flags}, "foreach": None, "fused": None}
    return inspect.Signature(
        [
            Parameter("self", Parameter.POSITIONAL_ONLY),
            Parameter("params", Parameter.POSITIONAL_OR_KEYWORD),
            *(
                Parameter(key, Parameter.POSITIONAL_OR_KEYWORD, default=value)
                for key, value in values.items()
                if key not in flags
            ),
            *(Parameter(key, Parameter.KEYWORD_ONLY, default=value) for key, value in by_name.items()),
            Parameter("options", Parameter.VAR_KEYWORD),
        ]
    )
