"""`hybridopt.randomness`: the caller's generators come back bit for bit, and the loss draws what it should."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridopt.randomness import NoisePolicy, Randomness, derive_seed

SOURCES: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand(()).item(),
    "torch normal": lambda: torch.randn(3).sum().item(),
    "numpy": lambda: float(np.random.rand()),
    "numpy normal": lambda: float(np.random.randn()),  # keeps a second number back
    "python": lambda: random.random(),
    "python gauss": lambda: random.gauss(0, 1),  # keeps a second number back
}


def caller() -> tuple[Any, ...]:
    """Everything of the global generators, in a form that compares."""
    _, words, position, has_gauss, cached = np.random.get_state()
    return torch.get_rng_state().tolist(), words.tolist(), position, has_gauss, cached, random.getstate()


def draw_one_of_each() -> None:
    for source in SOURCES.values():
        source()


def draws(randomness: Randomness, fresh: list[bool], source: str, between: bool = False) -> list[float]:
    found = []
    for flag in fresh:
        randomness.begin(flag)
        found.append(SOURCES[source]())
        randomness.end()
        if between:
            draw_one_of_each()
    return found


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("policy", ["shared", "independent", "fixed"])
def test_the_callers_generators_are_as_found(source: str, policy: NoisePolicy) -> None:
    np.random.randn(), random.gauss(0, 1)  # both hold a cached number now
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    before = caller()
    assert before[3] == 1
    randomness = Randomness(1, policy=policy)
    randomness.open()
    torch_before = torch.get_rng_state()
    for fresh in (True, False, True):
        randomness.begin(fresh)
        draw_one_of_each()
        randomness.end()
        assert torch.equal(torch.get_rng_state(), torch_before), "torch's is as found after every evaluation"
    randomness.state_dict()
    randomness.close()
    assert caller() == before
    assert np.random.get_bit_generator() is generator  # type: ignore[attr-defined]
    randomness.close()
    assert caller() == before


def test_a_seeded_caller_goes_on_as_if_there_had_been_no_run() -> None:
    def numbers(run: bool) -> list[float]:
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        found = [source() for source in SOURCES.values()]
        if run:
            randomness = Randomness(1)
            randomness.open()
            draws(randomness, [True, False, True], "numpy normal", between=True)
            randomness.close()
        return found + [source() for source in SOURCES.values()]

    with_run, without = numbers(True), numbers(False)
    # torch's generator is the caller's own between evaluations, so what was drawn there is drawn
    torch_ones = [i for i, name in enumerate([*SOURCES, *SOURCES]) if name.startswith("torch")]
    assert [v for i, v in enumerate(with_run) if i not in torch_ones] == [
        v for i, v in enumerate(without) if i not in torch_ones
    ]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_runs_at_once_end_in_any_order(order: tuple[int, int]) -> None:
    before, generator = caller(), np.random.get_bit_generator()  # type: ignore[attr-defined]
    single = Randomness(5)
    single.open()
    alone = draws(single, [True] * 3, "numpy")
    single.close()
    two = [Randomness(5), Randomness(6)]
    for randomness in two:
        randomness.open()
    found = []
    for _ in range(3):
        found += draws(two[0], [True], "numpy")
        draws(two[1], [True], "numpy")
    assert found == alone
    for i in order:
        two[i].close()
    assert np.random.get_bit_generator() is generator  # type: ignore[attr-defined]
    assert caller() == before


@pytest.mark.parametrize("source", SOURCES)
def test_policies(source: str) -> None:
    #       a step    its probes    the next step    its probe
    fresh = [True, False, False, True, False]

    def under(policy: NoisePolicy) -> list[float]:
        randomness = Randomness(1, policy=policy)
        randomness.open()
        try:
            return draws(randomness, fresh, source)
        finally:
            randomness.close()

    a, b, c, d, e = under("shared")
    assert a == b == c != d == e
    assert len(set(under("independent"))) == 5
    assert len(set(under("fixed"))) == 1
    assert under("shared")[0] == under("independent")[0] == under("fixed")[0], "one seed, one first draw"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("policy", ["shared", "independent", "fixed"])
def test_same_seed_same_draws_whatever_is_drawn_in_between(source: str, policy: NoisePolicy) -> None:
    def path(seed: int, between: bool) -> list[float]:
        randomness = Randomness(seed, policy=policy)
        randomness.open()
        try:
            if between:
                draw_one_of_each()
            return draws(randomness, [True, False, True, True], source, between)
        finally:
            randomness.close()

    assert path(1, False) == path(1, True)
    assert path(1, False) != path(2, False)


@given(st.lists(st.booleans(), max_size=6), st.lists(st.booleans(), max_size=6), st.data())
def test_a_saved_run_draws_on(before: list[bool], after: list[bool], data: st.DataObject) -> None:
    policy: NoisePolicy = data.draw(st.sampled_from(["shared", "independent", "fixed"]))
    source = data.draw(st.sampled_from(list(SOURCES)))
    whole = Randomness(1, policy=policy)
    whole.open()
    draws(whole, before, source)
    buffer = io.BytesIO()
    torch.save(whole.state_dict(), buffer)
    expected = draws(whole, after, source)
    whole.close()
    buffer.seek(0)
    resumed = Randomness(99)
    if data.draw(st.booleans()):
        resumed.open()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    resumed.open()
    assert draws(resumed, after, source, between=True) == expected
    assert resumed.used == whole.used or not before
    resumed.close()


@pytest.mark.parametrize("source", [None, *SOURCES])
def test_drawing_is_noticed_in_the_first_evaluation(source: str | None) -> None:
    randomness = Randomness(1)
    assert randomness.used is None
    randomness.open()
    random.random()  # a method that draws before its first question is not the loss
    randomness.begin(True)
    if source is not None:
        SOURCES[source]()
    randomness.end()
    assert randomness.used == (source is not None)
    randomness.close()


def test_a_loss_may_seed_save_and_restore_the_generators_itself() -> None:
    before = caller()
    randomness = Randomness(1)
    randomness.open()
    np.random.get_state()  # so may a callback
    found = []
    for _ in range(2):
        randomness.begin(True)
        np.random.seed(3), random.seed(3), torch.manual_seed(3)
        state = np.random.get_state()
        first = np.random.rand()
        np.random.set_state(state)
        assert np.random.rand() == first
        found.append((first, random.random(), torch.rand(()).item()))
        randomness.end()
    randomness.close()
    assert found[0] == found[1]
    assert caller() == before


def test_seeds_of_parts_depend_on_seed_and_place_only() -> None:
    seeds = [derive_seed(s, *path) for s in (0, 1) for path in ((), (0,), (1,), (1, 0), ("noise",))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**31 for s in seeds)
    assert derive_seed(42, 1) == derive_seed(42, 1)
    assert derive_seed(42, "noise") == 255007686  # written into checkpoints' paths: never changes
