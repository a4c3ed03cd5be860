"""Our own gradient-free methods: each asks for the losses of a whole generation, and its state is plain data."""

from hybridopt.population._base import PopulationMethod, Strategy
from hybridopt.population.bayes import BayesianOptimization
from hybridopt.population.cmaes import CMAES
from hybridopt.population.de import DifferentialEvolution
from hybridopt.population.es import PGPE, OpenAIES
from hybridopt.population.nes import SNES, XNES
from hybridopt.population.pso import PSO
from hybridopt.population.sampling import RandomSearch, SobolSearch

__all__ = [
    "CMAES", "PGPE", "PSO", "SNES", "XNES", "BayesianOptimization", "DifferentialEvolution", "OpenAIES",
    "PopulationMethod", "RandomSearch", "SobolSearch", "Strategy",
]  # fmt: skip
