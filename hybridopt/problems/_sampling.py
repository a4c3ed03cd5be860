"""A loss that draws random numbers: the expected cost of sampled words."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridopt.problems._problem import Problem

_POSITIONS, _LETTERS, _DRAWS = 6, 5, 32


def sampling(seed: int = 42) -> Problem:
    """Logits of random words of which 32 are drawn (`torch.multinomial`) at every evaluation.

    `x`, shape (30,), holds the logits of 5 letters at 6 positions. The loss is the mean cost of the drawn words: the
    share of letters that differ from a secret word. It is noisy (standard deviation about 0.03 at the start, where it
    is 0.8 on average), and sampling passes no gradient on. Populations are evaluated one by one, because torch cannot
    share draws among the rows of a batched multinomial. The lowest loss, 0, is drawn by chance long before the logits
    are right: `score` is minus the exact expectation, at best −0.0002 in the box.

    Args:
        seed: of the secret word; the start is all zeros.

    Example:
        >>> from hybridopt.problems import sampling
        >>> problem = sampling(seed=0)
        >>> round(problem.score(problem.target), 12)
        -0.8
    """
    secret = torch.randint(_LETTERS, (_POSITIONS,), generator=torch.Generator().manual_seed(seed))

    def chances(x: Tensor) -> Tensor:
        return x.reshape(_POSITIONS, _LETTERS).softmax(-1)

    def loss(x: Tensor) -> Tensor:
        drawn = torch.multinomial(chances(x), _DRAWS, replacement=True)  # (positions, draws)
        return (drawn != secret[:, None]).double().mean()

    def score(x: Tensor) -> float:
        return chances(x.detach())[torch.arange(_POSITIONS), secret].mean().item() - 1

    return Problem(
        name="sampling",
        loss=loss,
        target=torch.zeros(_POSITIONS * _LETTERS, dtype=torch.float64),
        bounds=(-5.0, 5.0),
        best_known=0.0,
        score=score,
        description="mean cost of 32 sampled words, whose 30 logits are wanted",
    )
