"""pyswarm's particle swarm as a hybridopt method."""

from hybridopt_pyswarm._pso import PSO

__all__ = ["PSO"]
