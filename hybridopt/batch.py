"""Many points in one forward: `torch.func.vmap` over the weights, where that is right; and the record of it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # the documented way to see every operation
from torch.utils._pytree import tree_leaves

from hybridopt import filters
from hybridopt.errors import ObjectiveError, StateError
from hybridopt.evaluation import Evaluation
from hybridopt.forms import Form
from hybridopt.program import Noise, Program, compiled, program
from hybridopt.rows import DeviceRows, Rows
from hybridopt.vector import FloatArray, ParameterVector

Choice: TypeAlias = Literal["auto", "vmap", "compiled", "loop"] | int

ALLOWANCE = {"cpu": 2**28, "cuda": 2**31}  # bytes that the operations of one forward may produce
_ONCE = 'noise="independent", but numbers of NumPy and Python are drawn once for all members'
_SEEDED = 'noise="independent", but the loss seeds the generator, after which each member would draw its own numbers'
ULPS = 256  # by which a batched loss may differ from the looped one, in units of the weights' precision


class Batch:
    """Evaluates many points in one forward, once that was checked against one at a time.

    The way (`"open"` until the check, then `"vmap"` or `"loop"`), the rows of a forward and the reason are plain
    data and part of the objective's state: batched and looped losses differ in the last bit, and so do those of
    batches of different sizes, so a resumed run goes the way that the saved one went.

    Args:
        evaluation: of the loss.
        choice: `batch` of `Objective`.
        gradients: whether gradients are computed beside the losses.

    Raises:
        ObjectiveError: `choice` is none, or it is `"vmap"` or `"compiled"` and this loss can never be batched.
    """

    def __init__(self, evaluation: Evaluation, choice: Choice, gradients: bool = False) -> None:
        whole = isinstance(choice, int) and not isinstance(choice, bool) and choice > 0
        if not whole and choice not in ("auto", "vmap", "compiled", "loop"):
            raise ObjectiveError(
                "batch: expected 'auto', 'vmap', 'compiled', 'loop' or a number of rows per forward, got "
                f"{choice!r}"
            )
        self._evaluation = evaluation
        self._gradients = gradients
        self.choice = choice
        self.way: Literal["open", "vmap", "loop"] = "open"
        self.rows = 0
        """How many points one forward takes; 0 before the check."""
        self.reason = ""
        """Why points are evaluated one by one."""
        self.wanted = False
        """Whether a population was asked for that is worth a batch."""
        self._shrunk: list[str] = []
        noises: tuple[Noise, ...] = ("same", "different", "error")
        self._plain = {n: program(evaluation.loss, evaluation.vector, gradients, n) for n in noises}
        self._compiled: dict[Noise, Program] | None = None
        reason = 'batch="loop"' if choice == "loop" else self._hindrance()
        if reason:
            if self.demanded and not gradients:
                raise ObjectiveError(f'batch: expected a loss that can be batched for "{choice}"; {reason}')
            self.way, self.reason = "loop", reason

    @property
    def price(self) -> int:
        """Forwards of the check."""
        return 4 if self.choice == "compiled" else 2

    @property
    def demanded(self) -> bool:
        """Whether it is an error if there can be no batch."""
        return self.choice in ("vmap", "compiled")

    def _hindrance(self) -> str:
        """Why this loss can never be batched, as far as that is known without calling it."""
        vector, loss = self._evaluation.vector, self._evaluation.loss
        if loss.form is Form.CLOSURE:
            return "a closure is not given the weights"
        if loss.form is Form.ARRAY:
            return "a loss of a NumPy array takes one point"
        if self._gradients and self._evaluation.surrogate is not None:
            return "gradients come from a surrogate"
        narrow = [t.dtype for t in vector.tensors if torch.finfo(t.dtype).bits < 32]
        if narrow:
            return f"with {narrow[0]} weights a batched loss differs from a looped one by about a percent"
        return ""

    @property
    def notes(self) -> list[str]:
        """What the user should know: why there is no batch although one was wanted, and shrunken batches."""
        expected = self.choice == "loop" or self._evaluation.loss.form in (Form.CLOSURE, Form.ARRAY)
        if self.way == "loop" and self.wanted and not expected:
            what = "gradients of populations" if self._gradients else "populations"
            return [*self._shrunk, f"{what} are evaluated one by one: {self.reason}"]
        return list(self._shrunk)

    def __repr__(self) -> str:
        if self.way == "vmap":
            compiled = ", compiled" if self.choice == "compiled" else ""
            return f"populations {self.rows} rows a forward{compiled}"
        return f"populations one by one ({self.reason})" if self.reason else "populations not asked yet"

    # -- one forward of many points -----------------------------------------------------------------------------

    def evaluate(
        self, x: Rows, fresh: bool, again: bool = False, common: bool = False
    ) -> tuple[FloatArray, FloatArray | None]:
        """The losses of all rows, and their gradients if this batch is for gradients. The weights stay in place.

        Under `vmap` a random number is drawn once for all rows, as the loop draws the same for each under the
        policies `shared` and `fixed`, and for each row under `independent`; NumPy's and Python's are drawn once
        because the loss is called once.

        Args:
            x: weights, shape (rows, n).
            fresh: whether the loss draws new random numbers.
            again: it draws those of the last evaluation.
            common: all rows draw the same, also under `independent`.

        Returns:
            The losses, shape (rows,), and None or the gradients, shape (rows, n), in solver coordinates.
        """
        evaluation, random = self._evaluation, self._evaluation.randomness
        rows = len(x)
        if self._compiled is not None and rows < self.rows:  # a program is for one number of rows
            x = x[np.minimum(np.arange(self.rows), rows - 1).tolist()]
        noise: Noise = "same"
        if random.policy == "independent" and not common:
            noise = "different" if random.apart else "error"
        batched = (self._compiled or self._plain)[noise]
        own = x.copy()  # memory of its own: a loss may write into its weights
        flat = own.tensor if isinstance(own, DeviceRows) else torch.from_numpy(own)
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the fused attention of eval mode knows no batches
        evaluation.guard.lend_buffers()
        random.begin(fresh, again)
        try:
            before = random.others() if noise == "different" else ()
            with torch.set_grad_enabled(self._gradients or evaluation.differentiates):
                told = batched(flat)
            if before and random.others() != before:
                raise RuntimeError(_ONCE)
        finally:
            random.end()
            torch.backends.mha.set_fastpath_enabled(fused)
            evaluation.guard.return_buffers()
            evaluation.guard.settle_buffers(False)
        evaluation.aux = None
        gradients, losses = told if self._gradients else (None, told)
        slopes = self._flat(gradients, x)
        values: FloatArray = losses.detach().to("cpu", torch.float64).numpy()[:rows]
        return values, None if slopes is None else slopes[:rows]

    def _flat(self, gradients: Sequence[Tensor] | None, x: Rows) -> FloatArray | None:
        if gradients is None:
            return None
        parts = [g.detach().reshape(len(g), -1).to("cpu", torch.float64) for g in gradients]
        flat: FloatArray = torch.cat(parts, dim=1).numpy()
        slope = self._evaluation.vector.coordinates.slope(np.asarray(x))
        return flat if slope is None else flat * slope

    # -- which way ----------------------------------------------------------------------------------------------

    def verify(
        self, x: FloatArray, losses: Sequence[float], gradients: FloatArray | None = None, members: int = 2
    ) -> int:
        """Decide the way: one forward of two points must tell what they were told one by one.

        Meanwhile the model's own weights are nan, so that a loss which reads them past its argument (a captured
        `model.weight`) is found out even where both points agree by chance.

        Args:
            x: weights, shape (2, n).
            losses: of the two, finite, with the random numbers that a question which is not fresh draws; where each
                draws its own, the second's are the last drawn, and it alone is compared.
            gradients: of the two, shape (2, n), if this batch is for gradients.
            members: of the population, which is what a compiled forward takes.

        Returns:
            The forwards that were begun (and must be paid for).
        """
        evaluation, apart = self._evaluation, self._evaluation.randomness.apart
        if apart and (evaluation.randomness.reseeds or not evaluation.randomness.torch_alone):
            self.leave(_SEEDED if evaluation.randomness.reseeds else _ONCE)
            return 0
        known = slice(1 if apart else 0, 2)
        produced, kept = _Produced(), _Kept()
        hidden: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.choice == "auto":
            # an operation over whose members torch would loop (and warn of it): where that is attention, which does
            # most of the work, a batch is slower than the loop
            hidden = filters.changed("error", "There is a performance drop", UserWarning)
        try:
            with evaluation.undone_on_error(), _unreadable(evaluation.vector), hidden, produced, kept:
                told, slopes = self.evaluate(x, fresh=False, again=apart, common=apart)
        except Exception as error:  # noqa: BLE001 - whatever a loss raises under vmap, the loop can do without
            kept.settle()
            self.leave(error)
            return 2
        if kept.settle():
            self.leave("the loss keeps tensors of its forward (a history, a running mean, a hidden state)")
        elif off := self._off(told, slopes, losses, gradients, known):
            self.leave(off)
        else:
            shared = 1 if apart else 2  # numbers that were drawn once here will be drawn for each
            self._settle((x.nbytes + produced.bytes) // shared + 1)
        if self.choice != "compiled":
            return 2
        self.rows = min(self.rows, max(2, members))
        self._compile()
        try:
            with evaluation.undone_on_error(), _unreadable(evaluation.vector):
                told, slopes = self.evaluate(x, fresh=False, again=apart, common=apart)
        except Exception as error:  # noqa: BLE001 - as above, and whatever the compiler cannot do
            self.leave(error)
        if off := self._off(told, slopes, losses, gradients, known):
            self.leave(off)
        return 4

    def _off(
        self,
        told: FloatArray,
        slopes: FloatArray | None,
        losses: Sequence[float],
        gradients: FloatArray | None,
        known: slice,
    ) -> str:
        """In what a forward of two points differs from one at a time, as far as that is known; "" if in nothing."""
        eps = max(torch.finfo(t.dtype).eps for t in self._evaluation.vector.tensors)
        near = ULPS * eps * max(map(abs, losses[known]))
        off = [i for i in range(known.start, 2) if not abs(told[i] - losses[i]) <= near]
        if off:
            return f"one forward for two members told {float(told[off[0]])!r} where one alone is {losses[off[0]]!r}"
        if (
            gradients is not None
            and slopes is not None
            and not _close(slopes[known], gradients[known], ULPS * eps)
        ):
            return "one forward and backward for two members told other gradients than one alone"
        return ""

    def _compile(self) -> None:
        """Compile the forward from now on."""
        devices = {t.device for t in self._evaluation.vector.tensors}
        self._compiled = {noise: compiled(plain, devices) for noise, plain in self._plain.items()}

    def _settle(self, size: int) -> None:
        """Take batches from now on, where operations produce `size` bytes for one member."""
        device = next((t.device.type for t in self._evaluation.vector.tensors if not t.is_cpu), "cpu")
        rows = ALLOWANCE.get(device, ALLOWANCE["cuda"]) // size
        if self.choice == "auto" and rows < 2:
            self.leave(f"a forward of one member alone produces {size} bytes, which keeps the machine busy")
        else:
            self.way, self.rows = "vmap", self.choice if isinstance(self.choice, int) else max(1, rows)

    def leave(self, reason: str | Exception) -> None:
        """Evaluate one by one from now on.

        Raises:
            ObjectiveError: `batch="vmap"` was asked for.
        """
        cause = reason if isinstance(reason, Exception) else None
        text = reason if isinstance(reason, str) else _first_line(reason)
        if self.demanded:
            raise ObjectiveError(
                f'batch: expected a loss that can be batched for "{self.choice}"; {text}'
            ) from cause
        self.way, self.reason = "loop", text

    def shrink(self, rows: int, evaluation: int) -> None:
        """Take half of `rows`, for which the memory did not suffice, from now on."""
        self._shrunk.append(f"a batch of {rows} rows ran out of memory after evaluation {evaluation}: halved")
        if rows < 2:
            self.leave("out of memory")
        else:
            self.rows = rows // 2

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Strings and numbers."""
        return {
            "choice": self.choice,
            "way": self.way,
            "rows": self.rows,
            "reason": self.reason,
            "wanted": self.wanted,
            "shrunk": list(self._shrunk),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go the way that the saved one went, whatever was chosen here.

        Raises:
            StateError: the saved one was batched, this loss cannot be.
        """
        if state["way"] == "vmap" and self._hindrance():
            raise StateError(f"state: its populations were evaluated in batches; here {self._hindrance()}")
        self.choice, self.way, self.rows = state["choice"], state["way"], state["rows"]
        self.reason, self.wanted, self._shrunk = state["reason"], state["wanted"], list(state["shrunk"])
        self._compiled = None
        if self.way == "vmap" and self.choice == "compiled":
            self._compile()


class _Produced(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the bytes that all operations produce: never less than what they hold at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and _memory(made) not in given:  # a view produces nothing
                self.bytes += made.numel() * made.element_size()
        return result


class _Kept(TorchFunctionMode):
    """Finds the tensors of a batched forward that outlive it: no call after it could use them."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._made += [weakref.ref(made) for made in tree_leaves(result) if isinstance(made, Tensor)]
        return result

    def settle(self) -> bool:
        """Make each what a forward of the last member alone would have left; whether there was any."""
        alive = {id(made): made for ref in self._made if (made := ref()) is not None}
        self._made.clear()  # what is weakly referred to cannot be swapped
        dead = [made for made in alive.values() if torch.func.debug_unwrap(made) is not made]
        for made in dead:
            with contextlib.suppress(RuntimeError):  # the loss has weak references of its own
                torch.utils.swap_tensors(made, _last_member(made))  # type: ignore[no-untyped-call]
        return bool(dead)


def _last_member(made: Tensor) -> Tensor:
    while (inner := torch.func.debug_unwrap(made, recurse=False)) is not made:
        dim = torch._C._functorch.maybe_get_bdim(made)  # -1: a wrapper for gradients
        made = inner if dim < 0 else inner.select(dim, -1)
    return made.detach().clone()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def _unreadable(vector: ParameterVector) -> Iterator[None]:
    """The model's own weights are nan for a while."""
    found = vector.snapshot()
    vector.restore([torch.full_like(t, torch.nan) for t in found])
    try:
        yield
    finally:
        vector.restore(found)


def _close(a: FloatArray, b: FloatArray, near: float) -> bool:
    return all(np.abs(p - q).max() <= near * np.abs(q).max() for p, q in zip(a, b, strict=True))


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that an allocation failed."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0].partition("Please file")[0].strip()  # torch asks for reports
    return (
        f"{type(error).__name__}: {line}" if len(line) < 200 else f"{type(error).__name__}: {line[:200]} ..."
    )
