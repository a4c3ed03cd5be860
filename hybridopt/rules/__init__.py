"""Update equations, each written once as pure elementwise functions."""

from hybridopt.rules._rule import Rule, State, xp

__all__ = ["Rule", "State", "xp"]
