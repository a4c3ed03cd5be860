"""Clusters of atoms that attract and repel each other: a landscape with very many valleys."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from hybridopt.problems._problem import Problem, ProblemError

_GROUND = {13: -44.326801418735, 38: -173.928426591}


def lennard_jones(seed: int = 42, *, atoms: int = 13) -> Problem:
    """The energy of a Lennard-Jones cluster, 4·Σ (r⁻¹² − r⁻⁶) over all pairs, in reduced units, float64.

    The best of 13 is an icosahedron, which one descent in fifteen from a random start finds. The best of 38 is a
    truncated octahedron behind a high barrier: nearly all starts lead to icosahedral clusters (−173.25 and
    above), and a descent alone hardly ever finds it; basin hopping that accepts higher minima too does, in some
    10⁵ gradients: `restart(lbfgsb(ftol=1e-6, gtol=0.01), sigma=0.22, temperature=1.2)`. `loss` takes coordinates of
    shape (..., 3·atoms), atom by atom, and is infinite where two atoms coincide.

    Args:
        seed: of the start, uniform in a cube of side 1.5·atoms^(1/3).
        atoms: at least 2; `best_known` is listed for 13 and 38, from the Cambridge Cluster Database (Wales, Doye,
            J. Phys. Chem. A 101, 1997).

    Raises:
        ProblemError: fewer than two atoms.

    Example:
        >>> import torch
        >>> from hybridopt.problems import lennard_jones
        >>> problem = lennard_jones(atoms=2)
        >>> round(problem.loss(torch.tensor([0, 0, 0, 2 ** (1 / 6), 0, 0], dtype=torch.float64)).item(), 12)
        -1.0
    """
    if not isinstance(atoms, int) or atoms < 2:
        raise ProblemError(f"lennard_jones: expected atoms to be a whole number from 2, got {atoms!r}")
    side = 1.5 * atoms ** (1 / 3)
    start = np.random.default_rng((seed, atoms)).uniform(-side / 2, side / 2, 3 * atoms)
    return Problem(
        name=f"lennard_jones(atoms={atoms})",
        loss=partial(_energy, pairs=torch.triu_indices(atoms, atoms, 1)),
        target=torch.from_numpy(start),
        bounds=(-side, side),
        best_known=_GROUND.get(atoms),
        description=f"energy of a Lennard-Jones cluster of {atoms} atoms",
    )


def _energy(x: Tensor, *, pairs: Tensor) -> Tensor:
    """Of coordinates x, shape (..., 3·atoms); pairs: the indices of both atoms, shape (2, m)."""
    places = torch.unflatten(x, -1, (-1, 3))
    between = places.index_select(-2, pairs[0]) - places.index_select(-2, pairs[1])
    square = between.square().sum(-1)  # r², shape (..., m)
    attraction = square**-3
    energy: Tensor = 4 * (attraction * (attraction - 1)).sum(-1)
    return energy
