"""pycma's CMA-ES as a hybridopt method."""

from hybridopt_cma._cmaes import CMAES

__all__ = ["CMAES"]
