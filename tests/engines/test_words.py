"""The language of machine words does what Python does with the same text."""

from __future__ import annotations

import random
import threading
from array import array
from typing import Any

import pytest

pytest.importorskip("llvmlite")

from hybridopt.engines._words import Words

SORT = """
def swap(a, i):
    a[i], a[i + 1] = a[i + 1], a[i]
def f(a):
    n, swapped = a[0], 1
    while swapped != 0:
        swapped = 0
        for i in range(n - 1):
            if a[i + 1] > a[i + 2]:
                swap(a, i + 1)
                swapped += 1
    return -a[n]
"""

BRANCHES = """
def f(a):
    told = 0
    for i in range(a[0]):
        x = a[i + 1]
        if x < 0 and x != -3 or x == 4 and i > 2:
            told += 1
        elif x & 5 == 5 or x >= 9:
            a[i + 1] += 100
            if i == 7:
                return told
        else:
            told = told - x * 2 ^ (x | 6)
    return told + (told == 0)
"""

SHORT = """
def set(a):
    a[1] = a[1] + 1
    return 1
def f(a):
    if a[0] != 0 and set(a) or a[0] == 0 or set(a):
        return a[1]
"""


def run(source: str, words: list[int]) -> tuple[int, list[int]]:
    memory = array("q", words)
    told = Words(source, {"f": True}).methods["f"](memory.buffer_info()[0])
    return told, memory.tolist()


@pytest.mark.parametrize("source", [SORT, BRANCHES])
@pytest.mark.parametrize("seed", range(5))
def test_same_as_python(source: str, seed: int) -> None:
    draw = random.Random(seed)
    words = [9, *(draw.randint(-10, 10) for _ in range(9))]
    python: dict[str, Any] = {}
    exec(source, python)
    expected = list(words)
    told = python["f"](expected)
    assert run(source, words) == (told, expected)


@pytest.mark.parametrize(("first", "told"), [(0, 0), (1, 1)])
def test_conditions_ask_no_further_than_they_must(first: int, told: int) -> None:
    assert run(SHORT, [first, 0]) == (told, [first, told])


def test_numbers_of_64_bits() -> None:
    source = "def f(a):\n    return a[0] * 3 - 1\n"
    assert run(source, [1 << 60])[0] == 3 * (1 << 60) - 1
    assert run(source, [-(1 << 62)])[0] == -3 * (1 << 62) - 1 + (1 << 64)  # as int64 goes round


def test_what_is_no_address_can_be_prefetched() -> None:
    assert run("def f(a):\n    prefetch(a)\n    prefetch(a[0])\n    return a[1]\n", [-12345, 7]) == (
        7,
        [-12345, 7],
    )


def test_each_word_is_claimed_once() -> None:
    source = """
def f(a):
    k = claim(a)
    while k < 100000:
        a[k + 1] += 1
        k = claim(a)
"""
    memory = array("q", [0] * 100_001)
    function = Words(source, {"f": True}).methods["f"]
    threads = [threading.Thread(target=function, args=(memory.buffer_info()[0],)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory[0] == 100_003
    assert set(memory[1:]) == {1}


@pytest.mark.parametrize(
    "line", ["a.b = 1", "return a / 2", "return [a]", "for i in a:\n        a = 1", "return 1.5"]
)
def test_what_the_language_lacks(line: str) -> None:
    with pytest.raises(SyntaxError, match="not in the language"):
        Words(f"def f(a):\n    {line}\n", {"f": True})
