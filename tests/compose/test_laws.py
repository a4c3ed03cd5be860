"""Laws of compositions, over compositions drawn at random."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridopt import Chain, Cycle, Method, MultiStart, Portfolio, Race, Restart, Split, Stage, method
from tests.driving import BOX, Evaluation, start

LEAVES = st.sampled_from(
    [
        "slsqp",
        "adam(lr=0.05)",
        "torch.sgd(lr=0.001, momentum=0.5)",
        "cmaes(popsize=5)",
        "pso(swarmsize=6)",
        "nelder_mead",
        "dual_annealing(gradients=none)",
        "random_search(popsize=3)",
    ]
).map(method)


def limited(made: Method) -> st.SearchStrategy[Method]:
    """The method as a stage with a limit or rule, or as it is."""
    return st.one_of(
        st.just(made),
        st.integers(1, 25).map(lambda n: made.limit(evaluations=n)),
        st.integers(1, 6).map(lambda n: made.limit(steps=n)),
        st.sampled_from([5, 20, 60]).map(lambda p: made.limit(evaluations=f"{p}%")),
        st.integers(3, 15).map(lambda n: made.until(method(f"adam until plateau({n})").rule)),  # type: ignore[attr-defined]
        st.just(made.limit(handover="point", evaluations=12)),
    )


STAGES = LEAVES.flatmap(limited)


def composed(inner: st.SearchStrategy[Method]) -> st.SearchStrategy[Method]:
    """One composition around methods."""
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        several.map(Chain),
        several.map(lambda parts: Cycle(Chain(parts), rounds=2)),
        inner.map(lambda part: Restart(part, sigma=0.3, restarts=2)),
        several.map(lambda parts: Race(parts, rung=9)),
        several.map(lambda parts: Portfolio(parts, turn=5)),
        inner.map(lambda part: MultiStart(part, starts=3, rung=8)),
    ).flatmap(limited)


COMPOSITIONS = st.recursive(STAGES, composed, max_leaves=4)
law = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def path(made: Method, budget: Any = 60, cut: int | None = None) -> list[Evaluation]:
    """Every evaluation of a run; with `cut`, saved after so many steps and gone on with in another one."""
    run, loss = start(made, budget, bounds=BOX)
    seen: list[Evaluation] = []
    if cut is not None:
        for _ in range(cut):
            run.step()
        state = run.state_dict()
        run.finish()
        seen = loss.path
        run, loss = start(made, budget, bounds=BOX, seed=99)
        run.load_state_dict(state)
    with run:
        for _ in run:
            pass
    return seen + loss.path


@law
@given(COMPOSITIONS)
def test_text_is_the_value(made: Method) -> None:
    """Up to chains of one, which print as what is in them."""
    read = method(str(made))
    assert str(read) == str(made)
    assert method(str(read)) == read


@pytest.mark.parametrize(
    "text",
    [
        "(scipy.slsqp(evaluations=8) > cmaes) until plateau(30)",
        "cycle((adam > scipy.slsqp) until plateau(9) > cmaes)",
        "(adam > scipy.slsqp until plateau(9)) until converged",
        "(adam > scipy.slsqp)(evaluations=9) until plateau(9)",
        "((adam > scipy.slsqp) until plateau(9))(evaluations=9) until converged",
        "(adam until plateau(9))(steps=3) until converged",
        "race((adam > scipy.slsqp) until plateau(9), cmaes)",
    ],
)
def test_a_rule_behind_several_stages_is_theirs(text: str) -> None:
    assert str(method(text)) == text
    assert method(str(method(text))) == method(text)
    assert method("(adam > cmaes) until plateau(9)") != method("adam > cmaes until plateau(9)")


def test_stages_in_stages_are_one_where_only_rules_meet() -> None:
    a, b = method("adam until plateau(9)"), method("adam until converged")
    rule: Any = b.rule  # type: ignore[attr-defined]
    assert Stage(a, rule=rule) == a.until(rule) == method("adam until plateau(9) | converged")
    assert Stage(Chain([a]), rule=rule) == a.until(rule)
    assert Stage(Stage(Chain([a]))) == a
    assert Stage(Chain(["adam"]), steps=3) == method("adam(steps=3)")
    assert str(Stage(method("adam(steps=3)"), steps=5)) == "(adam(steps=3))(steps=5)"


@law
@given(STAGES)
def test_around_one_it_is_the_method(stage: Method) -> None:
    """Where no share is in it: that of 20% is of the enclosing budget."""
    if isinstance(stage, Stage) and stage.shares:
        return
    alone = path(stage)
    assert path(Chain([stage])) == alone
    assert path(Cycle(stage, rounds=1)) == alone
    assert path(Restart(stage, restarts=0)) == alone
    assert path(Race([stage])) == alone
    assert path(Portfolio([stage])) == alone
    assert path(MultiStart(stage, starts=1)) == alone
    assert path(Split({"*": stage})) == alone


@law
@given(STAGES, STAGES, STAGES)
def test_chains_of_chains_are_flat(a: Method, b: Method, c: Method) -> None:
    assert (a >> b) >> c == a >> (b >> c) == Chain([Chain([a]), Chain([b, c])])


@law
@given(COMPOSITIONS, st.integers(1, 60))
def test_a_budget_is_exact(made: Method, budget: int) -> None:
    run, loss = start(made, budget, bounds=BOX)
    with run:
        for _ in run:
            pass
    result = run.result()
    assert len(loss.path) == result.evaluations <= budget
    assert result.best_loss == loss.best


@law
@given(COMPOSITIONS)
def test_same_seed_same_path(made: Method) -> None:
    assert path(made) == path(made)


@law
@given(COMPOSITIONS, st.integers(0, 12))
def test_resume(made: Method, cut: int) -> None:
    assert path(made, cut=cut) == path(made)


@law
@given(COMPOSITIONS, st.integers(0, 12))
def test_an_earlier_state_loads_into_the_same_run(made: Method, cut: int) -> None:
    """Also into one that has ended meanwhile, and of which members were dropped."""
    run, loss = start(made, 60, bounds=BOX)
    for _ in range(cut):
        run.step()
    state, told = run.state_dict(), len(loss.path)
    with run:
        while run.step() is not None:
            pass
        whole = loss.path[:]
        run.load_state_dict(state)
        while run.step() is not None:
            pass
    assert loss.path[len(whole) :] == whole[told:]


@pytest.mark.slow
@settings(law, max_examples=150)
@given(COMPOSITIONS, st.integers(0, 25))
def test_resume_of_many(made: Method, cut: int) -> None:
    assert path(made, budget=90, cut=cut) == path(made, budget=90)
