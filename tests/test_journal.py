"""The journal of answers: what it keeps, that it keeps copies, and that half an entry never counts."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hybridopt.journal import Journal, digest
from hybridopt.optimizer import Answer, Kind, Request

numbers = st.floats(allow_nan=False, width=64)
vectors = hnp.arrays(np.float64, st.integers(1, 4), elements=numbers)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[Request, Answer]:
    kind = draw(st.sampled_from([kind for kind in Kind if kind is not Kind.VALUES_AND_GRADIENTS]))
    x = draw(vectors)
    finite, surrogate = draw(st.booleans()), draw(st.booleans())
    if kind is Kind.POPULATION:
        losses = draw(vectors)
        return Request(kind, np.stack([x, x])), Answer(float(losses.min()), losses, None, finite, surrogate)
    if kind in (Kind.VALUE, Kind.GRADIENT, Kind.VALUE_AND_GRADIENT):
        gradient = draw(st.none() | vectors) if kind is not Kind.VALUE else None
        violation = draw(st.sampled_from([0.0, 0.5, np.inf]))
        return Request(kind, x), Answer(draw(numbers), None, gradient, finite, surrogate, violation=violation)
    array = draw(st.none() | vectors)
    if array is not None and kind not in (Kind.RESIDUALS, Kind.HESSIAN_VECTOR):
        array = np.stack([array, 2 * array, array])
    direction = draw(vectors) if kind is Kind.HESSIAN_VECTOR else None
    return Request(kind, x, direction=direction), Answer(draw(numbers), array=array, finite=finite)


def same(a: Answer, b: Answer) -> bool:
    def bits(value: Any) -> Any:
        return None if value is None else np.asarray(value, dtype=np.float64).tobytes()

    shapes = [None if x.array is None else x.array.shape for x in (a, b)]
    told = zip((*a[:3], a.array), (*b[:3], b.array), strict=True)
    same_rest = a._replace(loss=0, losses=None, gradient=None, array=None) == b._replace(
        loss=0, losses=None, gradient=None, array=None
    )
    return all(bits(x) == bits(y) for x, y in told) and shapes[0] == shapes[1] and same_rest


@given(st.lists(exchanges(), max_size=6))
def test_gives_back_what_was_told(entries: list[tuple[Request, Answer]]) -> None:
    journal = Journal()
    for request, answer in entries:
        journal.append(request, answer)
    file = io.BytesIO()
    torch.save(journal.state_dict(), file)
    file.seek(0)
    loaded = Journal()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for one in (journal, loaded):
        one.rewind()
        assert len(one) == len(entries)
        for request, answer in entries:
            assert one.matches(request)
            assert same(one.next(), answer)
    assert loaded.nbytes == journal.nbytes
    told = sum(1 + len(a.losses if a.losses is not None else ()) for _, a in entries)
    told += sum(len(a.gradient) for _, a in entries if a.gradient is not None)
    told += sum(a.array.size for _, a in entries if a.array is not None)
    told += sum(a.violation > 0 for _, a in entries)
    assert journal.nbytes == 17 * len(entries) + 8 * told


def test_can_go_on_after_loading() -> None:
    first, second = Request(Kind.VALUE, np.array([1.0])), Request(Kind.VALUE, np.array([2.0]))
    journal = Journal()
    journal.append(first, Answer(1.0))
    loaded = Journal()
    loaded.load_state_dict(journal.state_dict())
    loaded.append(second, Answer(2.0))
    assert len(journal) == 1
    assert [loaded.next().loss, loaded.next().loss] == [1.0, 2.0]


@pytest.mark.parametrize(
    "other",
    [
        Request(Kind.VALUE, np.array([0.0, 1.0 + 2**-52])),
        Request(Kind.VALUE, np.array([-0.0, 1.0])),
        Request(Kind.VALUE, np.array([1.0, 0.0])),
        Request(Kind.VALUE, np.array([0.0])),
        Request(Kind.GRADIENT, np.array([0.0, 1.0])),
        Request(Kind.POPULATION, np.array([[0.0, 1.0]])),
        Request(Kind.VALUE, np.array([0.0, 1.0]), direction=np.array([0.0, 1.0])),
    ],
)
def test_one_bit_is_another_question(other: Request) -> None:
    asked = Request(Kind.VALUE, np.array([0.0, 1.0]))
    assert digest(asked) == digest(Request(Kind.VALUE, np.array([0.0, 1.0])))
    assert digest(asked) != digest(other)
    journal = Journal()
    journal.append(asked, Answer(1.0))
    assert not journal.matches(other)


def test_answers_are_copied_in_and_out() -> None:
    """Solvers write into what they are told, and reuse their x."""
    x, losses, gradient = np.array([[1.0, 2.0]]), np.array([3.0]), np.array([4.0, 5.0])
    journal = Journal()
    journal.append(Request(Kind.POPULATION, x), Answer(3.0, losses))
    journal.append(Request(Kind.GRADIENT, x[0]), Answer(3.0, None, gradient))
    for array in (x, losses, gradient):
        array[...] = -1
    for _ in range(2):  # what was handed out the first time is written into, too
        journal.rewind()
        assert journal.matches(Request(Kind.POPULATION, np.array([[1.0, 2.0]])))
        population, point = journal.next(), journal.next()
        assert population.losses is not None
        assert point.gradient is not None
        assert population.losses.tolist() == [3.0]
        assert point.gradient.tolist() == [4.0, 5.0]
        population.losses[...] = point.gradient[...] = -2


def test_half_an_entry_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt inside `append` leaves the journal as it was; the next entry is whole."""
    journal = Journal()
    first, second = Request(Kind.VALUE, np.array([1.0])), Request(Kind.VALUE, np.array([2.0]))
    journal.append(first, Answer(1.0))

    def interrupted(request: Request) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hybridopt.journal.digest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.append(second, Answer(-1.0, None, np.array([9.0])))
    assert len(journal) == 1
    journal.append(second, Answer(2.0))
    assert len(journal) == 2
    assert [journal.next().loss, journal.next().loss] == [1.0, 2.0]
    assert journal.nbytes == 2 * (17 + 8)


def test_empty() -> None:
    journal = Journal()
    loaded = Journal()
    loaded.load_state_dict(journal.state_dict())
    assert len(loaded) == 0
    assert loaded.nbytes == 0
