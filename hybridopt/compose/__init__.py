"""Optimizers made of optimizers."""

from hybridopt.compose.chain import Chain, Cycle
from hybridopt.compose.multistart import MultiStart
from hybridopt.compose.portfolio import Portfolio
from hybridopt.compose.race import Race
from hybridopt.compose.restart import Restart
from hybridopt.compose.split import Split
from hybridopt.compose.stage import Stage

__all__ = ["Chain", "Cycle", "MultiStart", "Portfolio", "Race", "Restart", "Split", "Stage"]
