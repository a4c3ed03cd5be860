"""Which compiled form of a rule is wanted: its flags, how numbers are stored, and what is done beside the rule."""

from __future__ import annotations

from dataclasses import dataclass

from hybridopt.rules import Rule

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes that an engine can load and store, in bytes an element."""


@dataclass(frozen=True)
class Variant:
    """One compiled form. 16-bit numbers are converted when loaded and stored; between, everything is float32."""

    flags: tuple[tuple[str, bool], ...] = ()
    weight: str = "float32"
    gradient: str = "float32"
    states: tuple[str, ...] = ()
    """Dtypes of the rule's active states, in order."""
    scalar: str = "float32"
    """Dtype of `step`, which is that in which torch makes a tensor of a number."""
    number: str = "float32"
    """Dtype of the rule's other per-tensor numbers: torch casts them to a float64 weight's dtype on loading."""
    unscaled: bool = False
    """Gradients are divided by a loss scale first, and written back so."""
    scaled: bool = False
    """The rule sees gradients times a factor (clipping); they stay as they are."""
    stochastic: bool = False
    """16-bit weights and states are rounded up or down at random, right on average."""
    kahan: bool = False
    """What rounding took from a weight is kept in a further state of the weight's dtype, `kahan_comp`."""

    @property
    def compute(self) -> str:
        """Dtype of the arithmetic."""
        return "float64" if self.weight == "float64" else "float32"

    @property
    def extras(self) -> tuple[str, ...]:
        """Numbers beside the rule's hyperparameters, in order: loss scale and factor."""
        return (*(("divisor",) if self.unscaled else ()), *(("factor",) if self.scaled else ()))


def width(rule: Rule, variant: Variant) -> int:
    """float64 numbers that a tensor's coefficients take: the rule's, the extras, the stream of its noise."""
    return len(rule.coefficients) + len(variant.extras) + int(variant.stochastic)


def places(rule: Rule, variant: Variant) -> tuple[int, list[str]]:
    """Of the addresses in a row of the CPU's table: the first one's place, and their dtypes."""
    dtypes = [variant.weight, *variant.states, *([variant.weight] if variant.kahan else [])]
    return 1 + int(rule.counts or variant.stochastic) + len(rule.scalar_state), dtypes


def columns(rule: Rule, variant: Variant) -> int:
    """Words in a row of the CPU's table."""
    first, dtypes = places(rule, variant)
    return first + len(dtypes) + int(variant.stochastic)


def joins(rule: Rule, variant: Variant) -> list[int]:
    """What tells whether tensors can be stepped as one; see `STEPS` in `_driver.py`."""
    if variant.stochastic:  # noise depends on the tensor
        return [-1]
    first, dtypes = places(rule, variant)
    sizes = [number for i, dtype in enumerate(dtypes, first) for number in (i, SIZES[dtype])]
    return [len(dtypes), SIZES[variant.gradient], *sizes]
