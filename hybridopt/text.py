"""Methods as text: `dual_annealing(evaluations=20%) > adam until plateau(50) > slsqp(ftol=1e-12)`, read and printed."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import operator
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from hybridopt.errors import BudgetError, MethodError, nearest
from hybridopt.ledger import Share
from hybridopt.optimizer import Method
from hybridopt.registry import COMPOSED, composition, factory

_T = TypeVar("_T")
LIMITS = ("evaluations", "forward_equivalents", "seconds", "target", "steps", "handover")
_WORDS = {"None": None, "True": True, "False": False, "true": True, "false": False}
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>[+-]?(?:(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf\b|nan\b))
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*(?:[.:-][A-Za-z_][A-Za-z0-9_]*)*)
      | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<mark>[()=,>|&%:{}\[\]])
    )""",
    re.VERBOSE | re.DOTALL,
)


def method(spec: str | type | Method, **options: Any) -> Method:
    """A method from text, a name, a class, or a method.

    Args:
        spec: a registered name (`"slsqp"`, `"scipy.slsqp"`); the place of a class (`"package.module:Class"`); text
            with options, chains, switch rules and compositions (`"dual_annealing(evaluations=20%) > adam(lr=0.01)
            until plateau(50) > slsqp"`, `"restart(slsqp, sigma=1)"`); a `Method` class; a `torch.optim.Optimizer`
            class; or a method whose options are to be changed.
        **options: its options, for anything but text that has some. A stage's limits (evaluations,
            forward_equivalents, seconds, target, steps) are among them.

    Raises:
        MethodError: unknown name or option (the nearest known ones are shown), or text that cannot be read (the
            place is shown).

    Example:
        >>> from hybridopt import method
        >>> method("slsqp", ftol=1e-9) == method("slsqp(ftol=1e-9)")
        True
        >>> str(method("slsqp(evaluations=50) > adam(lr=.1)"))
        'scipy.slsqp(evaluations=50) > adam(lr=0.1)'
    """
    if isinstance(spec, str):
        if re.fullmatch(r"\s*[\w.:-]+\s*", spec) and spec.strip() not in COMPOSED:
            return build(spec.strip(), options)
        if options:
            raise MethodError(f"method: options belong inside the text here: {spec!r} and {options!r}")
        return _Parser(spec).read()
    limits, rest = _split(options)
    if not isinstance(spec, Method):
        name = spec.name if isinstance(spec, type) and issubclass(spec, Method) else ""
        made = _call(spec, name, rest)
    elif not rest:
        made = spec
    else:
        made = _changed(spec, spec.label, rest)
    return made.limit(**limits) if limits else made


def build(name: str, options: Mapping[str, Any]) -> Method:
    """The named method with options; limits among the options make it a stage."""
    limits, rest = _split(options)
    made = _call(factory(name), name, rest)
    return made.limit(**limits) if limits else made


def _changed(given: Any, label: str, options: Mapping[str, Any]) -> Method:
    """The method with some options replaced."""
    if not dataclasses.is_dataclass(given):
        return build(label, {**given.options(), **options})
    _check_options(type(given), label, options)
    made: Any = dataclasses.replace(given, **options)  # type: ignore[type-var]
    return made  # type: ignore[no-any-return]


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    limits = {k: v for k, v in options.items() if k in LIMITS}
    return limits, {k: v for k, v in options.items() if k not in LIMITS}


def _call(make: Any, name: str, options: Mapping[str, Any]) -> Method:
    """`make` is a `Method` class; any other class is left to the torch bridge."""
    if not isinstance(make, type):
        came = reprlib.repr(make)
        if isinstance(make, torch.optim.Optimizer):  # whose repr has a line for each option
            kind = type(make).__name__
            came = f"an instance of {kind}; pass the class and its options, method({kind}, lr=...)"
        raise MethodError(f"method: expected text, a class or a Method, got {came}")
    if not (isinstance(make, type) and issubclass(make, Method)):
        made: Method = composition("torch")(make, dict(options))
        return made
    _check_options(make, name, options)
    return make(**options)


def _compose(name: str, inside: Sequence[Any], options: Mapping[str, Any]) -> Method:
    """A composition of one method."""
    make = composition(name)
    if len(inside) != 1:
        raise MethodError(f"{name}: expected one method inside, got {len(inside)}")
    _check_options(make, name, options)
    made: Method = make(*inside, **options)
    return made


