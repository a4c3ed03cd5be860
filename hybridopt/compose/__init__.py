"""Optimizers made of optimizers."""

from hybridopt.compose.chain import Chain, Stage

__all__ = ["Chain", "Stage"]
