"""Two problems on scikit-learn's diabetes data: a fair classifier, and the likelihood of a Gaussian process."""

from __future__ import annotations

from functools import cache, partial
from math import log, pi

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hybridopt.constraints import Constraint
from hybridopt.problems._problem import Problem, ProblemError

_AGE = 0  # its column
_ALLOWED = 0.05  # covariance between age and the classifier's output


def fairness(seed: int = 42) -> Problem:
    """Logistic regression whose output may hardly vary with age: 11 weights, one two-sided constraint, convex.

    Predicts whether the disease of 442 patients progresses faster than the median from ten standardised inputs, age
    among them. The loss is the mean logistic loss plus |w|²/200; `constraints` keeps the covariance of the output
    w·x + b with age within ±0.05 (Zafar et al., "Fairness constraints", AISTATS 2017, eq. 9), whose upper side is
    active at the solution. Without it the covariance is 0.46 and the loss 0.4854.

    Args:
        seed: of the start, normal with deviation 0.1.

    Raises:
        ProblemError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> from hybridopt.problems import fairness
        >>> problem = fairness()
        >>> problem.constraints.function(torch.zeros(11, dtype=torch.float64)).item(), problem.constraints.upper
        (0.0, 0.05)
    """
    inputs, progress = _diabetes()
    sign = torch.where(progress > progress.median(), 1.0, -1.0).double()
    age = inputs[:, _AGE] / len(inputs)

    def output(x: Tensor) -> Tensor:
        told: Tensor = inputs @ x[:10] + x[10]
        return told

    def loss(x: Tensor) -> Tensor:
        return softplus(-sign * output(x)).mean() + (x[:10] ** 2).sum() / 200

    generator = torch.Generator().manual_seed(seed)
    return Problem(
        name="fairness",
        loss=loss,
        target=0.1 * torch.randn(11, dtype=torch.float64, generator=generator),
        bounds=(-3.0, 3.0),
        best_known=0.5000440332123,
        constraints=Constraint(lambda x: age @ output(x), -_ALLOWED, _ALLOWED),
        description="logistic regression on diabetes whose output may hardly vary with age",
    )


def gaussian_process(seed: int = 42) -> Problem:
    """Twelve hyperparameters of a Gaussian process on the diabetes data, by its negative log likelihood.

    The kernel is signal² · exp(−½ Σ (x_k − x'_k)² / length_k²) + noise² on the diagonal; `x` holds the logs of the
    ten lengths, of signal and of noise; inputs (over all patients) and output are standardised. The loss is the
    negative log marginal likelihood of the first 200 patients, in nats each (Rasmussen and Williams 2006, eq. 2.30).
    Differentiable, with two valleys at least: most descents end in the worse one (`minima`, both in the box, where the
    lengths of irrelevant inputs reach its edge). One evaluation factorises a matrix of 200 × 200, about a millisecond.

    Args:
        seed: of the start, uniform in −1 to 1.

    Raises:
        ProblemError: scikit-learn is not installed.

    Example:
        >>> from hybridopt.problems import gaussian_process
        >>> problem = gaussian_process()
        >>> problem.best_known < problem.loss(problem.target).item() < 3
        True
    """
    inputs, progress = (data[:200] for data in _diabetes())
    generator = torch.Generator().manual_seed(seed)
    return Problem(
        name="gaussian_process",
        loss=partial(
            _negative_log_likelihood, inputs=inputs, output=(progress - progress.mean()) / progress.std()
        ),
        target=2 * torch.rand(12, dtype=torch.float64, generator=generator) - 1,
        bounds=(-5.0, 5.0),
        best_known=1.1216534920105,
        minima=(1.1216534920105, 1.1224625991646),
        description="log likelihood of a Gaussian process on diabetes, one length for each input",
    )


def _negative_log_likelihood(x: Tensor, *, inputs: Tensor, output: Tensor) -> Tensor:
    n = len(inputs)
    scaled = inputs * torch.exp(-x[:10])
    square = (scaled**2).sum(-1)
    distance = (square[:, None] + square - 2 * scaled @ scaled.T).clamp(min=0)
    covariance = torch.exp(2 * x[10] - distance / 2) + torch.exp(2 * x[11]) * torch.eye(
        n, dtype=torch.float64
    )
    # where rounding spoils it, the factor keeps a pivot that is not positive, whose log is not finite: no exception
    factor, _ = torch.linalg.cholesky_ex(covariance)
    white = torch.linalg.solve_triangular(factor, output[:, None], upper=False)
    value: Tensor = ((white**2).sum() / 2 + factor.diagonal().log().sum()) / n + log(2 * pi) / 2
    return value


@cache
def _diabetes() -> tuple[Tensor, Tensor]:
    """Inputs (442, 10), mean 0 and deviation 1, and the progress of the disease (442,); float64, never written."""
    try:
        from sklearn.datasets import load_diabetes
    except ImportError as error:
        raise ProblemError(
            f"diabetes: expected scikit-learn, which holds the data ({error}); "
            "pip install 'torch-hybridopt[problems]'"
        ) from error
    bunch = load_diabetes()
    inputs = torch.tensor(bunch.data, dtype=torch.float64)
    return (inputs - inputs.mean(0)) / inputs.std(0), torch.tensor(bunch.target, dtype=torch.float64)
