"""A torch optimizer class with its options, before it meets a model."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from hybridopt.errors import MethodError, nearest
from hybridopt.optimizer import FloatArray, HandOver, Many, Method, Need, Optimizer
from hybridopt.text import LIMITS
from hybridopt.vector import ParameterVector
from hybridopt_torch._closure import ClosureRun
from hybridopt_torch._inplace import InPlaceRun
from hybridopt_torch._many import ManyRun, batchable

# Learning rate as a part of the distance that a predecessor hands over. Median forward-equivalents for 0.1 / 0.3 / 1
# and for lr = 1e-3: CMA-ES to Adam on Rosenbrock-20 10307 / 5638 / 4054 and 8741, on an ellipsoid 9368 / 5249 / 3605
# and 25351, SNES to Adam on digits 1414 / 862 / 692 and above 4000. Not 1, since deeper networks bear less than these.
STEP = 0.3
LENGTHS = (
    "ADOPT", "AMSGrad", "AdEMAMix", "Adagrad", "Adam", "AdamW", "Adamax", "Adan", "Lion", "NAdam", "RAdam", "RMSprop",
    "Rprop", "SparseAdam",
)  # fmt: skip
"""Classes whose first steps are as long as their learning rate, whatever the size of the gradient."""


class TorchMethod(Method):
    """Any `torch.optim.Optimizer` class as a method; it updates the model's own tensors in place.

    One step is one evaluation of loss and gradient followed by one update, or, for optimizers whose `step` needs a
    closure (LBFGS), one evaluation that the closure asks for. Scale is ignored; weights are clamped to the bounds
    after each update. A step whose loss or gradient is not finite is skipped and counted. `torch.lbfgs` runs one
    outer `step` after another until a stop.

    Args:
        cls: the optimizer class, called as `cls(params, **options)`. Parameter groups of the vector are passed on.
        **options: its keyword arguments; checked against its signature. A dtype may be given by its name (`bfloat16`);
            a tensor of one number is taken as that number.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.ones(2)
        >>> r = hybridopt.minimize(lambda x: (x**2).sum(), x, hybridopt.method(torch.optim.SGD, lr=0.5), budget=3)
        >>> r.best_loss, x
        (0.0, tensor([0., 0.]))
    """

    name: ClassVar[str] = "torch"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENT})
    uses: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})

    def __init__(
        self, cls: type[torch.optim.Optimizer], _label: str | None = None, /, **options: Any
    ) -> None:
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            raise MethodError(f"method: expected a torch.optim.Optimizer class, got {cls!r}")
        self.cls = cls
        self._label = _label or f"{cls.__module__}:{cls.__qualname__}"
        self._options = {option: _plain(option, value) for option, value in options.items()}
        known = _keywords(cls)
        if known is not None:
            for option in options:
                if option not in known:
                    raise MethodError(
                        f"{self._label}: unknown option {option!r}{nearest(option, [*known, *LIMITS])}"
                    )

    @property
    def takes(self) -> frozenset[str]:  # type: ignore[override]
        """See `Method.takes`: the distance, unless a learning rate was given or is no length."""
        free = "lr" not in self._options and self.cls.__name__ in LENGTHS
        return frozenset({"sigma"}) if free else frozenset()

    @property
    def label(self) -> str:
        """`torch.adam` for torch's own, `package.module:Class` for others."""
        return self._label

    def options(self) -> dict[str, Any]:
        """The options given."""
        return dict(self._options)

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`. The optimizer is made over the vector's tensors, in their parameter groups.

        Raises:
            MethodError: weights stand for whole numbers, which it would move by less.
        """
        if vector.integer is not None:
            raise MethodError(
                f"{self.label}: it moves the weights in place and cannot keep the {int(vector.integer.sum())} integer "
                "ones whole; leave them out with select=, or use a method such as cmaes or de"
            )
        run = ClosureRun if self.closure else InPlaceRun
        return run(self, vector, warm)

    def start_many(self, vector: ParameterVector, points: FloatArray) -> Many | None:
        """See `Method.start_many`: for elementwise optimizers, ours and torch's."""
        return ManyRun(self, vector, points) if batchable(self, vector) else None

    @property
    def closure(self) -> bool:
        """Whether a `step` asks for several evaluations itself (LBFGS); else it makes one update of one gradient."""
        parameter = inspect.signature(self.cls.step).parameters.get("closure")
        return parameter is not None and parameter.default is parameter.empty

    def make(self, vector: ParameterVector, warm: HandOver | None = None) -> torch.optim.Optimizer:
        """The torch optimizer over the vector's tensors.

        A distance handed over (`sigma`) sets the learning rate to three tenths of it, where none was given and a step
        is about that long (Adam and its relatives).
        """
        more = {}
        if warm is not None and warm.sigma is not None and self.takes:
            more["lr"] = STEP * warm.sigma
        tensors = dict(zip(vector.names, vector.tensors, strict=True))
        params: Any = list(vector.tensors)
        if vector.groups is not None:
            params = [{**g, "params": [tensors[name] for name in g["params"]]} for g in vector.groups]
        return self.construct(params, **more)

    def construct(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        """The torch optimizer over these parameters or groups of them, with further options."""
        try:
            make: Callable[..., torch.optim.Optimizer] = self.cls
            return make(params, **self._options, **more)
        except (TypeError, ValueError) as error:
            raise MethodError(f"{self.label}: {error}") from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TorchMethod):
            return NotImplemented
        return self.cls is other.cls and self._options == other._options

    def __hash__(self) -> int:
        return hash((self.cls, tuple(sorted(self._options))))

    def __repr__(self) -> str:
        return f"method({str(self)!r})"


def _plain(option: str, value: Any) -> Any:
    """An option as its text says it."""
    if isinstance(value, str) and option.endswith("dtype"):
        named = getattr(torch, value, None)
        return named if isinstance(named, torch.dtype) else value
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def torch_method(
    torch_class: type[torch.optim.Optimizer], registered: str, module: str = "hybridopt_torch"
) -> type[TorchMethod]:
    """A named method class for one torch optimizer, so that `Adam(lr=.01)` and `"torch.adam(lr=.01)"` are equal.

    Args:
        torch_class: the optimizer.
        registered: its name in the registry.
        module: where the returned class is found under the optimizer's name.
    """
    found = f"{torch_class.__module__.partition('.')[0]}.optim.{torch_class.__name__}"

    class Named(TorchMethod):
        __doc__ = f"`{found}` as a method, with its options. See `TorchMethod`."
        name: ClassVar[str] = registered
        cls: type[torch.optim.Optimizer] = torch_class

        def __init__(self, **options: Any) -> None:
            super().__init__(torch_class, registered, **options)

        def __reduce__(self) -> tuple[Any, ...]:
            return (_rebuild, (module, torch_class.__name__, self._options))

    Named.__name__ = Named.__qualname__ = torch_class.__name__
    Named.__module__ = module
    return Named


def _rebuild(module: str, name: str, options: dict[str, Any]) -> TorchMethod:
    method: TorchMethod = getattr(importlib.import_module(module), name)(**options)
    return method


def _keywords(cls: type) -> list[str] | None:
    """Names the constructor takes after the parameters; None if it takes any."""
    known: list[str] = []
    for p in list(inspect.signature(cls).parameters.values())[1:]:
        if p.kind is not p.VAR_KEYWORD:
            known.append(p.name)
            continue
        hint = typing.get_type_hints(cls.__init__).get(p.name)  # type: ignore[misc]
        if typing.get_origin(hint) is not typing.Unpack:
            return None
        known += typing.get_type_hints(typing.get_args(hint)[0])
    return known


def method_of(cls: Any, options: dict[str, Any]) -> TorchMethod:
    """The method of any torch optimizer class, under its registered name if it has one."""
    import hybridopt_torch
    from hybridopt_torch import ours

    for module in (hybridopt_torch, ours):
        for name in module.__all__:
            made: Any = getattr(module, name)
            if isinstance(made, type) and issubclass(made, TorchMethod) and getattr(made, "cls", None) is cls:
                make: Callable[..., TorchMethod] = made
                return make(**options)
    return TorchMethod(cls, **options)
