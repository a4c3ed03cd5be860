"""Batches of a fixed memory allowance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hybridopt import batch as batching
from hybridopt.errors import Stop
from hybridopt.objective import Objective
from hybridopt.vector import FloatArray
from tests.batch.drive import GENERATIONS, ask, bits, new, through_a_file, watch, way

# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_batch_is_as_large_as_the_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    produced = 2 * 8 * 1000 + 8  # of one member: its weights, their squares, the sum
    monkeypatch.setitem(batching.ALLOWANCE, "cpu", 4 * produced + 200)
    sizes: list[int] = []
    with Objective(lambda x: (x**2).sum(), torch.zeros(1000, dtype=torch.float64), batch="auto") as objective:
        watch(objective, sizes)
        objective.answer(ask(np.random.default_rng(0).normal(size=(13, 1000))))
        assert sizes == [2, 4, 4, 3], "the check, and the rest of 13"
        monkeypatch.setitem(batching.ALLOWANCE, "cpu", 2 * produced - 1)
    for choice in ("auto", "vmap"):
        with Objective(
            lambda x: (x**2).sum(), torch.zeros(1000, dtype=torch.float64), batch=choice
        ) as objective:
            objective.answer(ask(np.random.default_rng(0).normal(size=(13, 1000))))
            assert way(objective)[0] == ("loop" if choice == "auto" else "vmap")
            assert (f"one member alone produces {produced + 1} bytes" in repr(objective)) == (
                choice == "auto"
            )


def test_out_of_memory_halves_the_batch_for_good() -> None:
    paths = []
    for limits in (None, 9):
        sizes: list[int] = []
        objective = new(limits)
        watch(objective, sizes, most=5)
        if limits is not None:
            with pytest.raises(Stop):
                objective.answer(ask(GENERATIONS[0]))
            state = through_a_file(objective.state_dict())
            objective.close()
            objective = new(None)
            objective.load_state_dict(state)
            watch(objective, sizes, most=5)
        with objective:
            paths.append([bits(objective.answer(ask(x)).losses) for x in GENERATIONS])  # type: ignore[arg-type]
            assert objective.notes == ["a batch of 9 rows ran out of memory after evaluation 2: halved"]
            assert "populations 4 rows a forward" in repr(objective)
            assert (objective.ledger.evaluations, objective.ledger.forward) == (33, 35)
        assert sizes[:3] == [2, 9, 4]
        assert max(sizes[2:]) == 4, "obeyed from then on, by a resumed run too"
    assert paths[0] == paths[1]


def test_memory_may_run_out_in_the_middle_of_a_generation() -> None:
    sizes: list[int] = []
    with new(None, 5) as objective:
        evaluate = objective._generations.batch.evaluate

        def short(x: FloatArray, fresh: bool, **how: bool) -> Any:
            sizes.append(len(x))
            if len(sizes) == 3:
                raise MemoryError
            return evaluate(x, fresh, **how)

        objective._generations.batch.evaluate = short  # type: ignore[method-assign]
        objective.answer(ask(GENERATIONS[0]))
        ledger = objective.ledger
        assert sizes == [2, 5, 4, 2, 2], "of 11 rows two come alone"
        assert (ledger.evaluations, ledger.forward, ledger.recomputed) == (11, 13, 0)


def test_without_memory_for_two_there_is_no_batch() -> None:
    sizes: list[int] = []
    with new() as objective:
        watch(objective, sizes, most=1)
        losses = objective.answer(ask(GENERATIONS[0])).losses
        assert way(objective) == ("loop", "OutOfMemoryError: out of memory")
    with new(None, "loop") as other:
        assert losses is not None
        assert losses.tolist() == other.answer(ask(GENERATIONS[0])).losses.tolist()  # type: ignore[union-attr]
