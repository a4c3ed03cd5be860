"""The loop: endings, callbacks, interrupts, checkpoints, and what the model holds afterwards."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import Budget, Reason, Run, Tracker, minimize
from hybridopt.errors import BudgetError, ClosedError, MethodError, ObjectiveError, ReplayMismatch, StateError


def bowl(x):
    return float(((x - 3.0) ** 2).sum())


def model_and_loss(seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    x = torch.randn(16, 2, dtype=torch.float64)
    y = x.sum(1, keepdim=True).sin()
    return model, lambda model: ((model(x) - y) ** 2).mean()


METHODS = [
    "slsqp",
    "cma.cmaes(popsize=6)",
    "torch.adam(lr=0.05)",
    "cma.cmaes(popsize=6, evaluations=20) > torch.adam(lr=0.05)",
]


@pytest.mark.parametrize("method", METHODS)
def test_the_model_holds_the_best_point(method):
    model, loss = model_and_loss()
    result = minimize(loss, model, method, budget=60, seed=1, batch="loop")  # a batch rounds otherwise
    assert loss(model).item() == result.best_loss
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert np.array_equal(result.x, flat.numpy())
    assert result.evaluations <= 60
    assert result.reason in (Reason.EVALUATIONS, Reason.CONVERGED)


def test_result_is_a_value_of_its_own():
    model, loss = model_and_loss()
    result = minimize(loss, model, "torch.sgd(lr=0.1)", budget=5, seed=0)
    before = result.x
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert np.array_equal(result.x, before)
    with pytest.raises(AttributeError):
        result.loss = 0.0


def test_own_loss_and_best_loss_differ_where_the_method_went_on():
    model, loss = model_and_loss()
    result = minimize(loss, model, "torch.sgd(lr=3.0)", budget=30, seed=0)
    assert result.best_loss < result.loss
    assert loss(model).item() == result.best_loss


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(evaluations=20), Reason.EVALUATIONS),
        (Budget(forward_equivalents=20), Reason.FORWARD_EQUIVALENTS),
        (Budget(evaluations=500, target=1.0), Reason.TARGET),
    ],
)
def test_reasons(budget, reason):
    result = minimize(bowl, np.zeros(4), "cma.cmaes(popsize=6)", budget=budget, seed=0)
    assert result.reason is reason
    assert result.message == reason.sentence
    if reason is Reason.TARGET:
        assert result.best_loss <= 1.0 < 500
        assert result.evaluations < 500


def test_seconds_are_checked_before_each_evaluation():
    clock = iter(range(10_000))
    objective = hybridopt.Objective(bowl, np.zeros(3), budget=Budget(seconds=7.5))
    objective.ledger._clock = lambda: float(next(clock))
    result = minimize(objective, method="cma.cmaes", budget=Budget(seconds=7.5), seed=0)
    assert result.reason is Reason.SECONDS
    assert 0 < result.evaluations < 10


def test_a_budget_is_required():
    with pytest.raises(BudgetError, match="needs a limit"):
        minimize(bowl, np.zeros(2), "slsqp", budget=None)


def test_seed_is_drawn_and_recorded():
    first = minimize(bowl, np.zeros(3), "cma.cmaes", budget=30)
    again = minimize(bowl, np.zeros(3), "cma.cmaes", budget=30, seed=first.seed)
    other = minimize(bowl, np.zeros(3), "cma.cmaes", budget=30)
    assert again.best_loss == first.best_loss
    assert other.best_loss != first.best_loss


@pytest.mark.parametrize("seed", [-1, True, 1.5, "1", 2**32])
def test_wrong_seeds(seed):
    with pytest.raises(StateError, match="seed: expected a whole number"):
        minimize(bowl, np.zeros(2), "slsqp", budget=5, seed=seed)


def test_callbacks_see_every_step_and_can_end_the_run():
    seen = []

    def watch(run, step):
        seen.append((run.objective.ledger.evaluations, step.loss))

    def enough(run, step):
        return run.steps == 4

    result = minimize(
        bowl, np.zeros(3), "cma.cmaes(popsize=5)", budget=500, seed=0, callbacks=[watch, enough]
    )
    assert [n for n, _ in seen] == [5, 10, 15, 20]
    assert result.reason is Reason.INTERRUPTED
    assert result.message == "a callback ended the run"


class Broken(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_the_loss_passes_unchanged_and_the_best_point_stays(method):
    model, loss = model_and_loss()
    error = Broken("at 30")
    seen = []

    def fails(model):
        if len(seen) == 30:
            raise error
        value = loss(model)
        seen.append(value.item())
        return value

    with pytest.raises(Broken) as caught:
        minimize(fails, model, method, budget=200, seed=1)
    assert caught.value is error
    assert loss(model).item() == min(seen)
    assert all(p.grad is None for p in model.parameters())


def test_an_exception_in_a_callback_passes_and_the_best_point_stays():
    before = threading.active_count()
    model, loss = model_and_loss()

    def fails(run, step):
        if run.steps == 3:
            raise Broken

    with pytest.raises(Broken):
        minimize(loss, model, "torch.adam(lr=0.1)", budget=50, callbacks=fails, seed=0)
    assert threading.active_count() == before


@pytest.mark.filterwarnings("ignore:autograd refused")  # each call has another batch
@pytest.mark.parametrize("method", ["adam", "cmaes", "slsqp", "lbfgs"])
def test_a_loader_that_runs_dry_says_so_itself(method):
    batches = iter([torch.randn(8, 3) for _ in range(5)])
    with pytest.raises(StopIteration):
        minimize(
            lambda m: m(next(batches)).square().mean(), torch.nn.Linear(3, 1), method, budget=99, batch="loop"
        )


def test_a_resumed_run_knows_that_it_reached_the_target():
    def run():
        return Run(
            bowl, np.ones(2), "nelder_mead(steps=1)", budget={"evaluations": 99, "target": 100}, seed=0
        )

    with run() as first:
        list(first)
        state = first.state_dict()
    with run() as second:
        second.load_state_dict(state)
        assert list(second) == []
    assert first.result().reason is second.result().reason is Reason.TARGET


def test_a_checkpoint_of_tune_is_none_of_a_run(tmp_path):
    file = tmp_path / "c.pt"
    space = hybridopt.Space({"x": hybridopt.Float(-1, 1)})
    hybridopt.tune(lambda c: c["x"] ** 2, space, "random_search", budget=3, seed=1, checkpoint=file)
    for seed in (None, 0):
        with pytest.raises(StateError, match="expected one of a run, got one of tune"):
            minimize(bowl, np.ones(1), "random_search", budget=3, seed=seed, checkpoint=file)


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C; a process begun in the background has none."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.mark.usefixtures("interruptible")
def test_first_interrupt_ends_between_steps_and_returns():
    def loss(x):
        if count.append(1) or len(count) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return bowl(x)

    count: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match="ending after this step"):
        result = minimize(loss, np.zeros(3), "cma.cmaes(popsize=5)", budget=500, seed=0)
    assert result.reason is Reason.INTERRUPTED
    assert result.evaluations == 15  # the generation was finished
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_raises_at_once_and_the_best_point_stays():
    model, loss = model_and_loss()
    seen = []

    def twice(model):
        seen.append(loss(model).item())
        if len(seen) == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return seen[-1]

    with pytest.warns(UserWarning, match="ending after this step"), pytest.raises(KeyboardInterrupt):
        minimize(twice, model, "cma.cmaes(popsize=50)", budget=500, seed=0)
    assert loss(model).item() == min(seen[:-1])


def test_another_handler_stays_in_force():
    calls = []
    old = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:

        def loss(x):
            os.kill(os.getpid(), signal.SIGINT)
            return bowl(x)

        result = minimize(loss, np.zeros(2), "cma.cmaes", budget=12, seed=0)
    finally:
        signal.signal(signal.SIGINT, old)
    assert result.evaluations == 12
    assert len(calls) == 12


@pytest.mark.parametrize(("method", "evaluations"), [("cma.cmaes(popsize=5)", 150), ("dual_annealing", 30)])
def test_all_nan_is_said_and_the_start_is_kept(method, evaluations):
    """Both would go on for ever and are ended after 30 questions in a row; a generation is one question."""
    model, _ = model_and_loss()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match="rejected"):
        result = minimize(lambda m: float("nan"), model, method, budget=500, seed=0, bounds=(-5, 5))
    assert result.reason is Reason.NON_FINITE
    assert result.best_loss == float("inf")
    assert not result.success
    assert result.nonfinite == result.evaluations == evaluations
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# -- stochastic losses ------------------------------------------------------------------------------------------------


def test_a_loss_that_draws_keeps_the_last_point():
    model, loss = model_and_loss()

    def noisy(model):
        return loss(model) + 10 * torch.rand(())

    state = torch.get_rng_state()
    result = minimize(noisy, model, "torch.sgd(lr=0.01)", budget=40, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.stochastic
    by_hand, _ = model_and_loss()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        loss(by_hand).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_keep_is_the_users_to_decide():
    model, loss = model_and_loss()
    seen = []

    def noisy(model):
        value = loss(model) + torch.rand(())
        seen.append((value.item(), [p.detach().clone() for p in model.parameters()]))
        return value

    result = minimize(noisy, model, "cma.cmaes(popsize=5)", budget=40, seed=3, keep="best")
    lucky = min(seen, key=lambda pair: pair[0])
    assert result.best_loss == lucky[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), lucky[1], strict=True))
    other, loss = model_and_loss()
    minimize(loss, other, "torch.sgd(lr=3.0)", budget=30, seed=0, keep="last")
    best, loss = model_and_loss()
    minimize(loss, best, "torch.sgd(lr=3.0)", budget=30, seed=0)
    assert loss(other) > loss(best)


def test_fixed_noise_is_deterministic():
    x = torch.zeros(3, dtype=torch.float64)
    result = minimize(
        lambda x: ((x - 3) ** 2).sum() + torch.rand(()), x, "slsqp", budget=100, seed=3, noise="fixed"
    )
    assert not result.stochastic
    assert result.reason is Reason.CONVERGED


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpointed_run_goes_on_as_if_it_had_not_stopped(tmp_path, method):
    whole, loss = model_and_loss()
    want = minimize(loss, whole, method, budget=50, seed=4)
    file = tmp_path / "run.pt"
    model, loss = model_and_loss()
    for budget in (17, 33, 50):
        got = minimize(loss, model, method, budget=budget, seed=4, checkpoint=file)
        model, loss = model_and_loss(seed=9)  # the weights come from the file, not from the model
        model, loss = model_and_loss()
    assert (got.best_loss, got.loss, got.evaluations) == (want.best_loss, want.loss, want.evaluations)
    assert got.reason is want.reason
    assert np.array_equal(got.x, want.x)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_of_another_method_or_seed_is_refused(tmp_path):
    file = tmp_path / "run.pt"
    minimize(bowl, np.zeros(2), "cma.cmaes", budget=20, seed=1, checkpoint=file)
    with pytest.raises(StateError, match=r"saved by 'cma.cmaes', this run is 'cma.cmaes\(popsize=9\)'"):
        minimize(bowl, np.zeros(2), "cma.cmaes(popsize=9)", budget=40, seed=1, checkpoint=file)
    with pytest.raises(StateError, match="saved with seed 1, got seed=2"):
        minimize(bowl, np.zeros(2), "cma.cmaes", budget=40, seed=2, checkpoint=file)
    with pytest.raises(StateError, match="shapes"):
        minimize(bowl, np.zeros(3), "cma.cmaes", budget=40, seed=1, checkpoint=file)


def test_a_journal_that_does_not_fit_can_be_restarted_from_the_best(tmp_path):
    file = tmp_path / "run.pt"
    first = minimize(bowl, np.zeros(2), "cma.cmaes", budget=60, seed=1, checkpoint=file)
    state = torch.load(file, weights_only=True)
    state["optimizer"]["journal"]["digests"][3] += 1
    torch.save(state, file)
    with pytest.raises(ReplayMismatch, match="question 4 of"):
        minimize(bowl, np.zeros(2), "cma.cmaes", budget=90, checkpoint=file)
    torch.save(state, file)
    result = minimize(bowl, np.zeros(2), "cma.cmaes", budget=90, checkpoint=file, exact=False)
    assert result.evaluations == 90
    assert result.best_loss <= first.best_loss
    assert any("started anew from the best point" in note for note in result.notes)


@pytest.mark.parametrize("content", [b"", b"hi", None])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    file = tmp_path / "run.pt"
    if content is None:
        torch.save({"a": 1}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(StateError, match=r"run\.pt: expected a file that hybridopt wrote"):
        minimize(bowl, np.zeros(2), "cma.cmaes", budget=10, checkpoint=file, seed=0)


def test_a_checkpoint_needs_a_folder(tmp_path):
    with pytest.raises(StateError, match="expected an existing folder"):
        minimize(bowl, np.zeros(2), "cma.cmaes", budget=10, checkpoint=tmp_path / "no" / "run.pt")


@pytest.mark.parametrize("callbacks", [3, [3], None])
def test_callbacks_are_callables(callbacks):
    with pytest.raises(
        ObjectiveError, match=r"callbacks: expected a callable, .* or a list of callables, got"
    ):
        minimize(bowl, np.ones(2), "cmaes", budget=9, callbacks=callbacks)


def test_callbacks_take_what_they_are_called_with():
    with pytest.raises(ObjectiveError, match=r"can be called as callback\(run, step\), got one of \(run\)"):
        minimize(bowl, np.ones(2), "cmaes", budget=9, callbacks=lambda run: None)
    minimize(
        bowl, np.ones(2), "cmaes", budget=9, callbacks=[lambda *given: None, lambda run, step, more=1: None]
    )


def test_unknown_arguments_name_the_nearest():
    with pytest.raises(ObjectiveError, match="unknown argument 'bound'; nearest: bounds"):
        minimize(bowl, np.zeros(2), "cma.cmaes", budget=10, bound=(-1, 1))
    with pytest.raises(MethodError, match="expected a method"):
        minimize(bowl, np.zeros(2), budget=10)


def test_stages_that_never_began_are_said():
    result = minimize(
        bowl, np.zeros(2), "dual_annealing > cma.cmaes > slsqp", budget=20, seed=0, bounds=(-5, 5)
    )
    assert result.notes[-1] == "never began: cma.cmaes > scipy.slsqp"
    whole = minimize(bowl, np.zeros(2), "cma.cmaes(steps=1) > slsqp", budget=500, seed=0)
    assert not any("never began" in note for note in whole.notes)


def test_checkpoints_are_plain_data(tmp_path):
    file = tmp_path / "run.pt"
    model, loss = model_and_loss()
    minimize(loss, model, METHODS[-1], budget=30, seed=0, checkpoint=file)
    state = torch.load(file, weights_only=True)
    assert state["method"] == "cma.cmaes(popsize=6, evaluations=20) > torch.adam(lr=0.05)"


# -- step by step -----------------------------------------------------------------------------------------------------


def test_run_is_the_same_loop_by_hand():
    tracker = Tracker()
    with Run(bowl, np.zeros(3), "cma.cmaes(popsize=5)", budget=40, seed=2, tracker=tracker) as run:
        steps = list(run)
    by_hand = run.result()
    assert len(steps) == 8 == by_hand.steps
    assert (
        by_hand.best_loss == minimize(bowl, np.zeros(3), "cma.cmaes(popsize=5)", budget=40, seed=2).best_loss
    )
    assert tracker.results()[0]["evaluations"] == 40
    with pytest.raises(ClosedError, match="it is finished"):
        run.step()


def test_leaving_the_block_early_says_interrupted():
    with Run(bowl, np.zeros(3), "slsqp", budget=400, seed=2) as run:
        run.step()
    assert run.result().reason is Reason.INTERRUPTED
    assert run.result() is run.result()


def test_a_failing_block_says_failed():
    run = Run(bowl, np.zeros(3), "slsqp", budget=400, seed=2)
    run.step()
    with pytest.raises(Broken), run:
        raise Broken
    assert run.result().reason is Reason.FAILED


def test_an_objective_may_be_given_whole():
    objective = hybridopt.Objective(bowl, np.zeros(3), seed=1)
    result = minimize(objective, method="slsqp", budget=50, seed=1)
    assert result.best_loss < 1e-6
    with pytest.raises(BudgetError, match="an Objective brings its target"):
        minimize(hybridopt.Objective(bowl, np.zeros(3)), np.zeros(3), "slsqp", budget=50)


def test_stages_are_reported():
    result = minimize(bowl, np.zeros(3), "cma.cmaes(evaluations=14) > slsqp", budget=100, seed=0)
    assert [s.method for s in result.stages] == ["cma.cmaes(evaluations=14)", "scipy.slsqp"]
    assert [s.reason for s in result.stages] == [Reason.EVALUATIONS, Reason.CONVERGED]
    assert sum(s.spent["evaluations"] for s in result.stages) == result.evaluations
    assert result.stages[1].best_loss == result.best_loss


def test_a_closures_price_is_said():
    x = torch.ones(3, requires_grad=True)

    def closure():
        loss = (x**2).sum()
        loss.backward()
        return loss

    result = minimize(closure, [x], "cma.cmaes", budget=10, seed=0)
    assert result.forward_equivalents == 30
    assert any("costs a forward and a backward" in note for note in result.notes)
    assert x.grad is None