def _check_options(cls: Any, name: str, options: Mapping[str, Any]) -> None:
    """Only a dataclass tells its options; other methods check their own."""
    if dataclasses.is_dataclass(cls):
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        for option in options:
            if option not in known:
                raise MethodError(f"{name}: unknown option {option!r}{nearest(option, {*known, *LIMITS})}")


def print_call(label: str, options: Mapping[str, Any], *inside: Any) -> str:
    """`label(inside, a=1, b=word)`, or the label alone without any of these."""
    parts = [*map(str, inside), *(f"{k}={print_value(v)}" for k, v in options.items())]
    return f"{label}({', '.join(parts)})" if parts else label


def print_value(value: Any) -> str:
    """A value as the parser reads it back: None, a bool, number, string, or a tuple or list of such; a dtype's name."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Method):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, str):
        plain = (
            re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value)
            and value not in _WORDS
            and value not in ("inf", "nan")
        )
        return value if plain else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(print_value, value))}]"
    if isinstance(value, tuple):
        inner = ", ".join(map(print_value, value))
        return f"({inner}{',' if len(value) == 1 else ''})"
    return repr(value)


class _Parser:
    """Recursive descent.

    chain = stage (">" stage)*; stage = ("(" chain ")" limits? | name arguments?) ("until" rule)?;
    rule = all ("|" all)*; all = one ("&" one)*; one = "(" rule ")" | name arguments?.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.kind, self.token, self.start = "", "", 0
        self.advance()

    def read(self) -> Method:
        result = self.chain()
        if self.kind != "end":
            raise self.error("expected '>' or the end")
        return result

    def advance(self) -> None:
        if not self.text[self.at :].strip():
            self.kind, self.token, self.start = "end", "", len(self.text)
            return
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            self.start = self.at + len(self.text[self.at :]) - len(self.text[self.at :].lstrip())
            raise self.error("unexpected character")
        self.kind = str(match.lastgroup)
        self.token, self.start, self.at = match.group(self.kind), match.start(self.kind), match.end()

    def error(self, what: str) -> MethodError:
        return MethodError(
            f"method: {what}, at character {self.start + 1}:\n  {self.text}\n  {' ' * self.start}^"
        )

    def take(self, mark: str) -> bool:
        if self.kind == "mark" and self.token == mark:
            self.advance()
            return True
        return False

    def need(self, mark: str, what: str) -> None:
        if not self.take(mark):
            raise self.error(f"expected {mark!r} {what}")

    def chain(self) -> Method:
        stages = [self.stage()]
        while self.take(">"):
            stages.append(self.stage())
        if len(stages) == 1:
            return stages[0]
        made: Method = composition("chain")(stages)
        return made

    def stage(self) -> Method:
        made = self.one_method()
        if self.kind == "mark" and self.token == "(":
            raise self.error(
                "expected limits inside the parentheses before, or around: (...)(evaluations=100)"
            )
        if self.kind == "name" and self.token == "until":
            at = self.start
            self.advance()
            rule = self.rule()
            return self.checked(at, lambda: made.until(rule))
        return made

    def one_method(self) -> Method:
        if self.take("("):
            inner = self.chain()
            self.need(")", "to close the group")
            limits, at = self.arguments(LIMITS)
            return self.checked(at, lambda: inner.limit(**limits)) if limits else inner
        if self.kind != "name":
            raise self.error("expected a method's name")
        name, at = self.token, self.start
        self.advance()
        if name in COMPOSED:
            return self.composed(name, at)
        options, _ = self.arguments()
        return self.checked(at, lambda: build(name, options))

    def composed(self, name: str, at: int) -> Method:
        """A composition: methods, then options, in parentheses."""
        self.need("(", f"and a method after {name!r}")
        inside: list[Any] = []
        parts: dict[str, Method] = {}
        while not (self.kind == "mark" and self.token == ")") and not self.before_equals():
            if name == "split":
                self.part(parts)
            else:
                inside.append(self.chain())
            if not (self.kind == "mark" and self.token == ")"):
                self.need(",", "or ')' after a method")
        options = self.rest_of_arguments(None)

        def make() -> Method:
            limits, rest = _split(options)
            given: dict[str, list[Any]] = {
                "split": [parts],
                "race": [tuple(inside)],
                "portfolio": [tuple(inside)],
            }
            made = _compose(name, given.get(name, inside), rest)
            return made.limit(**limits) if limits else made

        return self.checked(at, make)

    def part(self, parts: dict[str, Method]) -> None:
        """A pattern in quotes, a colon, and the method of the weights it matches."""
        if self.kind != "string":
            raise self.error('expected a pattern in quotes and a method, such as "gate.*": adam')
        at = self.start
        pattern = self.value()
        if pattern in parts:
            self.start = at
            raise self.error(f"the pattern {pattern!r} is given twice")
        self.need(":", f"and a method after {pattern!r}")
        parts[pattern] = self.chain()

    def before_equals(self) -> bool:
        """Whether an option begins here: a name and "="."""
        return self.kind == "name" and re.match(r"\s*=", self.text[self.at :]) is not None

    def rule(self) -> Any:
        made = self.all_of()
        while self.take("|"):
            made = made | self.all_of()
        return made

    def all_of(self) -> Any:
        made = self.one_rule()
        while self.take("&"):
            at = self.start
            other = self.one_rule()
            made = self.checked(at, functools.partial(operator.and_, made, other))
        return made

    def one_rule(self) -> Any:
        if self.take("("):
            made = self.rule()
            self.need(")", "to close the group of rules")
            return made
        if self.kind != "name":
            raise self.error("expected a switch rule")
        name, at = self.token, self.start
        rules = composition("rules")
        if name not in rules:
            raise self.error(f"unknown switch rule {name!r}{nearest(name, rules)}")
        self.advance()
        values, options = [], {}
        if self.take("("):
            while not (self.kind == "mark" and self.token == ")") and not self.before_equals():
                values.append(self.value())
                if not (self.kind == "mark" and self.token == ")"):
                    self.need(",", "or ')' after a value")
            options = self.rest_of_arguments(None)
        signature = inspect.signature(rules[name])
        try:
            signature.bind(*values, **options)
        except TypeError as error:
            self.start = at
            written = f"{name}{signature.replace(return_annotation=inspect.Signature.empty)}".replace("'", "")
            raise self.error(f"{name}: {error}; a rule is written {written}") from error
        return self.checked(at, lambda: rules[name](*values, **options))

    def checked(self, at: int, make: Callable[[], _T]) -> _T:
        try:
            made = make()
        except (MethodError, BudgetError, TypeError, ValueError) as error:
            self.start = at
            raise self.error(str(error).removeprefix("method: ")) from error
        return made

    def arguments(self, allowed: Sequence[str] | None = None) -> tuple[dict[str, Any], int]:
        at = self.start
        return (self.rest_of_arguments(allowed) if self.take("(") else {}), at

    def rest_of_arguments(self, allowed: Sequence[str] | None) -> dict[str, Any]:
        """Options up to the closing parenthesis."""
        found: dict[str, Any] = {}
        while not self.take(")"):
            if self.kind != "name":
                raise self.error("expected an option's name or ')'")
            name = self.token
            if name in found:
                raise self.error(f"the option {name!r} is given twice")
            if allowed is not None and name not in allowed:
                raise self.error(f"expected a limit of the group, got {name!r}{nearest(name, allowed)}")
            self.advance()
            self.need("=", f"after {name!r}")
            found[name] = self.value()
            if not (self.kind == "mark" and self.token == ")"):
                self.need(",", "or ')' after a value")
        return found

    def value(self) -> Any:
        kind, token, start = self.kind, self.token, self.start
        if kind == "number":
            self.advance()
            plain = token.replace("_", "")
            if self.take("%"):
                return self.checked(start, lambda: Share(float(plain)))
            return int(plain) if re.fullmatch(r"[+-]?[0-9]+", plain) else float(plain)
        if kind == "string":
            try:
                text = ast.literal_eval(token)
            except (SyntaxError, ValueError) as error:
                raise self.error("expected a string as Python writes it") from error
            self.advance()
            return text
        if kind == "name":
            self.advance()
            return _WORDS.get(token, token)
        for opening, closing in ("()", "[]"):
            if self.take(opening):
                items = []
                while not self.take(closing):
                    items.append(self.value())
                    if not (self.kind == "mark" and self.token == closing):
                        self.need(",", f"or {closing!r} after a value")
                return tuple(items) if opening == "(" else items
        raise self.error("expected a value")
