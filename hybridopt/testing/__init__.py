"""What every method must do, as tests: subclass `OptimizerContract` in a test file of yours and name your method."""

from __future__ import annotations

from hybridopt.testing._losses import Heard, Loss, Model, Row, Rows, bowl, flat, valley
from hybridopt.testing._manners import Manners
from hybridopt.testing._paths import Paths
from hybridopt.testing._restrictions import Restrictions

__all__ = ["Heard", "Loss", "Model", "OptimizerContract", "Row", "Rows", "bowl", "flat", "valley"]


class OptimizerContract(Paths, Restrictions, Manners):
    """Tests that every method passes, ours and a third party's.

    Pytest (or any runner of `Test*` classes) collects them from a subclass; nothing of pytest is needed to define
    one. A method that needs bounds is given the box (-2, 2).

    Attributes:
        method: the method under test. If it is registered by entry point, its text form is tested too.
        bounds: given to every run; None = the box (-2, 2) where `method.needs` says so, else none.
        budget: forward-equivalents within which bowl and valley must be lowered to a tenth of their start.
        random: whether another seed takes another path; None = either will do.
        evaluations: length of the runs that are compared, saved and copied.

    Example:
        The whole test file of a package that registers the method "mine":

        >>> import hybridopt
        >>> from hybridopt.testing import OptimizerContract
        >>> class TestMine(OptimizerContract):
        ...     method = hybridopt.method("slsqp")
    """
