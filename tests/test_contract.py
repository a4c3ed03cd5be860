"""Every method of ours, third-party-like ones, and chains of them pass the contract that third parties are given."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, ClassVar

import pytest

import hybridopt
from hybridopt.testing import OptimizerContract
from tests.third_party import Extragradient, NelderMead, SignSGD, registered

BOX = (-2.0, 2.0)


class TestSLSQP(OptimizerContract):
    method = hybridopt.method("slsqp")
    random = False


class TestSLSQPAutograd(OptimizerContract):
    method = hybridopt.method("slsqp(gradients=autograd)")
    random = False


class TestSLSQPDifferences(OptimizerContract):
    method = hybridopt.method("slsqp(gradients=differences)")
    random = False


class TestSLSQPNone(OptimizerContract):
    method = hybridopt.method("slsqp(gradients=none)")
    bounds = BOX
    random = False


class TestDualAnnealing(OptimizerContract):
    method = hybridopt.method("dual_annealing")
    random = True


class TestDualAnnealingDifferences(OptimizerContract):
    method = hybridopt.method("dual_annealing(gradients=differences)")
    random = True


class TestDualAnnealingNone(OptimizerContract):
    method = hybridopt.method("dual_annealing(gradients=none)")
    random = True


class TestPSO(OptimizerContract):
    method = hybridopt.method("pyswarm.pso(swarmsize=10)")
    random = True


class TestCMAES(OptimizerContract):
    method = hybridopt.method("cma.cmaes")
    random = True


class TestCMAESBounded(OptimizerContract):
    method = hybridopt.method("cma.cmaes(popsize=6)")
    bounds = BOX
    random = True


class TestAdam(OptimizerContract):
    method = hybridopt.method("torch.adam(lr=0.1)")
    random = False


class TestOurAdam(OptimizerContract):
    method = hybridopt.method("adam(lr=0.05)")
    random = False


class TestOurNAdam(OptimizerContract):
    """With a scalar state of its own (`mu_product`, float32 whatever the weights)."""

    method = hybridopt.method("nadam(lr=0.05)")
    random = False


class TestLion(OptimizerContract):
    method = hybridopt.method("lion(lr=0.02)")
    random = False


class TestSGD(OptimizerContract):
    method = hybridopt.method("torch.sgd(lr=1e-3, momentum=0.9)")
    random = False


class TestRprop(OptimizerContract):
    method = hybridopt.method("torch.rprop(lr=0.01)")
    bounds = BOX
    random = False


class TestLBFGS(OptimizerContract):
    method = hybridopt.method("torch.lbfgs(line_search_fn=strong_wolfe)")
    random = False


class TestLBFGSBounded(OptimizerContract):
    method = hybridopt.method("torch.lbfgs(lr=0.1)")
    bounds = BOX
    random = False


class TestThirdPartyTorch(OptimizerContract):
    method = hybridopt.method(SignSGD, lr=0.01, decay=0.998)
    random = False


class TestThirdPartyClosure(OptimizerContract):
    method = hybridopt.method(Extragradient, lr=1e-3)
    random = False


class TestThirdPartySolver(OptimizerContract):
    method = NelderMead()
    random = False

    @pytest.fixture(autouse=True)
    def _registered(self) -> Any:
        with registered("third.nelder_mead", NelderMead):
            yield


class TestChain(OptimizerContract):
    method = hybridopt.method("dual_annealing(evaluations=30, gradients=none) > slsqp(ftol=1e-12)")
    random = True


class TestChainInPlace(OptimizerContract):
    method = hybridopt.method("torch.adam(lr=0.1, steps=9) > cma.cmaes(evaluations=25) > torch.lbfgs")
    random = True


class TestChainMidGeneration(OptimizerContract):
    """The first stage ends inside a generation, the second by forward-equivalents between a value and its gradient."""

    method = hybridopt.method(
        "cma.cmaes(evaluations=17) > slsqp(forward_equivalents=15) > pyswarm.pso(swarmsize=7)"
    )
    bounds = BOX
    random = True


class TestChainNested(OptimizerContract):
    """Limits at three levels, a target among them."""

    method = hybridopt.method(
        "((pyswarm.pso(swarmsize=5, evaluations=12) > torch.adam(lr=0.1))(evaluations=22) > slsqp(target=1.0))"
        "(forward_equivalents=90) > torch.sgd(lr=1e-3, momentum=0.9)"
    )
    bounds = BOX
    random = True


def test_the_contract_is_three_lines() -> None:
    class TestMine(OptimizerContract):
        method: ClassVar = hybridopt.method("slsqp")

    tests = [name for name in dir(TestMine) if name.startswith("test_")]
    assert len(tests) > 20
    TestMine().test_lowers_a_bowl()


def test_pytest_is_not_needed_to_import_it() -> None:
    code = "import sys; sys.modules['pytest'] = None; import hybridopt, hybridopt.testing"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
